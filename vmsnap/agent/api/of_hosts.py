"""Requests for verbs that work on a host: its VMs, the duplicates in its memory, what a crash left."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vmsnap.agent.api.request import Device, LongSeconds, Name, Options, Request, driver_options, each, flags
from vmsnap.agent.tokens import ADMIN, OPERATE

Driver = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
Stray = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-][^\x00-\x1f\x7f]{0,999}$")]


class _OfVm(Request):
    uses_repository = False
    vm: Name

    def about(self) -> str:
        """Its VM."""
        return self.vm

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.vm]


class FailoverRequest(_OfVm):
    """Let the duplicate that is held in memory take its VM's place."""

    verb = "failover"
    fence: bool = Field(False, description="kill the VM first if it lives")

    def words(self) -> list[str]:
        """See `Request`."""
        return [*flags(fence=self.fence), *super().words()]


class DuplicateListRequest(Request):
    """List the duplicates that are held in memory; those whose time is over are discarded."""

    verb = "duplicate-list"
    uses_repository = False

    def needs(self) -> str:
        """Operators look."""
        return OPERATE


class DiscardRequest(Request):
    """Remove a duplicate from memory."""

    verb = "duplicate-discard"
    uses_repository = False
    duplicate: Name

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.duplicate]


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


class StraysRequest(Request):
    """List what carries our tag and stands in no database, or remove what is named."""

    verb = "strays"
    uses_repository = False
    remove: Annotated[list[Stray], Field(max_length=100)] = Field([])

    def needs(self) -> str:
        """Operators look."""
        return ADMIN if self.remove else OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return each("--remove", self.remove)


class LogRequest(Request):
    """Tell what was done, a line an instruction, of a VM or of all."""

    verb = "log"
    uses_repository = False
    vm: Name | None = None
    since_seconds: LongSeconds | None = None
    failed: bool = False

    def needs(self) -> str:
        """Operators look."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        since = [f"--since={self.since_seconds}s"] if self.since_seconds else []
        return [*since, *flags(failed=self.failed), *(["--", self.vm] if self.vm else [])]


class DriversRequest(Request):
    """List the drivers that are installed on the host."""

    verb = "drivers"
    uses_repository = False

    def needs(self) -> str:
        """Operators look."""
        return OPERATE


class DriversShowRequest(Request):
    """Tell what a driver does, and its options."""

    verb = "drivers-show"
    uses_repository = False
    driver: Driver

    def needs(self) -> str:
        """Operators look."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.driver]


class VmAddRequest(_OfVm):
    """Register a VM."""

    verb = "vm-add"
    hypervisor: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    options: Options = Field({})
    mechanisms: dict[Device, Driver] = Field({}, description="the snapshot mechanism of each disk")

    def words(self) -> list[str]:
        """See `Request`."""
        chosen = [f"--mechanism={device}={mechanism}" for device, mechanism in self.mechanisms.items()]
        return [f"--hypervisor={self.hypervisor}", *driver_options(self.options), *chosen, *super().words()]


class VmShowRequest(_OfVm):
    """Show a VM, its hypervisor asked for its state now."""

    verb = "vm-show"

    def needs(self) -> str:
        """Operators look."""
        return OPERATE


class VmRemoveRequest(_OfVm):
    """Strike a VM out of the table; the VM and its backups stay."""

    verb = "vm-remove"


class TagsRequest(Request):
    """Ask the hypervisors for the tags of all VMs, which schedules may name."""

    verb = "agent-tags"
    uses_repository = False

    def needs(self) -> str:
        """Operators refresh."""
        return OPERATE


OF_HOSTS: tuple[type[Request], ...] = (
    FailoverRequest,
    DuplicateListRequest,
    DiscardRequest,
    DoctorRequest,
    RecoverRequest,
    StraysRequest,
    LogRequest,
    DriversRequest,
    DriversShowRequest,
    VmAddRequest,
    VmShowRequest,
    VmRemoveRequest,
    TagsRequest,
)
