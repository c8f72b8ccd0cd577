"""Which argument of a command line makes which disk, and the same argument with another image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from vmsnap_drivers.qemu.commandline import Argument, Properties

_BY_LETTER: Final = ("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd", "pflash")
_KEPT_OF_THE_FILE: Final = ("aio", "cache.direct", "cache.no-flush", "discard", "detect-zeroes")
_KEPT_OF_A_DRIVE_WORDS: Final = """
    if bus unit index media id cache aio discard detect-zeroes werror rerror snapshot readonly read-only serial
    throttling copy-on-read
"""
_KEPT_OF_A_DRIVE: Final = frozenset(_KEPT_OF_A_DRIVE_WORDS.split())


def find_argument(
    arguments: Sequence[Argument], device: str, node: str, filename: str, taken: Sequence[int] = ()
) -> int | None:
    """The index of the argument that made a disk; None where it cannot be told, as with a hot-plugged one.

    :param device: name of the drive in ``query-block``, empty for disks made by ``-blockdev``
    :param node: name of its top node
    :param filename: name of its image as QEMU has it
    :param taken: indexes that are other disks
    """
    free = [(number, argument) for number, argument in enumerate(arguments) if number not in taken]
    if not device:
        for number, argument in free:
            if argument.name == "blockdev" and argument.properties.get("node-name") == node:
                return number
        return None
    for number, argument in free:
        if argument.name == "drive" and argument.properties.get("id") == device:
            return number
    same = [number for number, argument in free if _image_of(argument) == filename]
    return same[0] if len(same) == 1 else None


def with_image(argument: Argument, address: str, image_format: str) -> Argument:
    """The argument that makes the same disk on another image: a file, a block device, or a URL."""
    if argument.name == "blockdev":
        return Argument("blockdev", json.dumps(_node(argument.properties, address, image_format)))
    if argument.name != "drive":
        letter = argument.name or "hda"
        if letter == "cdrom":
            return Argument("drive", _drive({"media": "cdrom", "index": "2"}, address, image_format))
        if letter in ("pflash", "mtdblock", "sd"):
            return Argument("drive", _drive({"if": {"mtdblock": "mtd"}.get(letter, letter)}, address, image_format))
        kind = {"if": "floppy"} if letter.startswith("f") else {"media": "disk"}
        return Argument("drive", _drive({**kind, "index": str("abcd".index(letter[2]))}, address, image_format))
    old = argument.properties
    kept = {
        key: old.get(key) for key in old.names if key in _KEPT_OF_A_DRIVE or key.startswith(("throttling.", "cache."))
    }
    return Argument("drive", _drive(kept, address, image_format))


def children(arguments: Sequence[Argument], node_names: Sequence[str]) -> set[str]:
    """The nodes below these: the names that their ``-blockdev`` arguments refer to, and theirs in turn."""
    references = {
        argument.properties.get("node-name"): _references(argument.properties)
        for argument in arguments
        if argument.name == "blockdev"
    }
    found: set[str] = set()
    waiting = list(node_names)
    while waiting:
        for name in references.get(waiting.pop(), ()):
            if name in references and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def _references(properties: Properties) -> list[str]:
    return [
        properties.get(key)
        for key in properties.names
        if key.split(".")[-1] in ("file", "backing", "data-file", "target")
    ]


def _image_of(argument: Argument) -> str | None:
    if argument.name == "drive":
        return argument.properties.get("file") or argument.properties.get("file.filename") or None
    return argument.value if not argument.name or argument.name in _BY_LETTER else None


def _drive(kept: Mapping[str, str], address: str, image_format: str) -> str:
    return Properties([("file", address), ("format", image_format), *kept.items()]).text()


def _node(old: Properties, address: str, image_format: str) -> dict[str, object]:
    node: dict[str, object] = {"node-name": old.get("node-name"), "driver": image_format}
    if old.get("read-only"):
        node["read-only"] = old.get("read-only") == "on"
    for key in ("discard", "detect-zeroes"):
        if old.get(key):
            node[key] = old.get(key)
    protocol: dict[str, object] = {}
    if "://" in address:
        node["file"] = {"driver": address.partition(":")[0], **_location(address)}
        return node
    protocol = {
        "driver": "host_device" if address.startswith("/dev/") and not address.startswith("/dev/shm/") else "file"
    }
    protocol["filename"] = address
    for key in _KEPT_OF_THE_FILE:
        value = old.get(f"file.{key}")
        if value and key.startswith("cache."):
            cache = protocol.setdefault("cache", {})
            if isinstance(cache, dict):
                cache[key.partition(".")[2]] = value == "on"
        elif value:
            protocol[key] = value
    node["file"] = protocol
    return node


def _location(address: str) -> dict[str, object]:
    scheme, _, rest = address.partition("://")
    portal, _, path = rest.partition("/")
    if scheme == "iscsi":
        target, _, lun = path.rpartition("/")
        return {"transport": "tcp", "portal": portal, "target": target, "lun": int(lun or 0)}
    host, _, port = portal.partition(":")
    server = {"type": "inet", "host": host, "port": port or "10809"}
    return {"server": server, "export": path} if scheme == "nbd" else {"filename": address}
