"""What a folder of a WebDAV server holds: PROPFIND (RFC 4918, 9.1) asked and understood."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from vmsnap.errors import StorageError

ASK = b'<?xml version="1.0"?><propfind xmlns="DAV:"><prop><resourcetype/><getcontentlength/></prop></propfind>'
_DAV = "{DAV:}"


@dataclass(frozen=True, order=True)
class Entry:
    """One name in a folder."""

    name: str
    folder: bool
    size_bytes: int


def entries_in(answer: bytes, where: str) -> list[Entry]:
    """What a folder holds, by the server's answer to `ASK` with ``Depth: 1``; the folder itself is left out.

    :raises StorageError: the answer cannot be understood
    """
    try:
        responses = ET.fromstring(answer).findall(f"{_DAV}response")
        named = [(_path(response), response) for response in responses]
    except (ET.ParseError, ValueError) as e:
        raise StorageError(f"{where}: the server's list of a folder cannot be read: {e}") from e
    if not named:
        raise StorageError(f"{where}: the server's list of a folder is empty, and lacks the folder itself")
    # The folder itself is the one whose path all others begin with.
    shortest = min((path for path, _ in named), key=len)
    return [_entry(path, response) for path, response in named if path != shortest]


def _path(response: ET.Element) -> str:
    href = response.findtext(f"{_DAV}href")
    if not href:
        raise ValueError("a response without a name")
    return unquote(urlsplit(href).path).rstrip("/")


def _entry(path: str, response: ET.Element) -> Entry:
    folder = response.find(f".//{_DAV}resourcetype/{_DAV}collection") is not None
    size = response.findtext(f".//{_DAV}getcontentlength")
    return Entry(path.rpartition("/")[2], folder, int(size) if size and not folder else 0)
