"""The arguments of a command line that make disks: the same with another image or without one, and new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vmsnap_drivers.qemu.block_drivers import PROTOCOLS
from vmsnap_drivers.qemu.commandline import Argument, Properties
from vmsnap_drivers.qemu.drive_names import drive_keys

_KEPT_OF_A_NODE: Final = ("discard", "detect-zeroes")
_KEPT_OF_THE_FILE: Final = ("aio", "cache.direct", "cache.no-flush", *_KEPT_OF_A_NODE)
_KEPT_OF_A_LUN: Final = ("user", "password-secret", "initiator-name", "header-digest", "timeout")
"""Who the VM is to the target of a LUN; the secret is an object, which is named here (``qapi/block-core.json``)."""
_KEPT_OF_A_DRIVE_WORDS: Final = """
    if bus unit index media id cache aio discard detect-zeroes werror rerror snapshot readonly read-only serial
    throttling copy-on-read
"""
_KEPT_OF_A_DRIVE: Final = frozenset(_KEPT_OF_A_DRIVE_WORDS.split())


def with_image(argument: Argument, address: str, image_format: str, others: Sequence[Argument] = ()) -> Argument:
    """The argument that makes the same disk on another image: a file, a block device, or a URL. From one LUN to another
    the account stays the same.

    :param others: the command line, where the node of the image may have an argument of its own
    """
    file = _file_of(argument, others)
    account = _account(file) if address.startswith("iscsi://") else {}
    if argument.name == "blockdev":
        node = _node(argument.properties, file, address, image_format)
        if isinstance(node["file"], dict):
            node["file"].update(account)
        return Argument("blockdev", json.dumps(node))
    keys = drive_keys(argument) or {}
    kept = {
        key: value
        for key, value in keys.items()
        if key in _KEPT_OF_A_DRIVE or key.startswith(("throttling.", "cache."))
    }
    kept |= {f"file.{key}": str(value) for key, value in account.items()}
    return Argument("drive", _drive(kept, address, image_format))


def without_image(argument: Argument) -> Argument:
    """The ``-drive`` that makes the same disk with no medium in it."""
    keys = drive_keys(argument) or {}
    kept = [(key, keys[key]) for key in ("if", "bus", "unit", "index", "media", "id") if key in keys]
    return Argument("drive", Properties(kept).text())


def image_of(argument: Argument) -> str:
    """The image that a drive's argument names; empty where it names none."""
    if argument.name == "drive":
        return argument.properties.get("file") or argument.properties.get("file.filename")
    return argument.value or ""


def new_drive(keys: Mapping[str, str], address: str, image_format: str, *, read_only: bool) -> Argument:
    """A ``-drive`` on an image."""
    given = {**keys, "readonly": "on"} if read_only and keys.get("media") != "cdrom" else keys
    return Argument("drive", _drive(given, address, image_format))


def new_node(name: str, address: str, image_format: str, *, read_only: bool) -> Argument:
    """A ``-blockdev`` on an image."""
    old = Properties([("node-name", name)] + ([("read-only", "on")] if read_only else []))
    return Argument("blockdev", json.dumps(_node(old, _File(old, "file."), address, image_format)))


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


@dataclass(frozen=True)
class _File:
    """The options of a disk's file, which have all `prefix` before their names."""

    properties: Properties
    prefix: str

    def get(self, key: str) -> str:
        return self.properties.get(f"{self.prefix}{key}")


def _file_of(argument: Argument, others: Sequence[Argument]) -> _File:
    """They stand beside those of the disk, or are those of the disk, which has no node of its format then, or they
    stand in the argument of a node that the disk's names.
    """
    properties = argument.properties
    if (properties.get("driver") or properties.get("format")) in PROTOCOLS:
        return _File(properties.without(*_KEPT_OF_A_NODE), "")
    for other in others:
        if other.name == "blockdev" and other.properties.get("node-name", "\0") == properties.get("file"):
            return _File(other.properties, "")
    return _File(properties, "file.")


def _account(file: _File) -> dict[str, object]:
    """What is kept of a LUN."""
    if file.get("driver") != "iscsi":
        return {}
    kept = {key: file.get(key) for key in _KEPT_OF_A_LUN}
    return {key: int(value) if key == "timeout" else value for key, value in kept.items() if value}


def _references(properties: Properties) -> list[str]:
    return [
        properties.get(key)
        for key in properties.names
        if key.split(".")[-1] in ("file", "backing", "data-file", "target")
    ]


def _drive(kept: Mapping[str, str], address: str, image_format: str) -> str:
    return Properties([("file", address), ("format", image_format), *kept.items()]).text()


def _node(old: Properties, file: _File, address: str, image_format: str) -> dict[str, object]:
    node: dict[str, object] = {"node-name": old.get("node-name"), "driver": image_format}
    if old.get("read-only"):
        node["read-only"] = old.get("read-only") == "on"
    node.update({key: old.get(key) for key in _KEPT_OF_A_NODE if old.get(key)})
    if "://" in address:
        node["file"] = {"driver": address.partition(":")[0], **_location(address)}
        return node
    protocol: dict[str, object] = {
        "driver": "host_device" if address.startswith("/dev/") and not address.startswith("/dev/shm/") else "file"
    }
    protocol["filename"] = address
    for key in _KEPT_OF_THE_FILE:
        value = file.get(key)
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
