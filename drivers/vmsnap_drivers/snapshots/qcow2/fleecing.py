"""Fleecing: the guest goes on with its own disk, and what it overwrites is copied away before.

A filter ``copy-before-write`` is put between the guest's device and its disk; the snapshot is read through a node
``snapshot-access`` above it, from the copied blocks where there are any, else from the disk.

The job ``blockdev-backup`` would put in the same filter, but one that fails the *guest's write* when the copy fails,
for which the device's default is to stop the VM (tried with a full target, QEMU 7.2 and 10.0). The filter of our own
has ``on-cbw-error=break-snapshot`` and a time limit for a copy (``cbw-timeout``, since QEMU 7.1): what breaks is the
snapshot. Connecting all devices to theirs takes one round trip.
"""

from __future__ import annotations

from pathlib import Path

from vmsnap.durable import remove
from vmsnap.model import Disk
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.snapshots.qcow2.names import DiskNames


def add_filter(graph: BlockGraph, disk: Disk, names: DiskNames, copy_seconds: int) -> None:
    """Add the filter above the disk, and the target that takes the old blocks; the target's file is there and empty.
    The guest's device is not connected to it yet.

    :param copy_seconds: how long a write of the guest's may wait for its block to be copied
    :raises SnapshotError: QEMU refused
    """
    target: dict[str, object] = {
        "driver": "qcow2",
        "node-name": names.target,
        "file": {"driver": "file", "filename": names.target_file},
        # What is in the target is worth nothing after a crash.
        "cache": {"no-flush": True},
    }
    graph.add(target)
    graph.add(
        {
            "driver": "copy-before-write",
            "node-name": names.filter,
            "file": disk.handle["node"],
            "target": names.target,
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": copy_seconds,
        }
    )


def export(graph: BlockGraph, disk: Disk, names: DiskNames) -> None:
    """Make the content at the instant readable, and the target, for `Qcow2Reader.extents`. A disk that nobody writes
    is read as it is.

    :raises SnapshotError: QEMU refused
    """
    if disk.read_only:
        graph.add_export(names.access, disk.handle["node"])
        return
    graph.add({"driver": "snapshot-access", "node-name": names.access, "file": names.filter})
    graph.add_export(names.access, names.access)
    graph.add_export(names.target, names.target)


def take_down(graph: BlockGraph, disk: Disk, names: DiskNames) -> None:
    """Connect the guest's device to its disk again and remove the nodes, whatever of them is there. Idempotent.

    :raises SnapshotError: QEMU refused; a later call tries again
    """
    nodes = graph.node_names()
    if names.access in nodes:
        graph.remove(names.access)
    if names.filter in nodes:
        if graph.top_of(disk) == names.filter:
            graph.connect(disk, disk.handle["node"])
        graph.remove(names.filter)
    if names.target in nodes:
        graph.remove(names.target)


def remove_files(names: DiskNames) -> None:
    """Remove the target's file; succeeds where there is none."""
    remove(Path(names.target_file))
