"""The disks of a running QEMU, and the options that would make each of them as it is now: media that were changed or
ejected, disks that were plugged in or out, drives that nothing is connected to.

Sources: ``query-block`` (``qapi/block-core.json``) of QEMU 7.2 and 10.0; both were tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vmsnap.model import Disk
from vmsnap_drivers.hypervisors.qemu.definition import DefinedDisk
from vmsnap_drivers.qemu.block_drivers import format_of
from vmsnap_drivers.qemu.disk_arguments import children, image_of, new_drive, new_node, with_image, without_image
from vmsnap_drivers.qemu.drive_names import drive_keys, drive_names, keys_of_name
from vmsnap_drivers.qemu.image_names import absolute, image_name
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.options import Options

_NODE_OF_OURS: Final = "vmsnap-medium"
_MODEL_OF_Q35: Final = re.compile(r"(?:pc-)?q35")


@dataclass
class Blocks:
    """What was found; `defined` has the numbers of `Options` in it."""

    disks: list[Disk] = field(default_factory=list)
    defined: list[DefinedDisk] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class BlockReader:
    """Reads the disks of one VM and makes its options agree with them.

    :param devices: for each device of the options by its QOM path, the number of its argument
    :param cwd: the folder that relative names are relative to
    """

    def __init__(self, monitor: Monitor, options: Options, devices: Mapping[str, int], machine: str, cwd: str) -> None:
        self._monitor = monitor
        self._options = options
        self._devices = devices
        self._cwd = cwd
        ide_units = 1 if _MODEL_OF_Q35.match(machine) else 2
        before, numbers = options.settled()
        back = {place: number for number, place in numbers.items()}
        self._drives = {name: back[place] for name, place in drive_names(before, ide_units=ide_units).items()}
        self._found = Blocks()
        self._used: set[str] = set()

    def read(self) -> Blocks:
        """Ask, and change the options."""
        entries = self._monitor.execute("query-block")
        present = {entry.get("device", "") for entry in entries}
        for name, number in self._drives.items():
            if name not in present and (drive_keys(self._options[number]) or {}).get("if") == "none":
                self._options.drop(number)
        for entry in entries:
            self._read(entry)
        self._drop_unused_nodes()
        return self._found

    def _read(self, entry: dict[str, Any]) -> None:
        name, path, inserted = entry.get("device", ""), entry.get("qdev", ""), entry.get("inserted")
        drive = self._drives.get(name) if name else None
        if not path:
            # A drive that no device is connected to is no disk of the guest's.
            if drive is not None and inserted is not None:
                self._options.drop(drive)
            return
        if inserted is None:
            if drive is not None:
                self._options.replace(drive, without_image(self._options[drive]))
            elif not name:
                self._connect(path, "")
            return
        node, image_format = inserted["node-name"], format_of(inserted)
        read_only = bool(inserted.get("ro"))
        filename = image_name(inserted)
        address = absolute(filename, self._cwd)
        device = _device_name(entry, inserted, {disk.device for disk in self._found.disks})
        if name:
            argument = self._drive(name, drive, address, image_format, read_only=read_only)
        else:
            argument, node = self._node(path, node, address, image_format, read_only=read_only)
        if not read_only and self._is_temporary(argument):
            self._found.problems.append(f"disk {device!r} is temporary, as it was started with QEMU's snapshot")
        handle = {
            "qmp": self._monitor.address,
            "node": inserted["node-name"],
            "qdev": path,
            "file": address,
        }
        size_bytes = inserted["image"]["virtual-size"]
        self._found.disks.append(Disk(device, address, size_bytes, image_format, read_only, handle))
        self._found.defined.append(DefinedDisk(device, argument, node, address, image_format, read_only))

    def _drive(self, name: str, number: int | None, address: str, image_format: str, *, read_only: bool) -> int:
        """The argument of a drive that has a name."""
        if number is None:
            return self._options.add(new_drive(keys_of_name(name), address, image_format, read_only=read_only))
        argument = self._options[number]
        if read_only and absolute(image_of(argument), self._cwd) != address:
            self._options.replace(number, with_image(argument, address, image_format))
        return number

    def _node(self, path: str, node: str, address: str, image_format: str, *, read_only: bool) -> tuple[int, str]:
        """The argument of a node to which a device is connected, and the name that it has there."""
        if node.startswith("#"):
            # QEMU has made the name, and takes none of that kind.
            node = f"{_NODE_OF_OURS}{len(self._found.disks)}"
        self._used.add(node)
        self._connect(path, node)
        number = self._options.named("blockdev", "node-name").get(node)
        if number is None:
            number = self._options.add(new_node(node, address, image_format, read_only=read_only))
        return number, node

    def _connect(self, path: str, node: str) -> None:
        """Have the device's argument name the node; none where `node` is empty."""
        number = self._devices.get(device_path(path))
        if number is None:
            return
        argument = self._options[number]
        properties = argument.properties
        if node and properties.get("drive") != node:
            self._options.replace(number, argument.with_properties(properties.set("drive", node)))
        elif not node and properties.get("drive"):
            self._options.replace(number, argument.with_properties(properties.without("drive")))

    def _is_temporary(self, number: int) -> bool:
        argument = self._options[number]
        return bool(self._options.items("snapshot")) or argument.properties.get("snapshot", "off") == "on"

    def _drop_unused_nodes(self) -> None:
        """A new QEMU would open what this one has closed, or use beside the original what no device uses."""
        arguments, _ = self._options.settled()
        needed = self._used | children(arguments, sorted(self._used))
        for number, argument in self._options.items("blockdev"):
            if argument.properties.get("node-name") not in needed:
                self._options.drop(number)


def device_path(path: str) -> str:
    """The QOM path of the device that has an id, from a path of something within it or from the id alone."""
    if not path.startswith("/"):
        return f"/machine/peripheral/{path}"
    return "/".join(path.split("/")[:4])


def _device_name(entry: dict[str, Any], inserted: dict[str, Any], taken: set[str]) -> str:
    path = entry.get("qdev", "")
    named = re.fullmatch(r"(?:/machine/peripheral/)?([A-Za-z0-9][^/]*)(?:/.*)?", path)
    for name in (named[1] if named else "", entry.get("device", ""), inserted.get("node-name", "")):
        if name and not name.startswith("#") and name not in taken:
            return str(name)
    return f"disk{len(taken)}"
