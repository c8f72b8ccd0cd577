"""Where a snapshot's files go, whose they are, and whether there is room for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap_drivers.qemu.peer import user_of

_MIB: Final = 1024 * 1024
_LEAST_BYTES: Final = 64 * _MIB
_PART: Final = 50


def needed_bytes(disk: Disk) -> int:
    """The room that a snapshot or an overlay of the disk must find: for what the guest may write meanwhile, which
    nobody knows, 2 % of the disk, but at least 64 MiB, and never more than the whole disk with its qcow2 tables.
    """
    whole = disk.size_bytes + disk.size_bytes // 4096 + _MIB
    return min(whole, max(_LEAST_BYTES, disk.size_bytes // _PART))


def choose_folder(disk: Disk, given: str | None, fallback: Path) -> Path:
    """The folder for the files of a disk: the one that the user gave, else the disk's own, else (a disk that is no
    file) `fallback`.

    :raises SnapshotError: the folder given is none
    """
    if given is not None:
        folder = Path(given).absolute()
        if not folder.is_dir():
            raise SnapshotError(f"{folder} is no folder", cure="correct -o folder=…")
        return folder
    address = Path(disk.address)
    return address.resolve().parent if address.is_absolute() and address.is_file() else fallback


def owner_for(disk: Disk, pid: int) -> tuple[int, int]:
    """The user and the group to whom the files of a disk are given, so that QEMU, the process `pid`, may open them:
    those of its image; of a disk that is no file, QEMU's own.

    :raises VmGone: QEMU has ended
    :raises SnapshotError: the image cannot be looked at
    """
    image = Path(disk.handle["file"])
    if not image.is_file():
        return user_of(pid)
    try:
        found = image.stat()
    except OSError as e:
        raise SnapshotError(f"{image} cannot be looked at: {e.strerror}") from e
    return found.st_uid, found.st_gid


def check_room(disks: Sequence[Disk], folders: Sequence[Path]) -> None:
    """See whether the file systems have room for the snapshot of all `disks` together.

    :raises SnapshotError: one has not; the message names it
    """
    needs: dict[int, tuple[Path, int]] = {}
    for disk, folder in zip(disks, folders, strict=True):
        if disk.read_only:
            continue
        place = next(found for found in (folder, *folder.parents) if found.exists())
        device = place.stat().st_dev
        needs[device] = (place, needs.get(device, (place, 0))[1] + needed_bytes(disk))
    for place, needed in needs.values():
        state = os.statvfs(place)
        free = state.f_bavail * state.f_frsize
        if free < needed:
            raise SnapshotError(
                f"{place} has {free // _MIB} MiB free, the snapshot needs {-(-needed // _MIB)} MiB at least",
                cure="make room there, or choose another place with -o folder=…",
            )
