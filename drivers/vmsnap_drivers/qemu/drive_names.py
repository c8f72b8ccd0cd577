"""The names that QEMU gives to drives of the command line that have no id. Pure.

Facts from ``blockdev.c`` (``drive_new``) of QEMU, 7.2 and 10.0: a drive is interface, bus and unit; what is not said
is the first unit that is free, and the name is made of all three (``ide1-cd0``, ``virtio0``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from vmsnap_drivers.qemu.commandline import Argument

_LETTERS: Final = {"hda": 0, "hdb": 1, "hdc": 2, "hdd": 3, "cdrom": 2, "fda": 0, "fdb": 1}
_INTERFACES: Final = {
    "fda": "floppy",
    "fdb": "floppy",
    "mtdblock": "mtd",
    "sd": "sd",
    "pflash": "pflash",
}
_UNITS_PER_BUS: Final = {"scsi": 7}
_IMPLIED: Final = re.compile(r"(?:ide|scsi|floppy|sd|virtio|pflash|mtd|xen)\d+(?:-(?:hd|cd)\d+)?")


def drive_names(arguments: Sequence[Argument], *, ide_units: int) -> dict[str, int]:
    """The name of each drive of the command line with the number of its argument.

    :param ide_units: drives on one IDE bus: 2, with the machine type q35 1
    """
    units = {**_UNITS_PER_BUS, "ide": ide_units}
    taken: set[tuple[str, int, int]] = set()
    found: dict[str, int] = {}
    for number, argument in enumerate(arguments):
        keys = drive_keys(argument)
        if keys is None:
            continue
        interface = keys.get("if", "ide")
        most = units.get(interface, 0)
        bus, unit = int(keys.get("bus", 0)), keys.get("unit")
        if "index" in keys:
            bus, place = divmod(int(keys["index"]), most) if most else (0, int(keys["index"]))
        elif unit is not None:
            place = int(unit)
        else:
            place = 0
            while (interface, bus, place) in taken:
                place += 1
                if most and place >= most:
                    bus, place = bus + 1, 0
        taken.add((interface, bus, place))
        medium = "" if interface not in ("ide", "scsi") else "-cd" if keys.get("media") == "cdrom" else "-hd"
        name = f"{interface}{bus}{medium}{place}" if most else f"{interface}{medium}{place}"
        found[keys.get("id") or name] = number
    return found


def drive_keys(argument: Argument) -> Mapping[str, str] | None:
    """What an argument says of its drive, by the keys of ``-drive``; None where it makes none."""
    if argument.name == "drive":
        properties = argument.properties
        return {key: properties.get(key) for key in properties.names}
    if argument.name in _INTERFACES:
        index = _LETTERS.get(argument.name)
        return {"if": _INTERFACES[argument.name]} | ({} if index is None else {"index": str(index)})
    if not argument.name or argument.name in _LETTERS:
        medium = "cdrom" if argument.name == "cdrom" else "disk"
        return {"media": medium, "index": str(_LETTERS.get(argument.name, 0))}
    return None


def keys_of_name(name: str) -> dict[str, str]:
    """The keys of ``-drive`` that make a drive of this name: those of the drives that QEMU makes by itself, else an
    id.
    """
    if not _IMPLIED.fullmatch(name):
        return {"if": "none", "id": name}
    interface, bus, medium, unit = re.fullmatch(r"([a-z]+)(\d+)(?:-(hd|cd)(\d+))?", name).groups()  # type: ignore[union-attr]
    if unit is None:
        return {"if": interface, "unit": bus}
    return {"if": interface, "media": "cdrom" if medium == "cd" else "disk", "bus": bus, "unit": unit}
