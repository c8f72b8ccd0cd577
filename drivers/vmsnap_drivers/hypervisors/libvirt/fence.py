"""Proves that a domain does not run, so that another may take its place.

Looked at are libvirt's own view, the process that the domain was at its last capture, all processes of this host (a
QEMU of that UUID may have slipped libvirt's memory), and QEMU's locks on the disks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmsnap.errors import Busy, HypervisorError, UnknownVm, VmsnapError
from vmsnap_drivers.hypervisors.libvirt.domain import Domain, address_of, disks_of, reached
from vmsnap_drivers.qemu.fence import is_written, show_ended
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress, is_libvirt_address
from vmsnap_drivers.qemu.libvirt.calls import Unreachable
from vmsnap_drivers.qemu.libvirt.process import process_of
from vmsnap_drivers.qemu.process import ProcessRecord, held

_KILL_SECONDS: Final = 30.0
_CURE: Final = "let it run, or kill it with --fence"


def fence(vm: str, uri: str, name: str, known: ProcessRecord | None, *, kill: bool) -> str:
    """Prove it; `known` is what was written down of the domain's process. See `Hypervisor.fence`.

    :raises Busy: it lives, and `kill` is not set
    :raises HypervisorError: it cannot be shown
    """
    if known is not None and not (is_libvirt_address(known.socket) and LibvirtAddress.parse(known.socket).uri == uri):
        known = None
    identity = LibvirtAddress.parse(known.socket).uuid if known is not None else ""
    proofs, disks = [], set(known.disks if known is not None else ())
    try:
        with reached(uri) as domains:
            domain = domains.find(name)
            proofs.append(_by_libvirt(vm, domain, kill=kill))
            identity = domain.uuid
            disks |= {address_of(disk) for disk in disks_of(domain.tree()) if disk.find("readonly") is None}
    except (UnknownVm, Unreachable) as e:
        if known is None:
            raise HypervisorError(
                f"it cannot be shown that VM {vm!r} does not run: {e.message}, and it was never captured",
                cure="a VM whose process vmsnap has never seen could run all the same",
            ) from e
    if known is not None:
        proofs.append(show_ended(vm, known, kill=kill))
    proofs.append(_by_processes(vm, identity, kill=kill))
    files = sorted(disk for disk in disks if disk.startswith("/"))
    for disk in files:
        if is_written(Path(disk)):
            raise Busy(f"another process has {disk} of VM {vm!r} open for writing", cure="end it first")
    if files:
        proofs.append(f"nobody writes to its {len(files)} disk{'s' if len(files) > 1 else ''}")
    return ", ".join(proofs)


def _by_libvirt(vm: str, domain: Domain, *, kill: bool) -> str:
    if domain.is_active():
        if not kill:
            raise Busy(f"VM {vm!r} is running, says libvirt", cure=_CURE)
        try:
            domain.call("ending it", lambda handle: handle.destroyFlags(0))
        except VmsnapError:
            # It has ended by itself, or its process is looked at below.
            if domain.is_active():
                raise
        return "libvirt has ended it"
    if domain.was_migrated():
        raise HypervisorError(f"VM {vm!r} was migrated to another host, and may run there", cure="fence it there")
    return "libvirt says that it does not run"


def _by_processes(vm: str, identity: str, *, kill: bool) -> str:
    """A QEMU of the domain's UUID on this host, whatever libvirt says."""
    pid = process_of(identity)
    if pid is None:
        return f"no QEMU of UUID {identity} is on this host"
    with held(pid) as process:
        if process is not None and not process.has_ended():
            if not kill:
                raise Busy(f"VM {vm!r} is running: its process {pid} lives", cure=_CURE)
            process.kill(_KILL_SECONDS)
    return f"its process {pid} was killed and has ended"
