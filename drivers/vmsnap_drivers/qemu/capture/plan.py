"""Chooses how to capture: by the shorter predicted pause, within what this VM and this host allow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.errors import CannotCapture, StorageFull
from vmsnap.model import CapturePlan, VmDescription, VmState, Window
from vmsnap.roles import CaptureRequest, DriverContext
from vmsnap_drivers.qemu import write_protection
from vmsnap_drivers.qemu.capture import precopy
from vmsnap_drivers.qemu.capture.cow import LEAVES_STOPPED_FROM, can_hold, may_trace, prepare_seconds
from vmsnap_drivers.qemu.capture.lost_pages import why_pages_would_be_lost
from vmsnap_drivers.qemu.huge_pages import survey
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import available_memory_bytes

# Seconds of pause, fitted to what benchmarks/pause.py and the tests of this driver measured (2 cores, TCG).
_COW_FIXED: Final = 0.004
_PROTECT_SMALL_PER_BYTE: Final = 0.0025 / (1 << 30)
_TOUCH_PER_BYTE: Final = 0.030 / (1 << 30)
_PRECOPY_FIXED: Final = 0.009
_PRECOPY_PER_BYTE: Final = 0.0005 / (1 << 30)
_ROOM_BESIDE_RAM_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True)
class Ways:
    """What can be done with a VM now, with the predicted pause of each; a `why_no_…` is empty where it can."""

    cow_seconds: float
    precopy_seconds: float
    held: bool
    collapsible_bytes: int
    why_no_cow: str
    why_no_precopy: str


def ways(monitor: Monitor, description: VmDescription, factors: Mapping[str, float]) -> Ways:
    """Look at the VM's memory and predict, with what was learned of earlier pauses.

    What can be put together into huge pages counts as such: copy on write does that first.
    """
    found = survey(monitor.peer_pid)
    held = can_hold(monitor.version, monitor.peer_pid)
    seconds = _COW_FIXED + (found.small_bytes - found.collapsible_bytes) * _PROTECT_SMALL_PER_BYTE
    if not held:
        seconds += description.memory_bytes * _TOUCH_PER_BYTE
    why_no_cow = write_protection.why_not(monitor.peer_pid)
    if not why_no_cow and monitor.version < LEAVES_STOPPED_FROM and not may_trace(monitor.peer_pid):
        why_no_cow = "a capture that breaks off would leave this QEMU stuck, and only root could free it"
    precopy_seconds = _PRECOPY_FIXED + description.memory_bytes * _PRECOPY_PER_BYTE
    return Ways(
        seconds * factors.get("cow", 1.0),
        precopy_seconds * factors.get("precopy", 1.0),
        held,
        found.collapsible_bytes,
        why_no_cow,
        why_pages_would_be_lost(monitor),
    )


def check(description: VmDescription) -> None:
    """See that the VM can be captured at all.

    :raises CannotCapture: something stands in the way
    """
    if description.refusals:
        raise CannotCapture(f"VM {description.vm!r} cannot be captured: {'; '.join(description.refusals)}")
    if description.state is VmState.ENDED:
        raise CannotCapture(f"VM {description.vm!r} has shut down")


def plan_capture(
    wanted: str,
    monitor: Monitor,
    description: VmDescription,
    request: CaptureRequest,
    factors: Mapping[str, float],
) -> CapturePlan:
    """Choose. `wanted` is the option ``capture``, `factors` what `learned` knows.

    :raises CannotCapture: the VM has something that cannot be captured, or not in the wanted way
    """
    check(description)
    if description.state is VmState.STOPPED:
        return _plan_stopped(monitor, description)
    possible = ways(monitor, description, factors)
    why_not = {"cow": possible.why_no_cow, "precopy": possible.why_no_precopy}
    why_not |= dict.fromkeys(request.without, "the guest writes too fast")
    if wanted != "auto" and why_not[wanted]:
        other = "precopy" if wanted == "cow" else "cow"
        raise CannotCapture(
            f"-o capture={wanted} cannot be: {why_not[wanted]}",
            cure="" if why_not[other] else f"use -o capture={other}",
        )
    if all(why_not.values()):
        raise CannotCapture(f"neither copy on write ({why_not['cow']}) nor pre-copy ({why_not['precopy']}) can be")
    auto = wanted == "auto"
    cow_is_shorter = bool(why_not["precopy"]) or possible.cow_seconds <= possible.precopy_seconds
    if wanted == "cow" or (auto and not why_not["cow"] and cow_is_shorter):
        how = "its pages touched before the pause" if possible.held else "its pages touched within the pause"
        instead = why_not["precopy"] or f"{possible.precopy_seconds * 1000:.0f} ms"
        reason = f"copy on write, {how}; pre-copy: {instead}"
        return CapturePlan(
            "cow",
            Window.FREE,
            True,
            possible.cow_seconds,
            reason,
            prepare_seconds=prepare_seconds(possible.collapsible_bytes),
            needs_worker=True,
            otherwise_seconds=None if not auto or why_not["precopy"] else possible.precopy_seconds,
        )
    instead = why_not["cow"] or f"{possible.cow_seconds * 1000:.0f} ms"
    reason = f"pre-copy; copy on write: {instead}"
    return CapturePlan(
        "precopy",
        Window.NO_BLOCK_JOBS,
        True,
        possible.precopy_seconds,
        reason,
        prepare_seconds=precopy.prepare_seconds(description.memory_bytes),
        lead_seconds=precopy.lead_seconds(request.max_pause_seconds),
        otherwise_seconds=None if not auto or why_not["cow"] else possible.cow_seconds,
    )


def _plan_stopped(monitor: Monitor, description: VmDescription) -> CapturePlan:
    """A VM that stands still is captured by copy on write where QEMU leaves it standing.

    Before 9.0 the guest runs after a background snapshot whether it ran before or not. An ordinary migration
    instead was tried on 7.2: it leaves the VM in ``postmigrate`` with its disks given up, and cannot be done twice.
    """
    if monitor.version < LEAVES_STOPPED_FROM:
        raise CannotCapture(
            f"VM {description.vm!r} stands still, and QEMU {'.'.join(map(str, monitor.version))} would make it run",
            cure="resume it and back it up live, shut it down, or use QEMU 9.0",
        )
    if why_not := write_protection.why_not(monitor.peer_pid):
        raise CannotCapture(f"VM {description.vm!r} stands still, and copy on write cannot be: {why_not}")
    return CapturePlan("cow", Window.FREE, True, 0.0, "the guest stands still already")


def choose_folder(context: DriverContext, vm: str, memory_bytes: int) -> Path:
    """The folder for the duplicate's own folder: `memory_dir`, or `spool_dir` where memory does not suffice.

    :raises StorageFull: no room
    """
    needed = memory_bytes + _ROOM_BESIDE_RAM_BYTES
    free = shutil.disk_usage(context.memory_dir).free
    limits = {f"{context.memory_dir} has free": free, "the host has available": available_memory_bytes()}
    if context.memory_budget_bytes is not None:
        limits["the memory budget leaves"] = context.memory_budget_bytes - used_bytes(context.memory_dir)
    name, least = min(limits.items(), key=lambda limit: limit[1])
    if least >= needed:
        return context.memory_dir
    if context.spool_dir is not None:
        context.spool_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        spool_free = shutil.disk_usage(context.spool_dir).free
        if spool_free >= needed:
            return context.spool_dir
        name, least = f"the spool folder {context.spool_dir} has free", spool_free
    raise StorageFull(
        f"the memory of VM {vm!r} needs {needed >> 20} MiB, {name} {max(0, least) >> 20} MiB",
        cure="discard duplicates, raise the memory budget, or allow a spool folder on a disk",
    )


def used_bytes(folder: Path) -> int:
    """What the files in and below a folder take."""
    return sum((Path(place) / name).lstat().st_blocks * 512 for place, _, names in os.walk(folder) for name in names)
