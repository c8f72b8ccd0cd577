"""The XML of a domain that is brought back, made from the one it was captured with.

The guest's hardware must be the same to the last detail; everything through which the domain touches the host must be
its own: disks, sockets, files, screens, networks. Pure.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk
from vmsnap_drivers.hypervisors.libvirt.definition import NVRAM, Definition
from vmsnap_drivers.qemu.own_paths import OwnPaths

_CHARACTER_DEVICES: Final = ("serial", "parallel", "console", "channel")
_OWN: Final = ("unix", "file")
"""Kinds of character devices that a new domain gets as files and sockets of its own."""
_KEPT: Final = ("pty", "null", "vc", "spicevmc", "spiceport", "qemu-vdagent", "dbus")
_ON_TAP: Final = ("network", "bridge", "direct", "ethernet")
_LUN: Final = "iscsi://"
_BACKEND_OF_TAP: Final = ("source", "virtualport", "backend", "target", "bandwidth", "filterref", "vlan", "link", "ip",
                          "route", "script", "actual", "portForward")  # fmt: skip


@dataclass(frozen=True)
class NewDomain:
    """What is different in the domain that is brought back.

    :ivar run_folder: its sockets and files go there
    :ivar disks: its own, by device
    :ivar takeover: the original is gone for good, and this one takes its place: name, UUID, files, screens and networks
        are that one's
    """

    name: str
    uuid: str
    run_folder: Path
    disks: Mapping[str, Disk] = field(default_factory=dict)
    isolated: bool = False
    takeover: bool = False


def rewrite(text: str, definition: Definition, new: NewDomain) -> str:
    """The XML `text` of `definition` (its ``xml`` or ``inactive_xml``) for the new domain.

    :raises HypervisorError: the domain was given no disk for one of its devices
    """
    tree = ET.fromstring(text)
    _set(tree, "name", new.name)
    _set(tree, "uuid", new.uuid)
    for entry in tree.iterfind("sysinfo/system/entry"):
        if entry.get("name") == "uuid":  # libvirt wants both to be the same
            entry.text = new.uuid
    for element in list(tree.iterfind("seclabel")):
        if element.get("type") != "none":
            # Labels are made for each domain; this one's would be those of the original.
            tree.remove(element)
    devices = tree.find("devices")
    if devices is None:
        raise HypervisorError(f"the definition of domain {new.name!r} has no devices")
    for disk in devices.iterfind("disk"):
        _change_disk(disk, definition, new)
    _change_nvram(tree, definition, new)
    if new.takeover:
        for log in devices.iterfind(".//log"):
            log.set("append", "on")
    else:
        _Characters(new).change(devices)
        for screen in devices.iterfind("graphics"):
            _hide(screen)
        for backend in devices.iterfind("tpm/backend"):
            # Its state comes with the machine's, and goes with the domain.
            backend.attrib.pop("persistent_state", None)
        for folder in devices.iterfind("filesystem") if new.isolated else ():
            if folder.find("readonly") is None:
                ET.SubElement(folder, "readonly")
    if new.isolated:
        for interface in devices.iterfind("interface"):
            _isolate(interface)
    return ET.tostring(tree, encoding="unicode")


def _set(tree: ET.Element, name: str, text: str) -> None:
    element = tree.find(name)
    if element is None:
        element = ET.SubElement(tree, name)
    element.text = text


def _change_disk(disk: ET.Element, definition: Definition, new: NewDomain) -> None:
    target = disk.find("target")
    device = "" if target is None else target.get("dev", "")
    defined = next((found for found in definition.disks if found.device == device), None)
    if defined is None or defined.read_only:
        return
    if device not in new.disks:
        raise HypervisorError(f"VM {new.name!r} was given no disk for {device!r}")
    given = new.disks[device]
    who = _initiator_of(disk) if given.address.startswith(_LUN) else []
    for name in ("source", "backingStore", "mirror", "auth", "encryption"):
        for element in list(disk.iterfind(name)):
            disk.remove(element)
    kind, source = _source_of(given.address)
    source.extend(who)
    disk.set("type", kind)
    disk.append(source)
    driver = disk.find("driver")
    if driver is None:
        driver = ET.SubElement(disk, "driver", {"name": "qemu"})
    driver.set("type", given.format)


def _initiator_of(disk: ET.Element) -> list[ET.Element]:
    """Who the VM is to the target of its LUN: by what name, and with which account, whose secret libvirt keeps. The
    target of a LUN beside it admits the same ones.
    """
    source = disk.find("source")
    if source is None or source.get("protocol") != "iscsi":
        return []
    # The account may stand beside the source, as before libvirt 3.9.
    found = [source.find("initiator"), source.find("auth") if source.find("auth") is not None else disk.find("auth")]
    return [element for element in found if element is not None]


def _source_of(address: str) -> tuple[str, ET.Element]:
    """The type of a disk at this address, and its source."""
    if address.startswith(_LUN):
        portal, _, name = address.removeprefix(_LUN).partition("/")
        host, _, port = portal.rpartition(":")
        source = ET.Element("source", {"protocol": "iscsi", "name": name})
        ET.SubElement(source, "host", {"name": host.strip("[]"), "port": port})
        return "network", source
    if address.startswith("/dev/"):
        return "block", ET.Element("source", {"dev": address})
    return "file", ET.Element("source", {"file": address})


def _change_nvram(tree: ET.Element, definition: Definition, new: NewDomain) -> None:
    element = tree.find("os/nvram")
    if element is None or not any(found.device == NVRAM for found in definition.disks):
        return
    if NVRAM not in new.disks:
        raise HypervisorError(f"VM {new.name!r} was given no disk for {NVRAM!r}")
    for inner in list(element):
        element.remove(inner)
    for name in ("template", "type", "format"):
        element.attrib.pop(name, None)
    if new.disks[NVRAM].format != "raw":
        element.set("format", new.disks[NVRAM].format)
    element.text = new.disks[NVRAM].address


class _Characters:
    """Gives the character devices files and sockets in the run folder, each name once."""

    def __init__(self, new: NewDomain) -> None:
        self._new = new
        self._own = OwnPaths(new.run_folder)

    def change(self, devices: ET.Element) -> None:
        """All of them. libvirt adds the first console, which is the first serial line, by itself."""
        for element in list(devices):
            if element.tag not in _CHARACTER_DEVICES:
                continue
            target = element.find("target")
            if element.tag == "console" and target is not None and target.get("type") == "serial":
                devices.remove(element)
                continue
            self._change(element)

    def _change(self, element: ET.Element) -> None:
        kind, source, log = element.get("type"), element.find("source"), element.find("log")
        if log is not None:
            log.set("file", str(self._own.give(log.get("file", ""))))
        if kind == "pty":
            if source is not None:
                element.remove(source)
            element.attrib.pop("tty", None)
        elif kind in _OWN and source is not None:
            if source.get("path"):
                source.set("path", str(self._own.give(source.get("path", ""))))
            source.attrib.pop("append", None)
            if kind == "unix":
                source.set("mode", "bind")
        elif kind not in _KEPT:
            element.set("type", "null")
            for inner in list(element):
                if inner.tag in ("source", "protocol"):
                    element.remove(inner)


def _hide(screen: ET.Element) -> None:
    """A screen on a free port of this host's own loopback: the original may have its port and its password."""
    for inner in list(screen):
        if inner.tag == "listen":
            screen.remove(inner)
    for name in ("socket", "websocket", "tlsPort", "port"):
        screen.attrib.pop(name, None)
    if screen.get("type") in ("vnc", "spice", "rdp"):
        screen.set("autoport", "yes")
        screen.set("listen", "127.0.0.1")
        screen.append(ET.Element("listen", {"type": "address", "address": "127.0.0.1"}))


def _isolate(interface: ET.Element) -> None:
    """No bridge, and the link down. What is a TAP stays one: the state of the card asks for it (``vnet_hdr``). One of
    type ``user`` stays so, since its state is in the stream.
    """
    for link in list(interface.iterfind("link")):
        interface.remove(link)
    if interface.get("type") in _ON_TAP:
        interface.set("type", "ethernet")
        for inner in list(interface):
            if inner.tag in _BACKEND_OF_TAP:
                interface.remove(inner)
        driver = interface.find("driver")
        if driver is not None:
            # Not in the host's kernel: QEMU sees, and drops, each packet itself.
            driver.set("name", "qemu")
    interface.append(ET.Element("link", {"state": "down"}))
