"""What a running QEMU says of its VM. Facts from ``qapi/*.json`` of QEMU, 7.2 and 10.0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmsnap.errors import UsageError
from vmsnap.model import Disk, MemoryRegion, Nic, VmDescription, VmState
from vmsnap_drivers.hypervisors.qemu.definition import FORMAT, DefinedDisk, Definition, absolute, without_secrets
from vmsnap_drivers.hypervisors.qemu.refusals import refusals
from vmsnap_drivers.qemu import commandline
from vmsnap_drivers.qemu.commandline import Argument
from vmsnap_drivers.qemu.disk_arguments import find_argument
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError
from vmsnap_drivers.qemu.peer import Peer, file_system_of, look_at

_ENDED: Final = frozenset(["shutdown"])
_NIC: Final = re.compile(r"^(\S+): index=\d+,type=nic,model=([^,]*),macaddr=([0-9a-fA-F:]+)")
_HUB: Final = re.compile(r"^hub (\d+)$")
_PORT: Final = re.compile(r"^ \\ ([^\s:]+)(?:: (.*))?$")
_BACKEND: Final = re.compile(r"^ \\ (\S+): index=\d+,type=([a-z-]+)(.*)$")


@dataclass(frozen=True)
class Network:
    """A network device of QEMU's: a NIC, and the backend that it is connected to (both names empty where none is)."""

    nic: str
    mac: str
    backend: str
    kind: str
    details: str


def vm_state(monitor: Monitor) -> VmState:
    """What the VM does now."""
    status = monitor.execute("query-status")
    if status["running"]:
        return VmState.EXECUTING
    return VmState.ENDED if status["status"] in _ENDED else VmState.STOPPED


def describe(vm: str, monitor: Monitor) -> VmDescription:
    """Ask for all that is to be known of the VM; changes nothing.

    :raises VmGone: QEMU ended
    """
    peer = look_at(monitor.peer_pid)
    problems: list[str] = []
    try:
        arguments = commandline.parse(peer.argv)
    except UsageError as e:
        arguments = []
        problems.append(str(e))
    cleaned, secrets = without_secrets(arguments)
    disks, defined, unknown = _disks(monitor, peer, arguments)
    definition = Definition(
        format=FORMAT,
        exe=peer.exe,
        cwd=peer.cwd,
        environment=peer.environment,
        version=monitor.version,
        machine=monitor.execute("qom-get", {"path": "/machine", "property": "type"}).removesuffix("-machine"),
        default_ram=_default_ram(monitor, arguments),
        arguments=tuple((argument.name, argument.value) for argument in cleaned),
        disks=tuple(defined),
    )
    problems += secrets + unknown + refusals(monitor, arguments, peer.cwd)
    sizes = monitor.execute("query-memory-size-summary")
    return VmDescription(
        vm=vm,
        hypervisor="qemu",
        state=vm_state(monitor),
        memory_bytes=sizes["base-memory"] + sizes.get("plugged-memory", 0),
        vcpus=len(monitor.execute("query-cpus-fast")),
        memory=tuple(_memory(monitor, arguments, peer.cwd)),
        disks=tuple(disks),
        nics=tuple(
            Nic(network.nic, network.mac, network.kind or "none", _is_connected(network))
            for network in networks(monitor)
            if network.nic
        ),
        definition=definition.to_json(),
        refusals=tuple(problems),
        hypervisor_version=".".join(map(str, monitor.version)),
    )


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
        elif alone := re.match(r"^(\S+): index=\d+,type=([a-z-]+)(.*)$", line):
            in_hub = False
            found.append(Network("", "", alone[1], alone[2], alone[3]))
    return found + [network for ports in hubs for network in _ports(ports)]


def _is_connected(network: Network) -> bool:
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


def _disks(monitor: Monitor, peer: Peer, arguments: list[Argument]) -> tuple[list[Disk], list[DefinedDisk], list[str]]:
    disks: list[Disk] = []
    defined: list[DefinedDisk] = []
    problems: list[str] = []
    taken: list[int] = []
    for entry in monitor.execute("query-block"):
        inserted = entry.get("inserted")
        if inserted is None:
            continue
        filename = image_name(inserted)
        device = _device_name(entry, inserted, {disk.device for disk in disks})
        read_only = bool(inserted.get("ro"))
        address = absolute(filename, peer.cwd)
        argument = find_argument(
            arguments, entry.get("device", ""), inserted.get("node-name", ""), filename, tuple(taken)
        )
        if argument is not None:
            taken.append(argument)
        if argument is None and not read_only:
            problems.append(f"disk {device!r} does not stand in QEMU's command line (hot-plugged?)")
        if not read_only and any(a.name == "snapshot" for a in arguments):
            problems.append(f"disk {device!r} is temporary, as QEMU was started with -snapshot")
        handle = {
            "qmp": str(Path(monitor.path).absolute()),
            "node": inserted.get("node-name", ""),
            "qdev": entry.get("qdev", ""),
            "file": address,
        }
        size_bytes = inserted["image"]["virtual-size"]
        disks.append(Disk(device, address, size_bytes, inserted["drv"], read_only, handle))
        defined.append(DefinedDisk(device, argument, handle["node"], address, inserted["drv"], read_only))
    return disks, defined, problems


def image_name(node: dict[str, Any]) -> str:
    """The name of the image of a block node. QEMU writes it as JSON where options do not fit into a name."""
    filename = str(node["image"].get("filename") or node.get("file", ""))
    found = re.search(r'"filename": "((?:[^"\\]|\\.)*)"', filename) if filename.startswith("json:") else None
    return found[1] if found else filename


def _device_name(entry: dict[str, Any], inserted: dict[str, Any], taken: set[str]) -> str:
    path = entry.get("qdev", "")
    named = re.fullmatch(r"(?:/machine/peripheral/)?([A-Za-z0-9][^/]*)(?:/.*)?", path)
    for name in (named[1] if named else "", entry.get("device", ""), inserted.get("node-name", "")):
        if name and not name.startswith("#") and name not in taken:
            return str(name)
    return f"disk{len(taken)}"


def _default_ram(monitor: Monitor, arguments: list[Argument]) -> str:
    try:
        backend = monitor.execute("qom-get", {"path": "/machine", "property": "memory-backend"})
    except MonitorError:
        return ""
    name = str(backend or "").rpartition("/")[2]
    named = {a.properties.get("id") for a in arguments if a.name == "object"}
    return "" if name in named else name


def _memory(monitor: Monitor, arguments: list[Argument], cwd: str) -> list[MemoryRegion]:
    objects = {a.properties.get("id"): a.properties for a in arguments if a.name == "object"}
    regions: list[MemoryRegion] = []
    for entry in monitor.execute("query-memdev"):
        name = entry.get("id", "memory")
        properties = objects.get(name)
        backing = "anonymous"
        if properties is not None and properties.get("qom-type") == "memory-backend-memfd":
            backing = "memfd"
        elif properties is not None and properties.get("mem-path"):
            path = absolute(properties.get("mem-path"), cwd)
            backing = f"{file_system_of(Path(path))}:{path}"
        regions.append(MemoryRegion(name, entry["size"], 4096, backing))
    return regions
