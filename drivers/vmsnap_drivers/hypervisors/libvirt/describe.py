"""What libvirt and its QEMU say of a running domain. Facts from libvirt's ``docs/formatdomain.rst``, 9.0."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vmsnap.errors import VmGone
from vmsnap.model import Disk, Nic, VmDescription
from vmsnap_drivers.hypervisors.libvirt.definition import FORMAT, NVRAM, DefinedDisk, Definition
from vmsnap_drivers.hypervisors.libvirt.domain import Domain, disks_of
from vmsnap_drivers.hypervisors.libvirt.refusals import of_definition
from vmsnap_drivers.qemu import commandline
from vmsnap_drivers.qemu.block_drivers import format_of
from vmsnap_drivers.qemu.image_names import absolute, image_name
from vmsnap_drivers.qemu.libvirt.calls import binding
from vmsnap_drivers.qemu.memory_regions import memory_regions
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.networks import is_connected, networks
from vmsnap_drivers.qemu.peer import look_at
from vmsnap_drivers.qemu.refusals import refusals
from vmsnap_drivers.qemu.status import vm_state

_NVRAM_NODES: Final = ("libvirt-pflash1-format", "libvirt-pflash1-storage")
"""The latter under libvirts that give raw disks no node of the format."""


def describe(vm: str, domain: Domain, monitor: Monitor) -> VmDescription:
    """Ask for all that is to be known of the domain; changes nothing.

    :raises VmGone: it does not run
    """
    if not domain.is_active():
        raise VmGone(
            f"domain {domain.name!r} does not run ({domain.why_shut_off()})", cure=f"virsh start {domain.name}"
        )
    lib = binding()
    tree = domain.tree()
    peer = look_at(monitor.peer_pid)
    # libvirt gives QEMU files by add-fd, and gives them to the next one too.
    arguments = [argument for argument in commandline.parse(peer.argv) if argument.name != "add-fd"]
    entries = {_alias_of(entry): entry for entry in monitor.execute("query-block") if entry.get("inserted")}
    disks = _disks(tree, entries, monitor, peer.cwd)
    problems = refusals(monitor, arguments, peer.cwd)
    problems += of_definition(tree)
    problems += _unknown_disks(disks, entries)
    if job := domain.job():
        problems.append(f"{job} is going on (virsh domjobinfo; virsh domjobabort ends it)")
    if not any(not disk.read_only for disk in disks):
        problems.append("the domain has no disk that could be backed up")
    definition = Definition(
        format=FORMAT,
        xml=domain.xml(lib.VIR_DOMAIN_XML_MIGRATABLE),
        cpu=_text(tree.find("cpu")),
        inactive_xml=domain.xml(lib.VIR_DOMAIN_XML_INACTIVE) if domain.is_persistent() else "",
        version=monitor.version,
        disks=tuple(DefinedDisk(disk.device, disk.address, disk.format, disk.read_only) for disk in disks),
    )
    sizes = monitor.execute("query-memory-size-summary")
    return VmDescription(
        vm=vm,
        hypervisor="libvirt",
        state=vm_state(monitor),
        memory_bytes=sizes["base-memory"] + sizes.get("plugged-memory", 0),
        vcpus=len(monitor.execute("query-cpus-fast")),
        memory=tuple(memory_regions(monitor, arguments, peer.cwd)),
        disks=tuple(disks),
        nics=tuple(_nics(tree, monitor)),
        definition=definition.to_json(),
        refusals=tuple(problems),
        hypervisor_version=".".join(map(str, monitor.version)),
    )


def _text(element: ET.Element | None) -> str:
    return "" if element is None else ET.tostring(element, encoding="unicode")


def _disks(tree: ET.Element, entries: Mapping[str, dict[str, Any]], monitor: Monitor, cwd: str) -> list[Disk]:
    """Of the XML the names and the order, of QEMU the rest. A drive without a medium is no disk."""
    found = []
    for element in disks_of(tree):
        alias, target = element.find("alias"), element.find("target")
        if alias is None or target is None or alias.get("name") not in entries:
            continue
        found.append(_disk(target.get("dev", ""), entries[alias.get("name", "")], monitor, cwd))
    found += [
        _disk(NVRAM, entry, monitor, cwd)
        for entry in entries.values()
        if entry["inserted"].get("node-name") in _NVRAM_NODES
    ]
    return found


def _unknown_disks(disks: Sequence[Disk], entries: Mapping[str, dict[str, Any]]) -> list[str]:
    """One line for each disk that the guest can write and libvirt does not know."""
    known = {disk.handle["qdev"] for disk in disks}
    return [
        f"QEMU has a disk that libvirt does not know, {image_name(entry['inserted'])} (by <qemu:commandline> or QEMU's"
        " monitor): give it to the domain as a <disk>"
        for entry in entries.values()
        if entry.get("qdev") and entry["qdev"] not in known and not entry["inserted"].get("ro")
    ]


def _alias_of(entry: dict[str, Any]) -> str:
    """``/machine/peripheral/virtio-disk0/virtio-backend``: the alias is the device's id."""
    path = str(entry.get("qdev", ""))
    parts = path.split("/")
    return parts[3] if path.startswith("/machine/peripheral/") else path


def _disk(device: str, entry: dict[str, Any], monitor: Monitor, cwd: str) -> Disk:
    inserted = entry["inserted"]
    address = absolute(image_name(inserted), cwd)
    handle = {
        "qmp": monitor.address,
        "node": inserted["node-name"],
        "qdev": entry["qdev"],
        "file": address,
    }
    size_bytes = inserted["image"]["virtual-size"]
    return Disk(device, address, size_bytes, format_of(inserted), bool(inserted.get("ro")), handle)


def _nics(tree: ET.Element, monitor: Monitor) -> list[Nic]:
    """QEMU's view; where a card leads, and whether its link is down, is told by the XML."""
    leads_to = {}
    down = set()
    for element in tree.iterfind("devices/interface"):
        alias, source = element.find("alias"), element.find("source")
        if alias is not None:
            link = element.find("link")
            if link is not None and link.get("state") == "down":
                down.add(alias.get("name"))
            place = "" if source is None else next(iter(source.attrib.values()), "")
            leads_to[alias.get("name")] = f"{element.get('type')}:{place}" if place else str(element.get("type"))
    return [
        Nic(
            network.nic,
            network.mac,
            leads_to.get(network.nic, network.kind or "none"),
            is_connected(network) and network.nic not in down,
        )
        for network in networks(monitor)
        if network.nic
    ]
