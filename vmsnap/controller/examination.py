"""What ``vmsnap doctor`` looks at: the host, every installed driver, one VM. Nothing is changed."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmsnap import registry
from vmsnap.controller.choosing import by_mechanism, choose_mechanisms
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.hostclock import is_synchronised
from vmsnap.errors import VmsnapError
from vmsnap.host import HostFolders
from vmsnap.journal import Journal
from vmsnap.model import CapturePlan, Disk, Finding, OwnedResource
from vmsnap.roles import CaptureRequest, Hypervisor
from vmsnap.vmtable import VmRow

_LITTLE_BYTES: Final = 256 << 20
_TOO_LITTLE_BYTES: Final = 16 << 20
"""Of the file system that has the database: where it is full, nothing can be entered, and so nothing begun."""


def examine_host(
    folders: HostFolders, drivers: Drivers, journal: Journal, strays: Sequence[OwnedResource]
) -> list[tuple[str, Finding]]:
    """The state folder, what crashes left, and what each installed driver says of this host."""
    found = [("vmsnap", finding) for finding in _state(folders, journal)]
    if strays:
        what = f"{len(strays)} things carry our tag, and the database of this host does not know them"
        found.append(("vmsnap", Finding("strays", "note", what, "see: vmsnap strays")))
    for known in registry.installed():
        if known.driver is None:
            found.append((known.name, Finding("driver", "missing", known.problem)))
            continue
        try:
            if known.kind == "hypervisor":
                found += [(known.name, f) for f in drivers.hypervisor_of_host(known.name, "doctor").doctor()]
            elif known.kind == "snapshot mechanism":
                found += [(known.name, f) for f in drivers.mechanism(known.name).doctor()]
            else:
                found.append((known.name, Finding("driver", "ok", f"can be loaded, version {known.version}")))
        except VmsnapError as e:
            found.append((known.name, Finding("driver", "missing", e.message, e.cure)))
    return found


def examine_vm(row: VmRow, drivers: Drivers) -> list[tuple[str, Finding]]:
    """Whether a backup of this VM would work: reachable, capturable, every disk handled, room for the duplicate."""
    found: list[tuple[str, Finding]] = []
    driver = drivers.hypervisor(row.hypervisor, row.vm, row.options)
    try:
        found += [(row.hypervisor, finding) for finding in driver.doctor()]
        found += [(row.hypervisor, finding) for finding in _capture(row, drivers, driver)]
    except VmsnapError as e:
        found.append((row.hypervisor, Finding(row.vm, "missing", e.message, e.cure)))
    finally:
        driver.close()
    return found


def _capture(row: VmRow, drivers: Drivers, driver: Hypervisor) -> list[Finding]:
    description = driver.describe()
    found = [Finding(row.vm, "ok", f"{description.state.value}, {description.memory_bytes >> 20} MiB of memory")]
    found += [Finding(row.vm, "missing", refusal, "it cannot be backed up live so") for refusal in description.refusals]
    plan = driver.plan_capture(CaptureRequest("doctor", 5.0))
    chosen = choose_mechanisms(drivers, description.disks, row.disks)
    for disk in chosen:
        found.append(Finding(disk.device, "ok", f"{disk.address}, snapshots by {disk.mechanism or 'none: read-only'}"))
    for name, its in by_mechanism(description.disks, chosen).items():
        found += _snapshots(row.vm, drivers, name, its, plan)
    expected = "" if plan.predicted_pause_seconds is None else f", about {plan.predicted_pause_seconds * 1e3:.0f} ms"
    found.append(Finding("capture", "ok", f"{plan.capture}{expected}: {plan.reason}"))
    return found


def _snapshots(vm: str, drivers: Drivers, name: str, disks: Sequence[Disk], plan: CapturePlan) -> list[Finding]:
    """What the mechanism says against a snapshot of these disks now, such as that there is no room for it."""
    mechanism = drivers.mechanism(name)
    try:
        mechanism.plan(vm, disks, f"vmsnap-{secrets.token_hex(5)}", plan.window)
    except VmsnapError as e:
        return [Finding(" ".join(disk.device for disk in disks), "missing", e.message, e.cure)]
    finally:
        mechanism.close()
    return []


def _state(folders: HostFolders, journal: Journal) -> list[Finding]:
    memory = shutil.disk_usage(folders.memory_dir).free
    found = [
        _room("state folder", folders.state_dir),
        Finding("memory folder", "ok", f"{folders.memory_dir}, {memory >> 20} MiB free for duplicates"),
        _clock(),
    ]
    left = [row for row in journal.unfinished() if not (row.outcome is None and row.worker_alive())]
    if left:
        vms = ", ".join(sorted({row.vm for row in left}))
        found.append(
            Finding("journal", "note", f"{len(left)} operations left something (VMs: {vms})", "run: vmsnap recover")
        )
    return found


def _room(subject: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free >> 20} MiB free"
    if free >= _LITTLE_BYTES:
        return Finding(subject, "ok", text)
    return Finding(subject, "missing" if free < _TOO_LITTLE_BYTES else "note", text, "make room on its file system")


def _clock() -> Finding:
    try:
        if is_synchronised():
            return Finding("clock", "ok", "is kept right, as the kernel says")
    except OSError as e:
        return Finding("clock", "note", f"nobody can tell whether it is right: {e.strerror}")
    what = "nobody keeps it right, as the kernel says; backups are dated by it, and pruned by their dates"
    return Finding("clock", "note", what, "run an NTP client, such as systemd-timesyncd or chrony")
