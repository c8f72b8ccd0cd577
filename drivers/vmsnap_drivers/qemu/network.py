"""Cuts a VM off from every network, and proves it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap.model import Nic
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.networks import Network, networks

_INTERFACES: Final = Path("/sys/class/net")
_UP: Final = 0x1
"""``IFF_UP``, netdevice(7)."""


def cut(monitor: Monitor) -> tuple[Nic, ...]:
    """Set the link of every network backend and NIC down, and ask afterwards what each NIC is connected to; idempotent.

    The backend is what counts: virtio-net computes the NIC's own flag anew from the guest's state. With a backend down
    nothing it receives reaches the guest, and nothing the guest sends reaches it (``qemu_sendv_packet``,
    ``net/net.c``). A VM that was loaded isolated has backends besides that lead nowhere: hubs with one port, TAPs of
    its own that are down and on no bridge.

    :raises HypervisorError: a link could not be set down, or a NIC is not among those that QEMU tells of
    """
    found = networks(monitor)
    for network in found:
        for name in (network.backend, network.nic):
            if name:
                monitor.execute("set_link", {"name": name, "up": False})
    again = networks(monitor)
    if {(n.nic, n.backend) for n in again} != {(n.nic, n.backend) for n in found}:
        raise HypervisorError(f"the networks of the QEMU at {monitor.path} changed while they were cut")
    told = {n.nic for n in again if n.nic}
    for entry in monitor.execute("query-rx-filter"):
        if entry["name"] not in told:
            raise HypervisorError(f"it cannot be shown that the network of NIC {entry['name']!r} is cut")
    return tuple(Nic(n.nic, n.mac, _leads_to(n), False) for n in again if n.nic)


def _leads_to(network: Network) -> str:
    if network.kind == "hubport":
        return "a hub with no other port" if not network.details else f"hubport beside {network.details}, link down"
    name = re.search(r"\bifname=([^,\s]+)", network.details)
    if network.kind == "tap" and name is not None and _is_alone(name[1]):
        return f"tap:{name[1]}, down and on no bridge"
    return f"{network.kind or 'none'}, link down"


def _is_alone(interface: str) -> bool:
    """Whether an interface of this host is down and belongs to no bridge; False where it is not seen."""
    folder = _INTERFACES / interface
    try:
        flags = int((folder / "flags").read_text(), 16)
    except OSError:
        return False
    return not flags & _UP and not (folder / "master").exists()
