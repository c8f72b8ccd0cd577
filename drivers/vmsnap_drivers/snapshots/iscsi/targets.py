"""The role of what serves targets, tgt or LIO: what is exported, and how a target of ours is made and removed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vmsnap.errors import DriverUnavailable, SnapshotError
from vmsnap_drivers.snapshots.iscsi.address import LunAddress


class NotRunning(SnapshotError):
    """Nothing of the kind serves there: nothing is exported."""


class NotAllowed(DriverUnavailable):
    """Something serves targets on this host, and we may not tell it: what it serves cannot be known."""

    def __init__(self, label: str, needed: str) -> None:
        super().__init__(
            f"we may not tell {label} of this host, which needs writing to {needed}",
            cure="run vmsnap as root; or have QEMU snapshot the disk: --mechanism DISK=qcow2",
        )


class Taken(SnapshotError):
    """The name of a target is somebody's already."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is an iSCSI target {name} already, which is left alone",
            cure="remove it if nobody needs it, or see: vmsnap strays",
        )


@dataclass(frozen=True)
class Lun:
    """One LUN of a target that is a disk; `path` is its backing store, empty where that is not told."""

    number: int
    path: str = ""
    read_only: bool = False


@dataclass
class Target:
    """One target. `sessions` are the names of the initiators that are connected, `accounts` those of CHAP with which
    they may be, `outgoing` the one by which the target shows who it is, `access` who is admitted.
    """

    name: str
    tid: int = 0
    disks: list[Lun] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)
    outgoing: list[str] = field(default_factory=list)
    access: list[str] = field(default_factory=list)
    portals: list[str] = field(default_factory=list)

    def disk(self, number: int) -> Lun | None:
        """The disk that initiators see by that number.

        :raises SnapshotError: each of them sees another one
        """
        found = [lun for lun in self.disks if lun.number == number]
        if len({lun.path for lun in found}) > 1:
            paths = ", ".join(sorted({lun.path for lun in found}))
            raise SnapshotError(
                f"LUN {number} of {self.name} is not the same disk to all of its initiators, but one of {paths}",
                cure="give each disk a number, or a target, of its own",
            )
        return found[0] if found else None


class Targets(ABC):
    """One program or kernel part that serves targets. Its methods block.

    All of them raise `NotRunning` where it does not serve, `DriverUnavailable` where a program is not installed by
    which it is told, `SnapshotError` where it cannot be reached or refuses.
    """

    name: ClassVar[str]
    """As the option ``server`` and plans have it."""
    label: ClassVar[str]
    """As messages have it."""
    bypasses_cache: ClassVar[bool] = False
    """Whether it writes to block devices past the page cache of its machine."""
    cure_of_listening: ClassVar[str]
    """How it is made to listen for some networks alone."""

    @abstractmethod
    def is_on_this_host(self) -> bool:
        """Whether there is one on this host, be it ours to tell or not. Quick."""

    @abstractmethod
    def refusal(self) -> NotAllowed | None:
        """Why the one on this host may not be told by us; None where it may, or where there is none. Quick."""

    @abstractmethod
    def targets(self) -> list[Target]:
        """All targets."""

    @abstractmethod
    def portals(self) -> list[str]:
        """Where it listens, such as ``127.0.0.1:3260``."""

    @abstractmethod
    def portals_of(self, target: Target) -> list[str]:
        """Where one target is reached."""

    @abstractmethod
    def admitted(self, lun: LunAddress, like: Target, duplicate: str) -> Sequence[str]:
        """Who may use an export beside `lun`, whose target is `like`, where nobody was named: this host alone.

        :param duplicate: the VM whose disk it will be; empty for a snapshot, which vmsnap reads
        """

    @abstractmethod
    def check_initiator(self, initiator: str) -> None:
        """See that an initiator which a person named can be admitted. No I/O.

        :raises UsageError: it cannot
        """

    @abstractmethod
    def export(self, name: str, path: str, like: Target, initiators: Sequence[str], *, read_only: bool) -> None:
        """Make a target with one LUN, number 1, that the `initiators` may use with the accounts of the target `like`.
        Nobody can before all is as it is to be.

        :raises Taken: there is such a target
        :raises SnapshotError: it was refused
        """

    @abstractmethod
    def delete(self, target: Target, *, force: bool) -> None:
        """Remove a target of ours. With `force` whoever is connected is cut off.

        :raises SnapshotError: it is in use, or it was refused
        """

    def release(self, path: str) -> None:
        """Let go of a backing store that `export` has opened, and whose target was not made; idempotent."""

    def find(self, name: str) -> Target | None:
        """The target of that name."""
        return next((target for target in self.targets() if target.name == name), None)
