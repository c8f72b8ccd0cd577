"""Whether there is room for snapshots, before anything is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from vmsnap.errors import SnapshotError, UsageError
from vmsnap.model import Disk
from vmsnap.roles import OptionType
from vmsnap_drivers.snapshots.lvm.volumes import Volume, named

_SIZE: Final = re.compile(r"(\d+)([KMGT]?)")
_PERCENT: Final = re.compile(r"(\d+)%")
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# An exception takes 16 bytes beside its chunk (drivers/md/dm-snap-persistent.c); the smallest chunk is 4 KiB.
_CHUNKS_OF_A_TABLE: Final = 4096 // 16


def _room(text: str) -> str:
    if not _PERCENT.fullmatch(text) and not _SIZE.fullmatch(text):
        raise ValueError(text)
    return text


ROOM: Final = OptionType("room", "SIZE|N%", "size such as 8G, or percentage such as 20%", _room)
"""The option `snapshot_size`."""


def room_of(volume: Volume, wanted: str) -> int:
    """How many bytes a thick snapshot of `volume` gets: `wanted` is a size or a percentage, as the option has it; whole
    extents, and never more than it can use.

    :raises UsageError: `wanted` is neither
    """
    percent, size = _PERCENT.fullmatch(wanted), _SIZE.fullmatch(wanted)
    if percent:
        chosen = volume.size_bytes * int(percent[1]) // 100
    elif size:
        chosen = int(size[1]) * _UNITS[size[2]]
    else:
        raise UsageError(f"snapshot_size={wanted!r} is no size", cure="write 20%, or 8G")
    return min(max(1, -(-chosen // volume.extent_bytes)) * volume.extent_bytes, most_of(volume))


def most_of(volume: Volume) -> int:
    """How many bytes a thick snapshot of `volume` can use: with so many it never overflows."""
    most = volume.size_bytes + volume.size_bytes // _CHUNKS_OF_A_TABLE + volume.extent_bytes
    return -(-most // volume.extent_bytes) * volume.extent_bytes


def check_groups(needed: Mapping[str, int], volumes: Sequence[Volume]) -> None:
    """See that the groups have so many bytes free.

    :raises SnapshotError: one has not
    """
    for group, size in needed.items():
        free = next((volume.group_free_bytes for volume in volumes if volume.group == group), 0)
        if size > free:
            raise SnapshotError(
                f"no room in volume group {group}: {size} bytes are needed, {free} are free",
                cure="add a disk to the group (vgextend), or choose a smaller snapshot_size",
            )


def check_pool(volumes: Sequence[Volume], group: str, name: str, limit_percent: int, disks: Sequence[Disk]) -> None:
    """See that a thin pool is not so full that a snapshot endangers the guests in it.

    :raises SnapshotError: it is
    """
    pool = named(volumes, group, name)
    if pool is None:
        raise SnapshotError(f"there is no thin pool {group}/{name}")
    for what, used in (("data", pool.used_percent), ("metadata", pool.metadata_percent)):
        if used >= limit_percent:
            raise SnapshotError(
                f"thin pool {group}/{name} is too full for a snapshot of {', '.join(disk.device for disk in disks)}:"
                f" {used:g}% of its {what} is used, {limit_percent}% is the limit",
                cure="extend the pool (lvextend), or remove volumes from it",
            )
