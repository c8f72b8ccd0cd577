"""What can be done with a domain, as far as libvirt and this host say so: its QEMU is asked nothing, since libvirt
would mark the domain as tainted for that.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Final

from vmsnap.errors import CannotCapture, UnknownVm, VmsnapError
from vmsnap.model import Disk, SeenVm, VmState
from vmsnap_drivers.hypervisors.libvirt import refusals
from vmsnap_drivers.hypervisors.libvirt.domain import Domain, Domains, address_of, disks_of
from vmsnap_drivers.hypervisors.libvirt.network_disks import notes_of_disks
from vmsnap_drivers.qemu import write_protection
from vmsnap_drivers.qemu.capture.cow import may_trace
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress
from vmsnap_drivers.qemu.libvirt.process import find_qemu

_NODE: Final = "libvirt-{}-format"
"""How libvirt names a disk's node (``qemuBlockStorageSourceCreateFormat``, since 5.10); the number is in the XML. Newer
ones have none of that name for a raw disk: whoever is to use the node asks QEMU, here it only must not be empty.
"""


def see_all(domains: Domains) -> list[SeenVm]:
    """All domains of a libvirt, those that do not run included, by name. Takes some milliseconds for each.

    :raises VmsnapError: libvirt cannot be reached
    """
    kind = domains.kind()
    found = []
    for domain in domains.all():
        try:
            found.append(_see(domain, kind, domains.uri))
        except UnknownVm:
            continue  # it was transient, and has ended meanwhile
    return sorted(found, key=lambda seen: seen.vm)


def _see(domain: Domain, kind: str, uri: str) -> SeenVm:
    state, tree = domain.life(), domain.tree()
    disks = tuple(_disks(domain, tree, uri))
    notes = [*notes_of_disks(disks)]
    if not domain.is_persistent():
        notes.append("transient: libvirt forgets it when it ends")
    why_not = refusals.of_definition(tree)
    if not any(not disk.read_only for disk in disks):
        why_not.append("it has no disk that could be backed up")
    captures: tuple[str, ...] = ()
    if kind != "QEMU":
        why_not.insert(0, f"it is a domain of {kind}, not of QEMU")
    elif state in (VmState.ABSENT, VmState.ENDED):
        why_not.insert(0, f"it does not run (virsh start {domain.name})")
    else:
        why_not += refusals.of_jobs(domain)
        if not why_not:
            captures, why_not = _ways(domain, tree)
    return SeenVm(domain.name, state, captures, tuple(why_not), disks, tuple(notes))


def _ways(domain: Domain, tree: ET.Element) -> tuple[tuple[str, ...], list[str]]:
    """The ways of capture, and what stands in the way of each other one."""
    try:
        pid = find_qemu(domain.uuid)
        why_no_cow = write_protection.why_not(pid)
        if not why_no_cow and not may_trace(pid):
            why_no_cow = "it belongs to another user (run vmsnap as root)"
    except (CannotCapture, OSError) as e:
        return (), [e.message if isinstance(e, VmsnapError) else "it has just ended"]
    ways, why_not = [], []
    if why_no_cow:
        why_not.append(f"copy on write: {why_no_cow}")
    else:
        ways.append("cow")
    if tree.get("type") == "kvm":
        ways.append("precopy")
    else:
        why_not.append(f"pre-copy: under TCG, only its QEMU can say (vmsnap doctor {domain.name})")
    return (*ways, "libvirt"), why_not


def _disks(domain: Domain, tree: ET.Element, uri: str) -> list[Disk]:
    """Its disks, as far as a mechanism needs them to say whether it handles them. A drive without a medium is none."""
    found = []
    for element in disks_of(tree):
        target, driver, alias = element.find("target"), element.find("driver"), element.find("alias")
        source = element.find("source")
        device, address = "" if target is None else target.get("dev", ""), address_of(element)
        if not address:
            continue
        index = "" if source is None else source.get("index", "")
        handle = {
            "qmp": LibvirtAddress(uri, domain.uuid).text(),
            "node": _NODE.format(index),
            "qdev": device if alias is None else alias.get("name", device),
            "file": address,
        }
        kind = "raw" if driver is None else driver.get("type", "raw")
        read_only = element.find("readonly") is not None
        found.append(Disk(device, address, domain.disk_bytes(device), kind, read_only, handle))
    return found
