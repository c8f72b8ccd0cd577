"""Whether QEMU VMs can be captured on this host, and one VM in particular."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding, VmDescription, VmState
from vmsnap.roles import DriverContext, Program
from vmsnap_drivers.qemu import write_protection
from vmsnap_drivers.qemu.capture.plan import ways
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import available_memory_bytes, file_system_of, is_memory_file_system

_BINARIES: Final = ("qemu-system-x86_64", "qemu-system-aarch64", "qemu-kvm", "kvm")
QEMU: Final = Program(_BINARIES, "apt install qemu-system-x86")
_VERSION_SECONDS: Final = 10
_NOBODY: Final = 65534


def look_at_host(context: DriverContext) -> Iterator[Finding]:
    """QEMU itself, userfaultfd, huge pages, room for memory."""
    found = [path for name in _BINARIES if (path := shutil.which(name))]
    for path in found:
        yield Finding("QEMU", "ok", f"{path} {_version(path)}")
    if not found:
        yield Finding("QEMU", "note", "no qemu-system-* in PATH", "apt install qemu-system-x86")
    yield _userfaultfd()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists() and "[never]" in pages.read_text():
        cure = f"echo madvise > {pages}"
        yield Finding("huge pages", "note", "transparent huge pages are off, so pauses are longer", cure)
    else:
        yield Finding("huge pages", "ok", "transparent huge pages are on")
    yield _memory_folder(context)


def look_at_vm(
    vm: str,
    connect: Callable[[], Monitor],
    describe: Callable[[Monitor], VmDescription],
    wanted: str,
    factors: Mapping[str, float],
) -> Sequence[Finding]:
    """Whether this VM answers and can be captured, and what pause to expect."""
    try:
        with connect() as monitor:
            description = describe(monitor)
            if description.refusals:
                return [Finding(f"VM {vm}", "missing", reason) for reason in description.refusals]
            version = f"QEMU {description.hypervisor_version}"
            if description.state is not VmState.EXECUTING:
                return [Finding(f"VM {vm}", "ok", f"{version} answers, the guest stands still")]
            possible = ways(monitor, description, factors)
    except VmsnapError as e:
        return [Finding(f"VM {vm}", "missing", e.message, e.cure)]
    findings = [Finding(f"VM {vm}", "ok", f"{version} answers")]
    for name, way, why_not, seconds in (
        ("cow", "copy on write", possible.why_no_cow, possible.cow_seconds),
        ("precopy", "pre-copy", possible.why_no_precopy, possible.precopy_seconds),
    ):
        if why_not:
            findings.append(Finding(f"VM {vm}: {way}", "missing" if wanted == name else "note", why_not))
        else:
            message = f"predicted pause {seconds * 1000:.0f} ms and the disks'"
            findings.append(Finding(f"VM {vm}: {way}", "ok", message))
    return findings


def _version(path: str) -> str:
    try:
        answer = subprocess.run(
            [path, "-version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "does not start"
    found = re.search(r"version (\S+)", answer.stdout)
    return found[1] if found else "says no version"


def _userfaultfd() -> Finding:
    if lacking := write_protection.what_the_kernel_lacks():
        return Finding("userfaultfd", "note", f"{lacking}: no copy on write, pre-copy works")
    if not write_protection.why_not_for(_NOBODY):
        return Finding("userfaultfd", "ok", "open to all users")
    return Finding(
        "userfaultfd",
        "note",
        "open to QEMUs of root only; others are captured by pre-copy",
        "sysctl vm.unprivileged_userfaultfd=1",
    )


def _memory_folder(context: DriverContext) -> Finding:
    folder = context.memory_dir
    kind = file_system_of(folder)
    if not is_memory_file_system(kind):
        return Finding("memory for duplicates", "missing", f"{folder} lies on {kind}", "choose a folder on a tmpfs")
    place = folder if folder.exists() else folder.parent
    free = min(shutil.disk_usage(place).free, available_memory_bytes()) if place.exists() else 0
    return Finding("memory for duplicates", "ok", f"{free >> 20} MiB in {folder}")
