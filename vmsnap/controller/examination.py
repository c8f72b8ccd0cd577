"""What ``vmsnap doctor`` looks at: the host, every installed driver, one VM. Nothing is changed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from vmsnap import registry
from vmsnap.controller.capture import choose_mechanisms
from vmsnap.controller.drivers import Drivers
from vmsnap.errors import VmsnapError
from vmsnap.host import HostFolders
from vmsnap.journal import Journal
from vmsnap.model import Finding, OwnedResource
from vmsnap.roles import CaptureRequest, Hypervisor
from vmsnap.vmtable import VmRow


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
    for disk in choose_mechanisms(drivers, description.disks, row.disks):
        found.append(Finding(disk.device, "ok", f"{disk.address}, snapshots by {disk.mechanism or 'none: read-only'}"))
    plan = driver.plan_capture(CaptureRequest("doctor", 5.0))
    expected = "" if plan.predicted_pause_seconds is None else f", about {plan.predicted_pause_seconds * 1e3:.0f} ms"
    found.append(Finding("capture", "ok", f"{plan.capture}{expected}: {plan.reason}"))
    return found


def _state(folders: HostFolders, journal: Journal) -> list[Finding]:
    state = shutil.disk_usage(folders.state_dir).free
    memory = shutil.disk_usage(folders.memory_dir).free
    found = [
        Finding("state folder", "ok", f"{folders.state_dir}, {state >> 20} MiB free"),
        Finding("memory folder", "ok", f"{folders.memory_dir}, {memory >> 20} MiB free for duplicates"),
    ]
    left = [row for row in journal.unfinished() if not (row.outcome is None and row.worker_alive())]
    if left:
        vms = ", ".join(sorted({row.vm for row in left}))
        found.append(
            Finding("journal", "note", f"{len(left)} operations left something (VMs: {vms})", "run: vmsnap recover")
        )
    return found
