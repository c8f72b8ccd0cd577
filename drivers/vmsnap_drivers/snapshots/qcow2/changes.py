"""What has changed since a mark, read from QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Extent
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.qemu.nbd import NbdClient, NbdError
from vmsnap_drivers.snapshots.qcow2 import bitmaps
from vmsnap_drivers.snapshots.qcow2.names import DiskNames

_CONTEXT: Final = "qemu:dirty-bitmap:"
_DIRTY: Final = 1
"""``docs/interop/nbd.txt`` of QEMU: bit 0 of the status in a context ``qemu:dirty-bitmap:NAME``."""


def read_changes(
    graph: BlockGraph, disk: Disk, names: DiskNames, socket: Path, since: str, timeout_seconds: float
) -> Iterator[Extent]:
    """Yield what has changed on the disk since the mark `since`, up to now. The NBD server listens on `socket`.

    :raises SnapshotError: it cannot be said
    """
    kept_as, size_bytes = bitmaps.parse_mark(since)
    if size_bytes != disk.size_bytes:
        raise SnapshotError(f"the disk was resized: it had {size_bytes} bytes at the last backup")
    found = bitmaps.find(graph, disk, kept_as)
    if found is None:
        raise SnapshotError(
            "QEMU has no record of what changed since the last backup in this repository: QEMU was started anew or "
            "killed since, the disk was replaced, or other backups needed the place (option bitmaps)"
        )
    if not found.whole:
        raise SnapshotError("the record of what changed since the last backup is not whole: QEMU did not end orderly")
    bitmaps.freeze(graph, disk, names, found)
    try:
        graph.add_export(names.changes, disk.handle["node"], bitmap=names.changes)
        yield from _dirty_ranges(socket, names.changes, timeout_seconds)
    finally:
        end_reading(graph, disk, names)


def end_reading(graph: BlockGraph, disk: Disk, names: DiskNames) -> None:
    """Remove what `read_changes` has made; succeeds where there is nothing.

    :raises SnapshotError: QEMU refused
    """
    if names.changes in graph.exports():
        graph.remove_export(names.changes)
    bitmaps.remove_frozen(graph, disk, names)


def _dirty_ranges(socket: Path, export: str, timeout_seconds: float) -> Iterator[Extent]:
    context = _CONTEXT + export
    try:
        with NbdClient(socket, export, contexts=[context], timeout_seconds=timeout_seconds) as client:
            for found in client.ranges(context):
                if found.flags & _DIRTY:
                    yield Extent(found.offset, found.length)
    except NbdError as e:
        raise SnapshotError(f"the record of changes cannot be read: {e.message}") from e
