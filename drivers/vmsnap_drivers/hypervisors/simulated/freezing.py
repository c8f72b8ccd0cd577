"""What is made to hold the disks of a simulated VM, and how it goes away: with its VM, or where that is gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vmsnap import durable
from vmsnap.errors import HypervisorError, ProtocolError, StorageFull, VmGone
from vmsnap.model import Disk, FreezePlan, Moment, OwnedResource, check_name, from_json, to_json
from vmsnap_drivers.hypervisors.simulated import record
from vmsnap_drivers.hypervisors.simulated.disks import DiskImage, open_disk
from vmsnap_drivers.hypervisors.simulated.overlay import Overlay, make_overlay

FOLDER = "freezes"
KIND = "overlay"
_PART = 50
"""2 % of a disk are the room that its overlay must find, and half of that is too little."""

Call = Callable[..., dict[str, Any]]
"""Tells the VM's process something, and returns its answer."""


def plan(vm: str, disks: Sequence[Disk], tag: str, folder: Path) -> FreezePlan:
    """Name an overlay beside each disk, and a record of the plan in `folder`.

    :raises StorageFull: there is no room for what the guest may write
    """
    check_name(tag, "tag")
    files = [str(Path(disk.address).parent / f"{tag}~{index}~overlay") for index, disk in enumerate(disks)]
    for disk, file in zip(disks, files, strict=True):
        _check_room(disk, Path(file).parent, 1)
    return FreezePlan(tag, vm, tuple(disks), {"files": files, "record": str(folder / f"{tag}.json")})


def prepare(plan: FreezePlan) -> None:
    """Make the overlays, empty; the record first.

    :raises HypervisorError: one cannot be made
    """
    note = _record_of(plan)
    try:
        durable.make_folder(note.parent)
        note.write_text(to_json(plan))
        durable.sync(note)
        durable.sync(note.parent)
        for disk, file in zip(plan.disks, _files(plan), strict=True):
            make_overlay(file, disk.size_bytes)
    except OSError as e:
        raise HypervisorError(f"{e.filename} cannot be made: {e.strerror}") from e


def freeze(plan: FreezePlan, call: Call) -> Moment:
    """Let the guest write to the overlays from now on."""
    reply = call("freeze", overlays=_overlays(plan))
    return Moment("freeze", reply["wall_ns"], reply["monotonic_ns"], "simulated:FREEZE")


def check(plan: FreezePlan, call: Call) -> None:
    """See that it does, and that there is room.

    :raises HypervisorError: it does not
    :raises StorageFull: there is not
    """
    there = {disk["device"]: disk["overlay"] for disk in call("status")["disks"]}
    for disk, file in zip(plan.disks, _files(plan), strict=True):
        if there.get(disk.device) != str(file):
            raise HypervisorError(f"disk {disk.device} was thawed by somebody else while its snapshot was taken")
        _check_room(disk, file.parent, 2)


def thaw(plan: FreezePlan, call: Call, socket: Path) -> None:
    """Put the overlays back, in the VM where it lives, and remove them. Idempotent.

    :raises HypervisorError: one cannot be put back now; it is as it was
    """
    if record.alive(socket):
        try:
            call("thaw", overlays=_overlays(plan))
        except VmGone:
            _put_back(plan)
        else:
            _remove_empty(plan)
    else:
        _put_back(plan)
    note = _record_of(plan)
    durable.remove(*_files(plan), note)
    with contextlib.suppress(OSError):  # it is not there, or others are in it
        note.parent.rmdir()


def list_owned(driver: str, folder: Path) -> list[OwnedResource]:
    """The overlays that exist of the plans recorded in `folder`."""
    plans = [from_json(path.read_bytes(), FreezePlan) for path in sorted(folder.glob("*.json"))]
    return [
        OwnedResource(KIND, str(file), plan.tag, driver) for plan in plans for file in _files(plan) if file.exists()
    ]


def plan_of(owned: OwnedResource, folder: Path) -> FreezePlan | None:
    """The recorded plan in which something that `list_owned` has named was made."""
    path = folder / f"{check_name(owned.tag, 'tag')}.json"
    return from_json(path.read_bytes(), FreezePlan) if path.exists() else None


def _put_back(plan: FreezePlan) -> None:
    for disk, file in zip(plan.disks, _files(plan), strict=True):
        if not file.exists():
            continue
        base = open_disk(DiskImage(disk.device, disk.address))  # locked: no VM has it
        try:
            overlay = Overlay(file, base.descriptor)
            try:
                if not overlay.is_empty():
                    overlay.check_newer()
                    overlay.commit()
            finally:
                overlay.close()
        finally:
            os.close(base.descriptor)


def _remove_empty(plan: FreezePlan) -> None:
    """What the VM did not know of was never connected, so that nothing is in it; or its VM died and came again."""
    for file in _files(plan):
        if file.exists():
            overlay = Overlay(file, -1)
            try:
                if not overlay.is_empty():
                    raise HypervisorError(
                        f"the overlay {file} with the guest's last writes is kept: its VM was started without it",
                        cure=f"to give them up: delete {file}",
                    )
            finally:
                overlay.close()


def _check_room(disk: Disk, folder: Path, share: int) -> None:
    room = os.statvfs(folder)
    needed = disk.size_bytes // _PART // share
    if room.f_bavail * room.f_frsize < needed:
        raise StorageFull(
            f"no room for what the guest writes to {disk.device} in {folder}: {needed} bytes are needed",
            cure="make room there, or back it up without --freeze",
        )


def _overlays(plan: FreezePlan) -> list[dict[str, str]]:
    return [{"device": disk.device, "path": str(file)} for disk, file in zip(plan.disks, _files(plan), strict=True)]


def _files(plan: FreezePlan) -> list[Path]:
    """The plan's overlays; refuses a plan that names others than ours, since they will be deleted."""
    files = [Path(name) for name in plan.data["files"]]
    for index, file in enumerate(files):
        if file.name != f"{plan.tag}~{index}~overlay" or not file.is_absolute():
            raise ProtocolError(f"the freeze {plan.tag!r} names {file}, which is no overlay of it")
    return files


def _record_of(plan: FreezePlan) -> Path:
    path = Path(plan.data["record"])
    if path.name != f"{plan.tag}.json" or path.parent.name != FOLDER:
        raise ProtocolError(f"the freeze {plan.tag!r} names {path}, which is no record of it")
    return path
