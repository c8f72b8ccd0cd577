"""Backing stores that are logical volumes outside of a thin pool.

A snapshot gets as much room as can ever be overwritten: it never runs full, and nobody has to watch it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from vmsnap.errors import SnapshotError
from vmsnap_drivers.snapshots.iscsi.stores import Fill, Origin, Owned
from vmsnap_drivers.snapshots.iscsi.volumes import Volumes

_LAYOUTS: Final = {"linear", "striped"}
_COPY_SECONDS: Final = 86400.0
# An exception takes 16 bytes beside its chunk (drivers/md/dm-snap-persistent.c); the smallest chunk is 4 KiB.
_CHUNKS_OF_A_TABLE: Final = 4096 // 16


class ThickVolumes(Volumes):
    """Snapshots of the kind that device mapper has had first; clones are whole copies."""

    kind: ClassVar[str] = "thick volume"

    def look(self, path: str) -> Origin | None:
        """See `Stores.look`."""
        (found,) = self._lvs(path)
        if not set(found["lv_layout"].split(",")) <= _LAYOUTS or found["origin"]:
            layout = "snapshot" if found["origin"] else found["lv_layout"]
            raise SnapshotError(
                f"{path} is of the kind {layout}, which is not snapshotted", cure="choose --mechanism DISK=qcow2"
            )
        room, free = _room(int(found["lv_size"]), int(found["vg_extent_size"])), int(found["vg_free"])
        if room > free:
            raise SnapshotError(
                f"no room in volume group {found['vg_name']} for a snapshot of {path}: {room} bytes are needed, {free}"
                " are free",
                cure="add a disk to the group (vgextend), or move the volume into a thin pool",
            )
        return Origin(self.kind, found["lv_path"], int(found["lv_size"]))

    def prepare(self, origin: str, path: str, tag: str) -> None:
        """Make the room, and clear its begin."""
        (found,) = self._lvs(origin)
        self._make(origin, path, "snapshot", tag, _room(int(found["lv_size"]), int(found["vg_extent_size"])))

    def snapshot(self, origin: str, path: str, tag: str, seconds: float) -> None:
        """See `Stores.snapshot`."""
        self._lvm("lvconvert", "--yes", "--type", "snapshot", "--zero", "n", origin, path, seconds=seconds)

    def settle(self, path: str) -> None:
        """See `Stores.settle`: it can be opened as it is."""

    def fill(self, origin: str) -> Fill | None:
        """See `Stores.fill`: a snapshot has room of its own."""
        return None

    def clone(self, source: str, path: str, tag: str) -> None:
        """See `Stores.clone`."""
        # The size of a snapshot is that of its room; the disk's is its origin's.
        (snapshot,) = self._lvs(source)
        (origin,) = self._lvs(f"{snapshot['vg_name']}/{snapshot['origin']}")
        self._make(source, path, "clone", tag, int(origin["lv_size"]))
        self._run(["dd", f"if={source}", f"of={path}", "bs=4M", "conv=fsync,nocreat"], _COPY_SECONDS, changes=True)

    def owned(self, origins: Iterable[str]) -> list[Owned]:
        """See `Stores.owned`: `Volumes` tells of all volumes."""
        return []

    def foreign(self, origins: Iterable[str]) -> list[str]:
        """See `Stores.foreign`: `Volumes` tells of all volumes."""
        return []

    def _make(self, beside: str, path: str, kind: str, tag: str, size_bytes: int) -> None:
        group = beside.split("/")[2]
        name = path.rpartition("/")[2]
        self._lvm("lvcreate", "--yes", "--size", f"{size_bytes}b", *self._tags(kind, tag), "--name", name, group)


def _room(size_bytes: int, extent_bytes: int) -> int:
    """How many bytes a snapshot takes with which it never runs full: whole extents."""
    most = size_bytes + size_bytes // _CHUNKS_OF_A_TABLE + extent_bytes
    return -(-most // extent_bytes) * extent_bytes
