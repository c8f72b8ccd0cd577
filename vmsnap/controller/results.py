"""What the controller's verbs return: frozen, and with the keys of the command line's JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmsnap.vmtable import DiskRow


@dataclass(frozen=True)
class Progress:
    """How far a long verb has come: `phase` for people, bytes done and to do (None where that is not known)."""

    phase: str
    done_bytes: int = 0
    total_bytes: int | None = None


ProgressCallback = Callable[[Progress], None]
"""Called from the verb's own threads, often; must be quick and must not raise."""


def silent(_: Progress) -> None:
    """The callback of those who do not want to know."""


@dataclass(frozen=True)
class BackupDisk:
    """One disk of a backup."""

    device: str
    size_bytes: int


@dataclass(frozen=True)
class BackupResult:
    """A committed backup. `warnings` are things left behind or left undone that did not hurt the backup."""

    backup: str
    vm: str
    mode: str
    pause_seconds: float
    read_bytes: int
    stored_bytes: int
    seconds: float
    disks: tuple[BackupDisk, ...]
    memory_bytes: int
    capture: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RestoreResult:
    """A VM made from a backup. `options` are those under which its driver reaches it."""

    vm: str
    state: str
    disks: tuple[DiskRow, ...]
    options: Mapping[str, str]
    backup: str
    seconds: float


@dataclass(frozen=True)
class RecoveryResult:
    """What `recover` did: VMs resumed, things removed, things kept because they could not be reached or must not be
    removed. One line each."""

    resumed: tuple[str, ...]
    removed: tuple[str, ...]
    kept: tuple[str, ...]
