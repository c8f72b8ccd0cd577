"""Requests for verbs that make, use and remove backups."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vmsnap.agent.api.request import (
    Backup,
    Count,
    Device,
    HostPath,
    LimitedRequest,
    LongSeconds,
    Lun,
    Name,
    Options,
    Request,
    Seconds,
    Tags,
    Url,
    driver_options,
    each,
    flags,
)
from vmsnap.agent.tokens import ADMIN, OPERATE


class BackupRequest(LimitedRequest):
    """Back up a running VM whole."""

    verb = "backup"
    vm: Name
    mode: Literal["live", "consistent"] = "live"
    max_pause_seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    tags: Tags = Field([])
    keep_duplicate: bool = False
    keep_for_seconds: Annotated[int, Field(gt=0, le=366 * 86400)] | None = None
    timeout_seconds: Seconds = 300.0
    on_timeout: Literal["fail", "keep-live"] = "fail"
    freeze: Literal["none", "overlay"] | None = Field(None, description="as configured there, where it is left out")
    accept_unencrypted: bool = Field(False, description="administrators alone")

    def needs(self) -> str:
        """Operators back up; where guests' memory may lie open is not theirs to say."""
        return ADMIN if self.accept_unencrypted else OPERATE

    def about(self) -> str:
        """Its VM."""
        return self.vm

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--mode={self.mode}", f"--max-pause={self.max_pause_seconds!r}", *each("--tag", self.tags)]
        found += [f"--timeout={self.timeout_seconds!r}", f"--on-timeout={self.on_timeout}"]
        found += flags(keep_duplicate=self.keep_duplicate, accept_unencrypted=self.accept_unencrypted)
        found += [f"--freeze={self.freeze}"] if self.freeze else []
        found += [f"--keep-for={self.keep_for_seconds}s"] if self.keep_for_seconds else []
        return [*found, "--", self.vm]


class RestoreRequest(LimitedRequest):
    """Bring a backup up as a new VM. Nothing is overwritten but the LUNs of `onto`: a name or file that exists is
    refused.
    """

    verb = "restore"
    backup: Backup
    name: Name
    run: bool = False
    isolated: bool = True
    target: HostPath | None = Field(None, description="folder for its disks; administrators alone")
    onto: dict[Device | Literal[""], Lun] = Field(
        {}, description="LUNs onto which disks are written, by device, or by '' the only one; administrators alone"
    )
    options: Options = Field({}, description="of the driver; administrators alone")
    accept_loss: bool = False

    def needs(self) -> str:
        """Operators restore, isolated and where restores go; the rest is not theirs."""
        return ADMIN if self.target or self.onto or self.options or not self.isolated else OPERATE

    def about(self) -> str:
        """The new VM."""
        return self.name

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--as={self.name}", *flags(run=self.run, isolated=self.isolated, accept_loss=self.accept_loss)]
        found += driver_options(self.options)
        places = [self.target] if self.target else []
        places += [f"{device}={lun}" if device else lun for device, lun in self.onto.items()]
        return [*found, *each("--target", places), "--", self.backup]


class VerifyRequest(LimitedRequest):
    """Read and authenticate all of a backup; with `boot`, bring it up apart from everything too."""

    verb = "verify"
    backup: Backup
    boot: bool = False
    alive_within_seconds: Seconds = 10.0
    timeout_seconds: Seconds = 300.0
    options: Options = Field({}, description="of the driver; administrators alone")

    def needs(self) -> str:
        """Operators verify."""
        return ADMIN if self.options else OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        found = [*flags(boot=self.boot), f"--alive-within={self.alive_within_seconds!r}"]
        return [*found, f"--timeout={self.timeout_seconds!r}", *driver_options(self.options), "--", self.backup]


class ConsolidateRequest(LimitedRequest):
    """Get clean disks from a live backup, in a folder of the host."""

    verb = "consolidate"
    backup: Backup
    target: HostPath
    store: bool = False
    tags: Tags = Field([])
    timeout_seconds: Seconds = 300.0
    accept_loss: bool = False
    options: Options = Field({})

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--target={self.target}", *flags(store=self.store, accept_loss=self.accept_loss)]
        found += [*each("--tag", self.tags), f"--timeout={self.timeout_seconds!r}"]
        return [*found, *driver_options(self.options), "--", self.backup]


class ExportRequest(LimitedRequest):
    """Write a backup's disks as image files of the host, or one of them `onto` a disk that exists: what that holds is
    lost.
    """

    verb = "export"
    backup: Backup
    output: HostPath | None = None
    onto: HostPath | None = None
    format: Literal["raw", "qcow2"] | None = None
    disks: Annotated[list[Device], Field(max_length=100)] = Field([])
    accept_loss: bool = False

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--{name}={value}" for name, value in (("output", self.output), ("onto", self.onto)) if value]
        found += [f"--format={self.format}"] if self.format else []
        return [*found, *each("--disk", self.disks), *flags(accept_loss=self.accept_loss), "--", self.backup]


class CopyRequest(LimitedRequest):
    """Copy backups into another repository that the agent works with."""

    verb = "copy"
    to: Url
    backups: Annotated[list[Backup], Field(max_length=1000)] = Field([])
    vm: Name | None = None
    dry_run: bool = False
    accept_unencrypted: bool = False

    def other_repositories(self) -> list[str]:
        """Where they go."""
        return [self.to]

    def words(self) -> list[str]:
        """See `Request`."""
        found = [f"--to={self.to}", *([f"--vm={self.vm}"] if self.vm else [])]
        found += flags(dry_run=self.dry_run, accept_unencrypted=self.accept_unencrypted)
        return [*found, "--", *self.backups]


class PruneRequest(Request):
    """Remove the backups that no rule keeps; with `dry_run`, only say which."""

    verb = "prune"
    keep_last: Count = 0
    keep_hourly: Count = 0
    keep_daily: Count = 0
    keep_weekly: Count = 0
    keep_monthly: Count = 0
    keep_yearly: Count = 0
    keep_within_seconds: LongSeconds | None = None
    keep_tags: Tags = Field([])
    vm: Name | None = None
    tags: Tags = Field([])
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
        found += [f"--keep-within={self.keep_within_seconds}s"] if self.keep_within_seconds else []
        found += [*each("--keep-tag", self.keep_tags), *each("--tag", self.tags)]
        return [*found, *([f"--vm={self.vm}"] if self.vm else []), *flags(dry_run=self.dry_run)]


class ForgetRequest(Request):
    """Remove single backups."""

    verb = "forget"
    backups: Annotated[list[Backup], Field(min_length=1, max_length=1000)]

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", *self.backups]


OF_BACKUPS: tuple[type[Request], ...] = (
    BackupRequest,
    RestoreRequest,
    VerifyRequest,
    ConsolidateRequest,
    ExportRequest,
    CopyRequest,
    PruneRequest,
    ForgetRequest,
)
