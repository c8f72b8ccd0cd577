"""Sees that a loaded VM writes to its own disks and to nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk
from vmsnap_drivers.qemu.image_names import absolute, identity_of, image_name
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import look_at, start_time
from vmsnap_drivers.qemu.process import ProcessRecord

_NOT_DISKS: Final = frozenset(["null-co", "null-aio"])


def check(vm: str, monitor: Monitor, disks: Sequence[Disk], folder: Path, known: Sequence[ProcessRecord]) -> None:
    """Ask QEMU for every block node that can be written, whether a device uses it or not, and compare its file with
    `disks` (what lies in the VM's own `folder` is its own, too), and with the disks of all other VMs that are `known`.
    Files are compared by what they are, not by their names.

    :raises HypervisorError: one is no disk of this VM, or another's
    """
    peer = look_at(monitor.peer_pid)
    others = _disks_of_others(known, monitor.peer_pid)
    own = {identity_of(disk.address) for disk in disks}
    for node in monitor.execute("query-named-block-nodes", {"flat": True}):
        if node.get("ro") or node.get("drv") in _NOT_DISKS:
            continue
        address = absolute(image_name(node), peer.cwd)
        identity = identity_of(address)
        if identity not in own and Path(address).parent != folder:
            raise HypervisorError(f"VM {vm!r} writes to {address}, which is none of its own disks")
        if identity in others:
            raise HypervisorError(f"VM {vm!r} writes to {address}, which is a disk of VM {others[identity]!r}")


def _disks_of_others(known: Sequence[ProcessRecord], pid: int) -> dict[str | tuple[int, int], str]:
    return {
        identity_of(disk): entry.vm
        for entry in known
        if entry.pid != pid and start_time(entry.pid) == entry.pid_started
        for disk in entry.disks
    }
