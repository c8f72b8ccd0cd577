"""The network cards of a running QEMU, and what they are connected to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vmsnap_drivers.qemu.monitor import Monitor

_NIC: Final = re.compile(r"^(\S+): index=\d+,type=nic,model=([^,]*),macaddr=([0-9a-fA-F:]+)")
_HUB: Final = re.compile(r"^hub (\d+)$")
_PORT: Final = re.compile(r"^ \\ ([^\s:]+)(?:: (.*))?$")
_BACKEND: Final = re.compile(r"^ \\ (\S+): index=\d+,type=([a-z-]+)(.*)$")
_ALONE: Final = re.compile(r"^(\S+): index=\d+,type=([a-z-]+)(.*)$")


@dataclass(frozen=True)
class Network:
    """A network device of QEMU's: a NIC, and the backend that it is connected to (both names empty where none is)."""

    nic: str
    mac: str
    backend: str
    kind: str
    details: str


def networks(monitor: Monitor) -> list[Network]:
    """All NICs with their backends, and the backends without a NIC. The `details` of a hub's port are the names of the
    hub's other ports.

    There is no QMP command for it; ``info network`` has had this form since QEMU 1.2 (``net/net.c``, ``net/hub.c``).
    """
    text = monitor.execute("human-monitor-command", {"command-line": "info network"})
    found: list[Network] = []
    hubs: list[dict[str, str]] = []
    in_hub = False
    for line in text.replace("\r", "").split("\n"):
        if _HUB.match(line):
            hubs.append({})
            in_hub = True
        elif in_hub and (port := _PORT.match(line)):
            hubs[-1][port[1]] = port[2] or ""
        elif nic := _NIC.match(line):
            in_hub = False
            found.append(Network(nic[1], nic[3].lower(), "", "", ""))
        elif (backend := _BACKEND.match(line)) and found:
            last = found[-1]
            if not last.backend:
                found[-1] = Network(last.nic, last.mac, backend[1], backend[2], backend[3])
            else:
                found.append(Network("", "", backend[1], backend[2], backend[3]))
        elif alone := _ALONE.match(line):
            in_hub = False
            found.append(Network("", "", alone[1], alone[2], alone[3]))
    return found + [network for ports in hubs for network in _ports(ports)]


def is_connected(network: Network) -> bool:
    """Whether the backend leads anywhere: a hub's only port does not."""
    return bool(network.backend) and (network.kind != "hubport" or bool(network.details))


def _ports(ports: dict[str, str]) -> list[Network]:
    found = []
    for name, peer in ports.items():
        others = ",".join(sorted(set(ports) - {name}))
        nic = _NIC.match(peer)
        # A port without a NIC may be a way out, to the backend that is its peer.
        found.append(Network(nic[1] if nic else "", nic[3].lower() if nic else "", name, "hubport", others))
    return found
