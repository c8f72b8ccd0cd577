"""What of a domain cannot be captured truthfully, by what libvirt says of it: nothing is asked of its QEMU, so that the
domain is not marked as tainted by a look. Facts from libvirt's ``docs/formatdomain.rst``, 9.0.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Final

from vmsnap_drivers.hypervisors.libvirt.domain import Domain, disks_of

_NOT_CAPTURED: Final = "whose state cannot be captured"
_BEHIND: Final = "which writes to the guest's memory behind QEMU's back"


def of_definition(tree: ET.Element) -> list[str]:
    """One line for each device that stands in the way, as the XML has it."""
    return [*_of_host_devices(tree), *_of_disks(tree), *_of_tpm(tree)]


def of_jobs(domain: Domain) -> list[str]:
    """One line for each job of somebody else's on the domain, block jobs included."""
    found = []
    if job := domain.job():
        found.append(f"{job} is going on (virsh domjobinfo; virsh domjobabort ends it)")
    for disk in disks_of(domain.tree()):
        target = disk.find("target")
        device = "" if target is None else target.get("dev", "")
        if device and domain.has_block_job(device):
            found.append(f"a block job of somebody else's is going on on {device} (virsh blockjob)")
    return found


def _of_host_devices(tree: ET.Element) -> Iterator[str]:
    for element in tree.iterfind("devices/hostdev"):
        kind = element.get("type") or "unknown"
        yield f"{_name(element)}: a device of the host is passed through ({kind}{_which(element)}), {_NOT_CAPTURED}"
    for element in tree.iterfind("devices/interface"):
        if element.get("type") in ("hostdev", "vdpa", "vhostuser"):
            what = {"hostdev": _NOT_CAPTURED}.get(str(element.get("type")), _BEHIND)
            yield f"{_name(element)}: its network card is of type {element.get('type')}, {what}"


def _of_disks(tree: ET.Element) -> Iterator[str]:
    for disk in disks_of(tree):
        target = disk.find("target")
        device = "" if target is None else target.get("dev", "")
        if disk.get("device") == "lun":
            yield f"disk {device} passes the guest's commands through to a device of the host (device='lun')"
        if disk.find("shareable") is not None and disk.find("readonly") is None:
            yield f"disk {device} is shared (<shareable/>) with others, who may write"
        if disk.get("type") == "vhostuser":
            yield f"disk {device} is of type vhostuser, {_BEHIND}"


def _of_tpm(tree: ET.Element) -> Iterator[str]:
    for element in tree.iterfind("devices/tpm/backend"):
        if element.get("type") != "emulator":
            yield f"the TPM is the host's own ({element.get('type')}), {_NOT_CAPTURED}"
        elif element.find("encryption") is not None:
            yield "the state of the TPM is encrypted with a secret of libvirt's, which is not carried"


def _name(element: ET.Element) -> str:
    """What virsh calls it; a domain that does not run has no names for its devices."""
    alias = element.find("alias")
    return element.tag if alias is None else alias.get("name", element.tag)


def _which(element: ET.Element) -> str:
    """The address of the host's device, or what it is."""
    source = element.find("source")
    if source is None:
        return ""
    address, vendor, product = source.find("address"), source.find("vendor"), source.find("product")
    if element.get("type") == "pci" and address is not None:
        numbers = [int(address.get(name, "0"), 16) for name in ("domain", "bus", "slot", "function")]
        return " {:04x}:{:02x}:{:02x}.{:x}".format(*numbers)
    if vendor is not None and product is not None:
        return " {}:{}".format(*(part.get("id", "").removeprefix("0x") for part in (vendor, product)))
    if address is not None and address.get("device"):
        return f" bus {address.get('bus')} device {address.get('device')}"
    return ""
