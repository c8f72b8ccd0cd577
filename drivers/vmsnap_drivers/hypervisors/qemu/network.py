"""Cuts a VM off from every network, and proves it."""

from __future__ import annotations

from vmsnap.errors import HypervisorError
from vmsnap.model import Nic
from vmsnap_drivers.hypervisors.qemu.describe import networks
from vmsnap_drivers.qemu.monitor import Monitor

_REACH_NOTHING = frozenset(["hubport"])


def cut(monitor: Monitor) -> tuple[Nic, ...]:
    """Set the link of every network backend and NIC down; idempotent.

    The backend is what counts: virtio-net computes the NIC's own flag anew from the guest's state. With a backend down
    nothing it receives reaches the guest, and nothing the guest sends reaches it (``qemu_sendv_packet``,
    ``net/net.c``).

    :raises HypervisorError: a link could not be set down
    """
    found = networks(monitor)
    for network in found:
        for name in (network.backend, network.nic):
            if name:
                monitor.execute("set_link", {"name": name, "up": False})
    again = networks(monitor)
    if {(n.nic, n.backend) for n in again} != {(n.nic, n.backend) for n in found}:
        raise HypervisorError(f"the networks of the QEMU at {monitor.path} changed while they were cut")
    return tuple(
        Nic(n.nic, n.mac, n.kind if n.kind in _REACH_NOTHING else f"{n.kind or 'none'}, link down", False)
        for n in again
        if n.nic
    )
