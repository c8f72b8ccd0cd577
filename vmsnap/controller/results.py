"""What the controller's verbs return: frozen, and with the keys of the command line's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmsnap.vmtable import DiskRow


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
