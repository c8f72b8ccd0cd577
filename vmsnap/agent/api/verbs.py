"""The verbs of the command line as requests: what each takes, who may ask for it, and the words that it becomes.

Values never become options by themselves: each stands behind its own option in one word, or behind ``--``. What would
let the caller name a file on the host or a driver's option is the administrator's, whatever the verb.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from vmsnap.agent.tokens import ADMIN, OPERATE

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of a VM")]
Backup = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the whole id of a backup")]
Tag = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-][^\x00-\x1f\x7f]{0,199}$")]
Device = Annotated[str, Field(pattern=r"^[A-Za-z0-9#@_][A-Za-z0-9#@_ .:,;+=()\[\]-]{0,199}$")]
HostPath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f\x7f]{0,1000}$", description="on the agent's host")]
Url = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f-][^\x00-\x20\x7f]{0,999}$")]
Options = dict[
    Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")],
    Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{0,1000}$")],
]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=0, le=100_000)]


class Request(BaseModel):
    """What all verbs have: the repository, which must be one that the agent is set up with; default: the configured
    one.
    """

    model_config = ConfigDict(extra="forbid")
    verb: ClassVar[str] = ""
    uses_repository: ClassVar[bool] = True

    repository: Url | None = Field(None, description="one of those that the agent works with")

    def needs(self) -> str:
        """The role that may ask for this."""
        return ADMIN

    def words(self) -> list[str]:
        """The command line's words behind the verb."""
        return []

    def about(self) -> str:
        """The VM that it works on; empty for none or many."""
        return ""

    def other_repositories(self) -> list[str]:
        """Those that it uses beside its own; the agent must work with them too."""
        return []

    def arguments(self) -> tuple[str, ...]:
        """The whole command line, without the repository."""
        return (*self.verb.split("-"), *self.words())


class BackupRequest(Request):
    """Back up a running VM whole."""

    verb = "backup"
    vm: Name
    mode: Literal["live", "consistent"] = "live"
    max_pause_seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    tags: Annotated[list[Tag], Field(max_length=20)] = []
    keep_duplicate: bool = False
    keep_for_seconds: Annotated[int, Field(gt=0, le=366 * 86400)] | None = None
    timeout_seconds: Seconds = 300.0
    on_timeout: Literal["fail", "keep-live"] = "fail"

    def needs(self) -> str:
        """Operators back up."""
        return OPERATE

    def about(self) -> str:
        """Its VM."""
        return self.vm

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--mode={self.mode}", f"--max-pause={self.max_pause_seconds!r}", *_each("--tag", self.tags)]
        found += [f"--timeout={self.timeout_seconds!r}", f"--on-timeout={self.on_timeout}"]
        found += ["--keep-duplicate"] if self.keep_duplicate else []
        found += [f"--keep-for={self.keep_for_seconds}s"] if self.keep_for_seconds else []
        return [*found, "--", self.vm]


class RestoreRequest(Request):
    """Bring a backup up as a new VM. Nothing is overwritten: a name or file that exists is refused."""

    verb = "restore"
    backup: Backup
    name: Name
    run: bool = False
    isolated: bool = True
    target: HostPath | None = Field(None, description="folder for its disks; administrators alone")
    options: Options = Field({}, description="of the driver; administrators alone")
    accept_loss: bool = False

    def needs(self) -> str:
        """Operators restore, isolated and where restores go; the rest is not theirs."""
        return ADMIN if self.target or self.options or not self.isolated else OPERATE

    def about(self) -> str:
        """The new VM."""
        return self.name

    def words(self) -> list[str]:
        """See `Request`."""
        flags = (("--run", self.run), ("--isolated", self.isolated), ("--accept-loss", self.accept_loss))
        found = [f"--as={self.name}", *(flag for flag, given in flags if given), *_options(self.options)]
        return [*found, *([f"--target={self.target}"] if self.target else []), "--", self.backup]


class VerifyRequest(Request):
    """Read and authenticate all of a backup; with `boot`, bring it up apart from everything too."""

    verb = "verify"
    backup: Backup
    boot: bool = False

    def needs(self) -> str:
        """Operators verify."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return [*(["--boot"] if self.boot else []), "--", self.backup]


class ConsolidateRequest(Request):
    """Get clean disks from a live backup, in a folder of the host."""

    verb = "consolidate"
    backup: Backup
    target: HostPath
    store: bool = False
    tags: Annotated[list[Tag], Field(max_length=20)] = []
    timeout_seconds: Seconds = 300.0
    options: Options = {}

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--target={self.target}", *(["--store"] if self.store else []), *_each("--tag", self.tags)]
        return [*found, f"--timeout={self.timeout_seconds!r}", *_options(self.options), "--", self.backup]


class ExportRequest(Request):
    """Write a backup's disks as image files of the host."""

    verb = "export"
    backup: Backup
    output: HostPath
    format: Literal["raw", "qcow2"] = "raw"
    disks: Annotated[list[Device], Field(max_length=100)] = []

    def words(self) -> list[str]:
        """See `Request`."""
        return [f"--output={self.output}", f"--format={self.format}", *_each("--disk", self.disks), "--", self.backup]


class FailoverRequest(Request):
    """Let the duplicate that is held in memory take its VM's place."""

    verb = "failover"
    uses_repository = False
    vm: Name
    fence: bool = Field(False, description="kill the VM first if it lives")

    def about(self) -> str:
        """Its VM."""
        return self.vm

    def words(self) -> list[str]:
        """See `Request`."""
        return [*(["--fence"] if self.fence else []), "--", self.vm]


class DiscardRequest(Request):
    """Remove a duplicate from memory."""

    verb = "duplicate-discard"
    uses_repository = False
    duplicate: Name

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.duplicate]


class PruneRequest(Request):
    """Remove the backups that no rule keeps; with `dry_run`, only say which."""

    verb = "prune"
    keep_last: Count = 0
    keep_hourly: Count = 0
    keep_daily: Count = 0
    keep_weekly: Count = 0
    keep_monthly: Count = 0
    keep_yearly: Count = 0
    keep_tags: Annotated[list[Tag], Field(max_length=20)] = []
    vm: Name | None = None
    tags: Annotated[list[Tag], Field(max_length=20)] = []
    dry_run: bool = True

    def needs(self) -> str:
        """Operators may ask what would go."""
        return OPERATE if self.dry_run else ADMIN

    def about(self) -> str:
        """Its VM, where it is one alone."""
        return self.vm or ""

    def words(self) -> list[str]:
        """See `Request`."""
        rules = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
        found = [f"--keep-{rule}={getattr(self, f'keep_{rule}')}" for rule in rules if getattr(self, f"keep_{rule}")]
        found += [*_each("--keep-tag", self.keep_tags), *_each("--tag", self.tags)]
        return [*found, *([f"--vm={self.vm}"] if self.vm else []), *(["--dry-run"] if self.dry_run else [])]


class ForgetRequest(Request):
    """Remove single backups."""

    verb = "forget"
    backups: Annotated[list[Backup], Field(min_length=1, max_length=1000)]

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", *self.backups]


class GcRequest(Request):
    """Free the room of what no backup needs."""

    verb = "gc"


class CheckRequest(Request):
    """Check the repository."""

    verb = "check"
    read_data: bool = False

    def needs(self) -> str:
        """Operators check."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--read-data"] if self.read_data else []


class RepairRequest(Request):
    """Save what can be saved of a damaged repository; with `dry_run`, only say what would be done."""

    verb = "repair"
    dry_run: bool = True
    forget_damaged: bool = False

    def words(self) -> list[str]:
        """See `Request`."""
        flags = (("--dry-run", self.dry_run), ("--forget-damaged", self.forget_damaged))
        return [flag for flag, given in flags if given]


class CopyRequest(Request):
    """Copy backups into another repository that the agent works with."""

    verb = "copy"
    to: Url
    backups: Annotated[list[Backup], Field(max_length=1000)] = []
    vm: Name | None = None
    dry_run: bool = False

    def other_repositories(self) -> list[str]:
        """Where they go."""
        return [self.to]

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--to={self.to}", *([f"--vm={self.vm}"] if self.vm else []), *(["--dry-run"] if self.dry_run else [])]
        return [*found, "--", *self.backups]


class RefreshRequest(Request):
    """Bring the catalogue of backups up to date with the repository."""

    verb = "agent-refresh"
    everything: bool = False

    def needs(self) -> str:
        """Operators refresh."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--all"] if self.everything else []


class DoctorRequest(Request):
    """Say what works on the host, or whether a backup of a VM would."""

    verb = "doctor"
    vm: Name | None = None

    def needs(self) -> str:
        """Operators ask the doctor."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.vm] if self.vm else []


class RecoverRequest(Request):
    """Finish or undo what a crash left."""

    verb = "recover"
    uses_repository = False
    vm: Name | None = None

    def about(self) -> str:
        """Its VM, where it is one alone."""
        return self.vm or ""

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.vm] if self.vm else []


class VmAddRequest(Request):
    """Register a VM."""

    verb = "vm-add"
    uses_repository = False
    vm: Name
    hypervisor: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    options: Options = {}

    def about(self) -> str:
        """Its VM."""
        return self.vm

    def words(self) -> list[str]:
        """See `Request`."""
        return [f"--hypervisor={self.hypervisor}", *_options(self.options), "--", self.vm]


class VmRemoveRequest(Request):
    """Strike a VM out of the table; the VM and its backups stay."""

    verb = "vm-remove"
    uses_repository = False
    vm: Name

    def about(self) -> str:
        """Its VM."""
        return self.vm

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.vm]


VERBS: tuple[type[Request], ...] = (
    BackupRequest,
    RestoreRequest,
    VerifyRequest,
    ConsolidateRequest,
    ExportRequest,
    FailoverRequest,
    DiscardRequest,
    PruneRequest,
    ForgetRequest,
    GcRequest,
    CheckRequest,
    RepairRequest,
    CopyRequest,
    RefreshRequest,
    DoctorRequest,
    RecoverRequest,
    VmAddRequest,
    VmRemoveRequest,
)
"""All verbs that can be asked for. Keys and passphrases are not among them: they do not travel."""


def _each(option: str, values: list[Any]) -> list[str]:
    return [f"{option}={value}" for value in values]


def _options(options: Options) -> list[str]:
    return [f"-o{key}={value}" for key, value in options.items()]
