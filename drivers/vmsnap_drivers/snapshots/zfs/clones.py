"""Clones of snapshots: read-only ones, through which snapshots are read, and writable ones for duplicates.

A file system's ``.zfs/snapshot`` and a volume's ``snapdev`` would show snapshots too: the first is mounted behind the
back of whoever looks there and comes and goes, zfs-fuse has none, and the second is a property of the user's volume.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap_drivers.snapshots.zfs import lookup
from vmsnap_drivers.snapshots.zfs.commands import Zfs, marked

_READ_ONLY: Final = ("-o", "readonly=on")
_WRITABLE: Final = ("-o", "readonly=off")
# What is in it is a guest's: nothing of it is to be run, shared or snapshotted by anybody here.
_SAFE: Final = ("-o", "setuid=off", "-o", "exec=off", "-o", "devices=off", "-o", "com.sun:auto-snapshot=false")
_FILE_SYSTEM: Final = (*_SAFE, "-o", "atime=off", "-o", "sharenfs=off")
_VOLUME: Final = ("-o", "com.sun:auto-snapshot=false")
_WHOLE_DEVICE: Final = ("-o", "volmode=dev")
"""The guest's partitions are no devices of this host."""


def make(zfs: Zfs, snapshot: str, name: str, mounted: str, plan: str, kind: str) -> None:
    """Clone `snapshot` as `name`, read-only if it is a ``reader``, for the plan; have it mounted, or have its device.

    :raises SnapshotError: it cannot be made
    """
    use = _READ_ONLY if kind == "reader" else _WRITABLE
    if mounted:
        # It is mounted as soon as it is made, and after a reboot: a VM may run on it for good.
        where = ("-o", f"mountpoint={mounted}", "-o", "canmount=on")
        zfs.change("clone", *use, *_FILE_SYSTEM, *where, *marked(kind, plan), snapshot, name)
    else:
        zfs.change("clone", *use, *_VOLUME, *_WHOLE_DEVICE, *marked(kind, plan), snapshot, name)
        lookup.node_of(name)


def remove_folder(folder: Path) -> None:
    """Remove the folder at which something was mounted, if it is empty; idempotent.

    :raises SnapshotError: something is still mounted there
    """
    try:
        folder.rmdir()
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY):
            raise SnapshotError(f"{folder} cannot be removed: {e.strerror}") from e


def path_in(name: str, path: str, mounted: str, what: str) -> str:
    """Where a clone's disk is: its device, or the image file in it, and nowhere else.

    :raises SnapshotError: it is lost
    """
    if not mounted:
        if not lookup.has_node(name):
            raise SnapshotError(f"{what} {name} is lost: it has no device")
        return str(lookup.node_of(name))
    place = Path(mounted, path)
    found = lookup.look_up(str(place))
    if found is None or (found.dataset, found.path) != (name, path):
        raise SnapshotError(f"{what} {name} is lost: it is not mounted, or {path} is no file in it")
    return str(place)
