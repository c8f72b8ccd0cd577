"""The devices of a running QEMU, and the options that would make them as they are now: what was plugged in at run time
is read back, what was plugged out is left out, and the rest keep their places.

Sources: QOM as ``qom-list``, ``qom-get`` and ``device-list-properties`` show it (``qapi/qom.json``, ``qapi/qdev.json``)
in QEMU 7.2 and 10.0; both were tried. A device with an id is ``/machine/peripheral/ID``, one without is
``/machine/peripheral-anon/device[N]``, numbered as they were made (``qdev_set_id``, ``softmmu/qdev-monitor.c``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmsnap_drivers.qemu.commandline import Argument, Properties
from vmsnap_drivers.qemu.drive_names import drive_keys
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError
from vmsnap_drivers.qemu.networks import Network, networks
from vmsnap_drivers.qemu.options import Options

_NAMED: Final = "/machine/peripheral"
_UNNAMED: Final = "/machine/peripheral-anon"
_OBJECTS: Final = "/objects/"
_PLACES: Final = ("addr", "channel", "scsi-id", "lun", "nr", "port", "unit", "slot")
"""Where on its bus a device is: given where the option did not say, as QEMU would give the free places anew."""
_EMPTY_COUNTS: Final = frozenset(["romfile"])
_NOT_GIVEN: Final = frozenset(["drive", "bootindex", "busnr"])
_MEMORY_BACKEND: Final = "memory-backend-"
_MEETING_POINTS: Final = ("socket", "stream", "dgram", "vde", "l2tpv3")
"""Networks that a new VM gets as names alone, whatever they are connected to (`rewrite`)."""
_OWN_NAME: Final = re.compile(r"#.*|hub\d+port\d+|[a-z]+\.\d+")
"""The names that QEMU gives to networks of ``-nic`` and ``-net``, which are never plugged in or out."""


@dataclass(frozen=True)
class _Property:
    kind: str
    default: object
    value: Any


class DeviceReader:
    """Reads the devices, networks and objects of one VM and makes its options agree with them.

    :ivar places: for each device by its QOM path, the number of its argument
    :ivar problems: one line for each thing that cannot be read back
    """

    def __init__(self, monitor: Monitor, options: Options) -> None:
        self._monitor = monitor
        self._options = options
        self._defaults: dict[str, Any] = {}
        self.places: dict[str, int] = {}
        self.problems: list[str] = []

    def read(self) -> None:
        """Ask, and change the options."""
        self._networks()
        present = self._children(_NAMED)
        given = self._options.named("device", "id")
        self._unnamed()
        # Where a device was plugged out and another in under its id, the option is not this one's.
        kept = {identity for identity in given if identity in present and not self._was_plugged_in(identity)}
        self.places |= {f"{_NAMED}/{identity}": given[identity] for identity in kept}
        if gone := [number for identity, number in given.items() if identity not in kept]:
            for number in gone:
                self._options.drop(number)
            self._pin()
        plugged = [f"{_NAMED}/{identity}" for identity in present if identity not in kept]
        for path in sorted(plugged, key=self._depth):
            self.places[path] = self._options.add(self._read_back(path))

    def _children(self, path: str) -> dict[str, str]:
        """The objects below one, with their types, in no order."""
        try:
            entries = self._monitor.execute("qom-list", {"path": path})
        except MonitorError:
            # There is no such folder before its first object.
            return {}
        found = {entry["name"]: re.fullmatch(r"child<(.*)>", entry["type"]) for entry in entries}
        return {name: kind[1] for name, kind in found.items() if kind is not None}

    def _unnamed(self) -> None:
        """Devices without an id: they are in the order of their options, as long as none was plugged in or out."""
        first = [
            number
            for number, argument in self._options.items("device", "virtfs")
            if not _is_json(argument) and not (argument.name == "device" and argument.properties.get("id"))
        ]
        second = [n for n, a in self._options.items() if (drive_keys(a) or {}).get("if") == "virtio"]
        third = [n for n, a in self._options.items("device") if _is_json(a) and not a.properties.get("id")]
        numbers = [*first, *second, *third]
        found = self._children(_UNNAMED)
        if set(found) != {f"device[{place}]" for place in range(len(numbers))}:
            self.problems.append(
                f"devices without an id were plugged in or out at run time: there are {len(found)}, the command line"
                f" has {len(numbers)} (give devices an id)"
            )
            return
        self.places |= {f"{_UNNAMED}/device[{place}]": number for place, number in enumerate(numbers)}

    def _pin(self) -> None:
        """Write down the places of the devices that are left, before the new QEMU gives them the free ones."""
        for path, number in self.places.items():
            argument = self._options[number]
            values = self._properties(path)
            places = {name: _as_text(name, values) for name in _PLACES if name in values}
            if argument.name != "device":
                self.problems.append(
                    f"the place of the disk of -{argument.name} {argument.value} cannot be kept, as a device was"
                    " plugged out (use -device)"
                )
                continue
            properties = argument.properties
            for name, text in places.items():
                if not properties.get(name) and text:
                    properties = properties.set(name, text)
            self._options.replace(number, argument.with_properties(properties))

    def _read_back(self, path: str) -> Argument:
        """The option that makes a device that was plugged in at run time."""
        identity = path.rpartition("/")[2]
        kind = self._get(path, "type")
        values = self._properties(path)
        bus = str(self._get(path, "parent_bus") or "").rpartition("/")[2]
        pairs: list[tuple[str, str | None]] = [("driver", kind), ("id", identity)]
        if bus:
            pairs.append(("bus", bus))
        for name, entry in values.items():
            text = self._given_text(identity, name, values)
            if text is not None and (name not in _NOT_GIVEN or entry.value not in ("", -1, None, 0)):
                pairs.append((name, text))
        return Argument("device", Properties(pairs, "driver").text())

    def _given_text(self, identity: str, name: str, values: Mapping[str, _Property]) -> str | None:
        """What the option must say of a property; None where it need say nothing."""
        entry = values[name]
        if entry.kind.startswith("child<") or entry.value is None or entry.value == entry.default:
            return None
        if entry.value == "" and name not in _EMPTY_COUNTS:
            return None
        if isinstance(entry.value, list | dict):
            if entry.value:
                self.problems.append(f"device {identity!r}, plugged in at run time, has {name}, which is not read back")
            return None
        if entry.kind.startswith("link<"):
            if not str(entry.value).startswith(_OBJECTS):
                self.problems.append(f"device {identity!r}, plugged in at run time, is linked to {entry.value}")
                return None
            return self._object(str(entry.value).removeprefix(_OBJECTS), identity)
        if name == "chardev":
            self._character_device(str(entry.value))
        return _as_text(name, values)

    def _object(self, name: str, user: str) -> str:
        """An object that a device uses: made by an option if none does yet."""
        if name in self._options.named("object", "id"):
            return name
        path = f"{_OBJECTS}{name}"
        kind = self._get(path, "type")
        pairs: list[tuple[str, str | None]] = [("qom-type", kind), ("id", name)]
        if kind.startswith(_MEMORY_BACKEND):
            pairs.append(("size", str(self._get(path, "size"))))
        elif kind == "rng-random":
            pairs.append(("filename", self._get(path, "filename")))
        elif kind not in ("iothread", "rng-builtin"):
            self.problems.append(f"{kind} {name!r} of device {user!r} is new since the start and not read back")
        self._options.add(Argument("object", Properties(pairs, "qom-type").text()))
        return name

    def _character_device(self, name: str) -> None:
        if name not in self._options.named("chardev", "id"):
            # Whatever it is connected to, is connected to the original.
            self._options.add(Argument("chardev", Properties([("backend", "null"), ("id", name)], "backend").text()))

    def _networks(self) -> None:
        """Networks without their option get one, options without their network go."""
        given = self._options.named("netdev", "id")
        present = {network.backend: network for network in networks(self._monitor) if network.backend}
        for name, number in given.items():
            if name not in present:
                self._options.drop(number)
        for name, network in present.items():
            if name not in given and not _OWN_NAME.fullmatch(name):
                self._options.add(self._network(network))

    def _network(self, network: Network) -> Argument:
        """The option of a network that was added at run time. What it is connected to on the host is not read back."""
        pairs: list[tuple[str, str | None]] = [("type", network.kind), ("id", network.backend)]
        if network.kind == "tap":
            pairs += [("script", "no"), ("downscript", "no")]
        elif network.kind == "user" and (restricted := re.search(r"\brestrict=(on|off)", network.details)):
            pairs.append(("restrict", restricted[1]))
        elif network.kind not in ("user", *_MEETING_POINTS):
            self.problems.append(
                f"network {network.backend!r} ({network.kind}) was added at run time and is not read back"
            )
        return Argument("netdev", Properties(pairs, "type").text())

    def _properties(self, path: str) -> dict[str, _Property]:
        """The device's properties, with what they are and what they would be."""
        kind = self._get(path, "type")
        if kind not in self._defaults:
            self._defaults[kind] = self._monitor.execute("device-list-properties", {"typename": kind})
        found = {}
        for entry in self._defaults[kind]:
            try:
                value = self._get(path, entry["name"])
            except MonitorError:
                # Write-only, or without a meaning for this device.
                continue
            found[entry["name"]] = _Property(entry["type"], entry.get("default-value"), value)
        return found

    def _get(self, path: str, name: str) -> Any:
        return self._monitor.execute("qom-get", {"path": path, "property": name})

    def _was_plugged_in(self, identity: str) -> bool:
        return bool(self._get(f"{_NAMED}/{identity}", "hotplugged"))

    def _depth(self, path: str) -> tuple[int, str]:
        """How many devices with an id this one hangs on: those are made first."""
        steps, above = 0, path
        while found := re.match(rf"{_NAMED}/[^/]+", str(self._get(above, "parent_bus") or "")):
            above = found[0]
            steps += 1
        return steps, path


def _is_json(argument: Argument) -> bool:
    return (argument.value or "").startswith("{")


def _as_text(name: str, values: Mapping[str, _Property]) -> str:
    value = values[name].value
    if isinstance(value, bool):
        return "on" if value else "off"
    if name == "addr" and "multifunction" in values:
        # A PCI address, which is read as a number and given as slot and function.
        return f"{value >> 3:02x}.{value & 7:x}"
    return str(value)
