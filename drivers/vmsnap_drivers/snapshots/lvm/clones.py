"""Writable volumes for duplicates: thin snapshots of a thin snapshot, whole copies of a thick one."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, DiskSnapshot
from vmsnap.roles import DiskReader
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.names import CloneNames, names_of_snapshot
from vmsnap_drivers.snapshots.lvm.volumes import tags_of

_COPY_BYTES: Final = 4 << 20
_BLKZEROOUT: Final = 0x127F
"""From ``include/uapi/linux/fs.h`` of Linux."""


def make(lvm: Lvm, names: CloneNames, snapshot: DiskSnapshot, reader: DiskReader) -> Disk:
    """Make the volume that `names` names. A copy reads the whole disk.

    :raises SnapshotError: it cannot be made
    """
    source, tags = names_of_snapshot(snapshot), tags_of("clone", snapshot.plan.tag)
    disk = Disk(snapshot.disk.device, names.device, snapshot.disk.size_bytes)
    if source.thin:
        lvm.change(
            "lvcreate", "--snapshot", "--setactivationskip", "n", "--permission", "rw", *tags,
            "--name", names.name, f"{source.group}/{source.snapshot}",
        )  # fmt: skip
        return disk
    # LVM has no snapshots of thick snapshots.
    lvm.change(
        "lvcreate", "--yes", "--size", f"{disk.size_bytes}b", *tags, "--name", names.name, source.group,
    )  # fmt: skip
    try:
        _copy(reader, names.device)
    except OSError as e:
        raise SnapshotError(f"{names.group}/{names.name} cannot be written: {e.strerror}") from e
    return disk


def _copy(reader: DiskReader, device: str) -> None:
    """Past the page cache: nothing of it will be read soon, but what the duplicate reads."""
    # Anonymous memory begins at a page, as O_DIRECT wants it. Not closed by hand: an error may still refer to it.
    buffer = memoryview(mmap.mmap(-1, _COPY_BYTES))
    descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        for extent in reader.extents():
            if extent.zero:
                fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("QQ", extent.offset, extent.length))
                continue
            for at in range(extent.offset, extent.offset + extent.length, _COPY_BYTES):
                piece = buffer[: min(_COPY_BYTES, extent.offset + extent.length - at)]
                reader.read_into(at, piece)
                if os.pwrite(descriptor, piece, at) != len(piece):
                    raise SnapshotError(f"{device} does not take all that is written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
