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
    nodes = monitor.execute("query-named-block-nodes", {"flat": True})
    only_read = _only_read(monitor, {node["node-name"] for node in nodes if node.get("ro")})
    for node in nodes:
        if node.get("ro") or node.get("drv") in _NOT_DISKS or node["node-name"] in only_read:
            continue
        address = absolute(image_name(node), peer.cwd)
        identity = identity_of(address)
        if identity not in own and Path(address).parent != folder:
            raise HypervisorError(f"VM {vm!r} writes to {address}, which is none of its own disks")
        if identity in others:
            raise HypervisorError(f"VM {vm!r} writes to {address}, which is a disk of VM {others[identity]!r}")


def _only_read(monitor: Monitor, read_only: set[str]) -> set[str]:
    """The nodes that are used, and by nothing but `read_only` nodes: with ``auto-read-only``, which libvirt gives
    to all files, the file of a CD-ROM or of the firmware says itself that it could be written.

    ``x-debug-query-block-graph`` (``qapi/block-core.json``, 7.2 and 10.0) tells all users, devices and jobs included.
    """
    graph = monitor.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] if node["type"] == "block-driver" else "" for node in graph["nodes"]}
    users: dict[str, set[str]] = {}
    for edge in graph["edges"]:
        users.setdefault(names[edge["child"]], set()).add(names[edge["parent"]])
    return {name for name, above in users.items() if above <= read_only}


def _disks_of_others(known: Sequence[ProcessRecord], pid: int) -> dict[str | tuple[int, int], str]:
    return {
        identity_of(disk): entry.vm
        for entry in known
        if entry.pid != pid and start_time(entry.pid) == entry.pid_started
        for disk in entry.disks
    }
