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
    """A committed backup. `mode` is the mode that it has, which `--on-timeout keep-live` may have made another one than
    was asked for; the manifest's remarks and the `warnings` say so then. `duplicate` is the duplicate that is held in
    memory, empty where none is. `warnings` are also things left behind or left undone that did not hurt the backup.
    """

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
    duplicate: str = ""


@dataclass(frozen=True)
class DuplicateInfo:
    """One duplicate that is held in host memory. `memory_bytes` is what its images really take there, `state` is
    ``held``, or ``spent`` where it has run and failed. Times are seconds since 1970; `expires` is None without a limit.
    """

    duplicate: str
    vm: str
    backup: str
    state: str
    memory_bytes: int
    disks: tuple[DiskRow, ...]
    held: float
    expires: float | None


@dataclass(frozen=True)
class ConsolidateResult:
    """Clean disks from a backup. `backup` is the one that was made of them, empty where none was."""

    disks: tuple[DiskRow, ...]
    seconds: float
    source: str
    backup: str = ""
    stored_bytes: int = 0
    clean: bool = True
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class FailoverResult:
    """A VM whose duplicate runs in its place. `was` is the state in which the VM was found, `fenced` how it was shown
    not to run, `instant` the moment that the duplicate goes on from (seconds since 1970), `seconds` the time from the
    call to the running guest.
    """

    vm: str
    state: str
    was: str
    fenced: str
    disks: tuple[DiskRow, ...]
    duplicate: str
    backup: str
    instant: float
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BootResult:
    """A backup that was brought up, lived and was shut down again. `life` says how life was shown."""

    backup: str
    life: str
    seconds: float
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
