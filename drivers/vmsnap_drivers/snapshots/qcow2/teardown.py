"""Removing all that was made for a plan, whatever of it exists, whatever is left of its QEMU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vmsnap.errors import SnapshotError, VmGone
from vmsnap.model import Disk, SnapshotPlan
from vmsnap_drivers.qemu.blocks import overlay
from vmsnap_drivers.qemu.blocks.attempt import attempt
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.qemu.blocks.image import QemuImg
from vmsnap_drivers.qemu.blocks.salvage import salvage_overlay
from vmsnap_drivers.snapshots.qcow2 import bitmaps, changes, fleecing, record, server
from vmsnap_drivers.snapshots.qcow2.names import DiskNames, PlanNames


def remove_all(graph: BlockGraph | None, image: QemuImg, plan: SnapshotPlan, names: PlanNames) -> None:
    """Bring the block graph and the folders back to what they were. `graph` is None where QEMU is gone. Idempotent.

    What fails for one disk does not keep the others from being cleaned.

    :raises SnapshotError: something is left
    """
    disks = [(disk, own) for disk, own in zip(plan.disks, names.disks, strict=True) if not disk.read_only]
    if graph is not None:
        try:
            failures = _with_qemu(graph, image, disks, names)
        except VmGone:
            failures = _without_qemu(image, disks, names)
    else:
        failures = _without_qemu(image, disks, names)
    if failures:
        more = f"; and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise SnapshotError(f"of {plan.tag} something is left: {failures[0].message}{more}", cure=failures[0].cure)
    record.remove(names)


def _with_qemu(
    graph: BlockGraph, image: QemuImg, disks: list[tuple[Disk, DiskNames]], names: PlanNames
) -> list[SnapshotError]:
    failures = attempt(partial(_end_exports, graph, names))
    for disk, own in disks:
        failures += attempt(partial(_clean_disk, graph, image, disk, own))
    return failures


def _without_qemu(image: QemuImg, disks: list[tuple[Disk, DiskNames]], names: PlanNames) -> list[SnapshotError]:
    failures = attempt(partial(Path(names.socket).unlink, missing_ok=True))
    for disk, own in disks:
        failures += attempt(partial(fleecing.remove_files, own))
        if own.overlay_file:
            failures += attempt(partial(salvage_overlay, image, disk, own))
    return failures


def _end_exports(graph: BlockGraph, names: PlanNames) -> None:
    ours = {export for own in names.disks for export in (own.access, own.target)}
    lost = not Path(names.record).exists() and not Path(names.socket).exists()
    if lost and graph.exports() <= ours and _has_nodes(graph, names):
        # The state folder is lost. A plan refuses a server that it finds, and starts its own before it adds nodes.
        server.stop_unseen(graph)
    exports = graph.exports()
    for own in names.disks:
        for export in (own.access, own.target):
            if export in exports:
                graph.remove_export(export)
    server.stop(graph, Path(names.socket))


def _has_nodes(graph: BlockGraph, names: PlanNames) -> bool:
    return not graph.node_names().isdisjoint(name for own in names.disks for name in (own.target, own.image))


def _clean_disk(graph: BlockGraph, image: QemuImg, disk: Disk, own: DiskNames) -> None:
    if own.overlay_file:
        overlay.put_back(graph, [(disk, own)])
        disposable = overlay.is_pivoted(graph, disk, own)
        overlay.remove_unconnected(graph, disk, own)
        if disposable:
            overlay.remove_files(own)
    fleecing.take_down(graph, disk, own)
    fleecing.remove_files(own)
    changes.end_reading(graph, disk, own)
    bitmaps.remove_pending(graph, disk, own)
    bitmaps.let_go(graph, disk)
    if own.overlay_file:
        salvage_overlay(image, disk, own)
