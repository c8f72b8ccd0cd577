"""What libvirt itself is asked, and told, of a loaded domain before it runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Any

from vmsnap.errors import HypervisorError, UnknownVm
from vmsnap_drivers.hypervisors.libvirt.domain import Domain, Domains, address_of, disks_of
from vmsnap_drivers.qemu.image_names import identity_of
from vmsnap_drivers.qemu.libvirt.calls import binding


def check_disks(domains: Domains, domain: Domain) -> None:
    """See that no disk which the domain can write is a disk of another one, running or not. Files are compared by what
    they are.

    :raises HypervisorError: one is
    """
    own = {identity_of(address): address for address in _written(domain.tree())}
    for other in domains.all():
        if other.uuid == domain.uuid:
            continue
        try:
            addresses = [address_of(disk) for disk in disks_of(other.tree())]
        except UnknownVm:
            continue  # it was transient, and has ended meanwhile
        for address in addresses:
            if address and identity_of(address) in own:
                raise HypervisorError(
                    f"domain {domain.name!r} writes to {own[identity_of(address)]}, which is a disk of domain"
                    f" {other.name!r}"
                )


def cut_links(domain: Domain) -> None:
    """Set the links of all interfaces down by libvirt, which so knows of it. Idempotent.

    :raises HypervisorError: libvirt refuses
    """
    flag = binding().VIR_DOMAIN_AFFECT_LIVE
    for interface in domain.tree().iterfind("devices/interface"):
        link = interface.find("link")
        if link is not None and link.get("state") == "down":
            continue
        if link is None:
            link = ET.SubElement(interface, "link")
        link.set("state", "down")
        domain.call("setting a link down", partial(_update, ET.tostring(interface, encoding="unicode"), flag))


def _update(text: str, flags: int, handle: Any) -> None:
    handle.updateDeviceFlags(text, flags)


def logs_of(tree: ET.Element) -> list[Path]:
    """The files to which what the guest says on its serial lines is written."""
    found = []
    for element in tree.iterfind("devices/serial"):
        log, source = element.find("log"), element.find("source")
        if log is not None and log.get("file"):
            found.append(Path(log.get("file", "")))
        elif element.get("type") == "file" and source is not None and source.get("path"):
            found.append(Path(source.get("path", "")))
    return found


def _written(tree: ET.Element) -> list[str]:
    return [address_of(disk) for disk in disks_of(tree) if disk.find("readonly") is None and address_of(disk)]
