"""Whether a disk is as it was described, and free for us."""

from __future__ import annotations

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap_drivers.qemu.block_drivers import format_of
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.qemu.blocks.overlay import OverlayNames


def check_disk(graph: BlockGraph, disk: Disk, names: OverlayNames) -> None:
    """See whether the disk is in the graph as it was described, with nothing on it but what an unfinished plan of the
    same `names` left there: so that a plan can be made again, to delete it.

    :raises SnapshotError: it is not
    """
    wanted = disk.handle["node"]
    node = graph.node(wanted)
    if node is None:
        raise SnapshotError(f"disk {disk.device} has no block node {wanted} any more")
    if format_of(node) != disk.format or disk.format not in ("raw", "qcow2"):
        raise SnapshotError(
            f"on disk {disk.device} stands a block job or filter ({node['drv']})",
            cure="let it end or cancel it; if it is vmsnap's: vmsnap recover, vmsnap strays",
        )
    size = node["image"]["virtual-size"]
    if size != disk.size_bytes:
        raise SnapshotError(f"disk {disk.device} has {size} bytes now, not {disk.size_bytes}")
    top = graph.top_of(disk)
    if top is None:
        raise SnapshotError(f"the VM has no device {disk.handle['qdev']} with a medium any more")
    if top not in (wanted, names.filter, names.overlay):
        raise SnapshotError(
            f"disk {disk.device} is covered by the block node {top}",
            cure="let the block job end that put it there; if it is vmsnap's: vmsnap recover",
        )
