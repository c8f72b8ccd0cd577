"""Frozen disks: overlays take what the guest writes, while slow snapshots are taken of the disks below them.

The block layer's part is `blocks.overlay`, and what becomes of an overlay whose QEMU is gone `blocks.salvage`. Here is
what is made for a plan, and how it goes away. A record of each plan lies in vmsnap's state folder, so that overlays are
found by their tag when the journal is lost.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2s
from pathlib import Path
from typing import Final

from vmsnap import durable
from vmsnap.errors import (
    Busy,
    HypervisorError,
    ProtocolError,
    SnapshotError,
    UnknownVm,
    UsageError,
    VmGone,
    VmsnapError,
)
from vmsnap.model import Disk, FreezePlan, Moment, OwnedResource, check_name, from_json, to_json
from vmsnap_drivers.qemu.blocks import overlay
from vmsnap_drivers.qemu.blocks.attempt import attempt
from vmsnap_drivers.qemu.blocks.checks import check_disk
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.qemu.blocks.image import QemuImg
from vmsnap_drivers.qemu.blocks.overlay import OverlayNames
from vmsnap_drivers.qemu.blocks.room import check_room, choose_folder, needed_bytes, owner_for
from vmsnap_drivers.qemu.blocks.salvage import salvage_overlay
from vmsnap_drivers.qemu.monitor import Monitor

FOLDER: Final = "freezes"
"""Where the records are, below what a driver keeps of its VMs; and overlays of disks that are no files."""
KIND: Final = "overlay"
_IMAGE: Final = QemuImg("qemu-img")
_MIB: Final = 1024 * 1024
_LOW_PART: Final = 4
"""When so much of the room that was needed at the beginning is left, the freeze is given up: QEMU stops a guest whose
write finds no room.
"""
_NO_ROOM: Final = "io-error"
"""The state of a VM that QEMU has stopped for that (``RunState``, qapi/run-state.json)."""


@dataclass(frozen=True)
class FreezeNames:
    """What is made for one plan: the monitor through which, an overlay for each disk, and the record."""

    monitor: str
    disks: tuple[OverlayNames, ...]
    record: str

    @classmethod
    def of(cls, plan: FreezePlan) -> FreezeNames:
        """Read the names from a plan.

        :raises ProtocolError: it is another driver's, or not whole
        """
        try:
            names = from_json(to_json(plan.data), cls)
        except ValueError as e:
            raise ProtocolError(f"the freeze {plan.tag} has lost its names: {e}") from e
        if len(names.disks) != len(plan.disks):
            raise ProtocolError(f"the freeze {plan.tag} names {len(names.disks)} of {len(plan.disks)} disks")
        return names


def plan_freeze(
    vm: str, monitor: Monitor, disks: Sequence[Disk], tag: str, folder: Path, spool: Path | None
) -> FreezePlan:
    """Name the overlays: each beside its disk, or, where that is no file, in `spool`, else `folder`. Changes nothing.

    :raises SnapshotError: a disk is not raw, not as it was described, or covered; or there is no room
    :raises DriverUnavailable: qemu-img is not installed
    """
    _IMAGE.require()
    short = f"{check_name(tag, 'tag')[:7]}{blake2s(tag.encode(), digest_size=5).hexdigest()}"
    graph, chosen, folders = BlockGraph(monitor), [], []
    for number, disk in enumerate(disks):
        if disk.format != "raw" or disk.read_only or not all(disk.handle.get(key) for key in ("node", "qdev", "file")):
            raise SnapshotError(
                f"disk {disk.device} ({disk.format}) cannot be frozen: only raw disks that QEMU knows by a node can",
                cure="choose the mechanism qcow2 for it, which needs no freeze",
            )
        place = choose_folder(disk, None, spool or folder)
        # A letter, so that these are never taken for nodes of the mechanism qcow2, which has the same tag.
        node = f"{short}-f{number}"
        own = OverlayNames(
            overlay=f"{node}-overlay",
            image=f"{node}-image",
            commit_job=f"{node}-commit",
            overlay_file=str(place / f"{tag}.{number}.frozen.qcow2"),
            filter="",
        )
        check_disk(graph, disk, own)
        chosen.append(own)
        folders.append(place)
    check_room(disks, folders)
    names = FreezeNames(monitor.address, tuple(chosen), str(folder / f"{tag}.json"))
    return FreezePlan(tag, vm, tuple(disks), {**vars(names), "disks": [vars(own) for own in names.disks]})


def prepare(plan: FreezePlan, monitor: Monitor, open_way: Callable[[Path], None]) -> None:
    """Make the overlays, which nothing uses yet.

    :param open_way: sees to it that QEMU gets to a file, whose folder is there
    :raises SnapshotError: one cannot be made, or QEMU may not open it
    """
    names = FreezeNames.of(plan)
    graph = BlockGraph(monitor)
    # From now on the folder of records stays.
    _write_record(plan, Path(names.record))
    for own in names.disks:
        open_way(Path(own.overlay_file))
    for disk, own in zip(plan.disks, names.disks, strict=True):
        backing = (disk.handle["file"], disk.format)
        _IMAGE.create(Path(own.overlay_file), disk.size_bytes, owner=owner_for(disk, monitor.peer_pid), backing=backing)
        overlay.add_overlay(graph, disk, own)


def freeze(plan: FreezePlan, monitor: Monitor) -> Moment:
    """Connect the guest's devices to the overlays, in one round trip.

    :raises SnapshotError: QEMU refused, or the guest executes
    """
    names = FreezeNames.of(plan)
    connections = [(disk, own.overlay) for disk, own in zip(plan.disks, names.disks, strict=True)]
    if BlockGraph(monitor).connect_all(connections):
        raise SnapshotError(f"the VM {plan.vm} executes: its disks would not show one instant")
    return Moment.now("freeze")


def check(plan: FreezePlan, monitor: Monitor) -> None:
    """See that the guest still writes to its overlays, and that there is room.

    :raises SnapshotError: it does not, there is not, or QEMU has stopped the guest for want of room
    """
    names = FreezeNames.of(plan)
    graph = BlockGraph(monitor)
    for disk, own in zip(plan.disks, names.disks, strict=True):
        if graph.top_of(disk) != own.overlay:
            raise SnapshotError(
                f"disk {disk.device} was taken off its overlay by somebody else while its snapshot was taken",
                cure="let no other program work on the VM's disks meanwhile",
            )
        folder = Path(own.overlay_file).parent
        room = os.statvfs(folder)
        free, least = room.f_bavail * room.f_frsize, needed_bytes(disk) // _LOW_PART
        if free < least:
            raise SnapshotError(
                f"the room for what the guest writes to disk {disk.device} is running out: {free // _MIB} MiB are left"
                f" in {folder}; the snapshot took too long",
                cure="make room there, or back it up without --freeze",
            )
    if graph.call("query-status")["status"] == _NO_ROOM:
        raise SnapshotError(f"QEMU has stopped VM {plan.vm!r}: a write to an overlay failed", cure="make room there")


def thaw(plan: FreezePlan) -> None:
    """Put the overlays back and remove them, with or without their QEMU. Idempotent.

    What fails for one disk does not keep the others from being thawed.

    :raises SnapshotError: something is left; the message says what to do
    """
    names = FreezeNames.of(plan)
    disks = list(zip(plan.disks, names.disks, strict=True))
    try:
        with Monitor.borrow(names.monitor) as monitor:
            failures = _with_qemu(BlockGraph(monitor), disks)
    except (VmGone, UnknownVm):
        failures = [found for disk, own in disks for found in attempt(partial(salvage_overlay, _IMAGE, disk, own))]
    except (Busy, UsageError, HypervisorError) as e:
        raise SnapshotError(e.message, cure=e.cure) from e
    if failures:
        more = f"; and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise SnapshotError(f"of {plan.tag} something is left: {failures[0].message}{more}", cure=failures[0].cure)
    durable.remove(Path(names.record))
    with contextlib.suppress(OSError):  # it is not there, or others are in it
        Path(names.record).parent.rmdir()


def list_owned(driver: str, folder: Path) -> list[OwnedResource]:
    """The overlays that exist of all plans recorded in `folder`, each under the name of its file."""
    found = []
    for path in sorted(folder.glob("*.json")):
        plan = _read_record(path)
        if plan is None:
            found.append(OwnedResource("record", str(path), path.stem, driver))
            continue
        for own in FreezeNames.of(plan).disks:
            for name in (own.overlay_file, own.committing_file, own.pivoting_file):
                if Path(name).exists():
                    found.append(OwnedResource(KIND, name, plan.tag, driver))
    return found


def thaw_owned(owned: OwnedResource, folder: Path) -> None:
    """Thaw the plan of an overlay that `list_owned` has named.

    :raises SnapshotError: as `thaw`
    """
    plan = _read_record(folder / f"{owned.tag}.json")
    if plan is not None:
        thaw(plan)


def _with_qemu(graph: BlockGraph, disks: Sequence[tuple[Disk, OverlayNames]]) -> list[SnapshotError]:
    # Abreast where all goes well, so that the overlays' lives are short; then each for itself, for what did not.
    attempt(partial(overlay.put_back, graph, disks))
    failures = [found for disk, own in disks for found in attempt(partial(_thaw_disk, graph, disk, own))]
    # A guest that QEMU has stopped because an overlay found no room goes on where there is some now.
    if graph.call("query-status")["status"] == _NO_ROOM:
        failures += attempt(partial(graph.call, "cont"))
    return failures


def _thaw_disk(graph: BlockGraph, disk: Disk, own: OverlayNames) -> None:
    overlay.put_back(graph, [(disk, own)])
    disposable = overlay.is_pivoted(graph, disk, own)
    overlay.remove_unconnected(graph, disk, own)
    if disposable:
        overlay.remove_files(own)
    salvage_overlay(_IMAGE, disk, own)


def _write_record(plan: FreezePlan, path: Path) -> None:
    try:
        durable.create(path, to_json(plan))
    except OSError as e:
        raise SnapshotError(f"the record {path} cannot be written: {e.strerror}") from e


def _read_record(path: Path) -> FreezePlan | None:
    try:
        plan = from_json(path.read_bytes(), FreezePlan)
        FreezeNames.of(plan)
    except (OSError, ValueError, VmsnapError):
        return None
    return plan
