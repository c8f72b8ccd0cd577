"""The packets of SFTP version 3 (draft-ietf-secsh-filexfer-02) and of OpenSSH's extensions to it (section 4 of
its ``PROTOCOL`` file).
"""

from __future__ import annotations

import stat
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

VERSION = 3

FSYNC = "fsync@openssh.com"
POSIX_RENAME = "posix-rename@openssh.com"
HARDLINK = "hardlink@openssh.com"
STATVFS = "statvfs@openssh.com"
LIMITS = "limits@openssh.com"

MAX_PACKET_BYTES = 256 << 10
"""What OpenSSH takes (SFTP_MAX_MSG_LENGTH); its data may have 1024 bytes less."""
SAFE_DATA_BYTES = 32 << 10
"""What every server takes in one request (section 3 of the draft)."""


class Kind(IntEnum):
    """The kinds of packets that we send and get."""

    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    WRITE = 6
    FSTAT = 8
    OPENDIR = 11
    READDIR = 12
    REMOVE = 13
    MKDIR = 14
    RMDIR = 15
    REALPATH = 16
    STAT = 17
    RENAME = 18
    STATUS = 101
    HANDLE = 102
    DATA = 103
    NAME = 104
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Mode(IntFlag):
    """How a file is opened."""

    READ = 0x01
    WRITE = 0x02
    CREATE = 0x08
    EXCLUSIVE = 0x20


class Code(IntEnum):
    """What a status says."""

    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    BAD_MESSAGE = 5
    NO_CONNECTION = 6
    CONNECTION_LOST = 7
    UNSUPPORTED = 8


_HAS_SIZE, _HAS_OWNER, _HAS_MODE, _HAS_TIMES, _HAS_MORE = 0x1, 0x2, 0x4, 0x8, 0x80000000
_U32 = struct.Struct(">I")
_STATVFS = struct.Struct(">11Q")
_LIMITS = struct.Struct(">4Q")


class Malformed(Exception):
    """A packet of the server's that is none."""


class Attributes(NamedTuple):
    """What the server says of a file; None where it does not. `mtime` in seconds of its own clock, `owner`
    a number of its own users."""

    size_bytes: int | None = None
    mode: int | None = None
    mtime: int | None = None
    owner: int | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder for sure."""
        return self.mode is not None and stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return self.mode is not None and stat.S_ISLNK(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a plain file, as far as the server says what it is."""
        return self.mode is None or stat.S_ISREG(self.mode)


class Entry(NamedTuple):
    """A name in a folder."""

    name: str
    attributes: Attributes


class Limits(NamedTuple):
    """How many bytes of data a request may ask for or bring."""

    read_bytes: int = SAFE_DATA_BYTES
    write_bytes: int = SAFE_DATA_BYTES


def text(value: str | bytes) -> bytes:
    """A string as it stands in a packet; names are whatever bytes the file system has."""
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    return _U32.pack(len(data)) + data


def attributes(mode: int | None = None) -> bytes:
    """The attributes that a new file or folder is to have."""
    return _U32.pack(0) if mode is None else struct.pack(">II", _HAS_MODE, mode)


class Fields:
    """Takes the fields of a packet one by one.

    Each method raises `Malformed` where the packet ends before its field does.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def u32(self) -> int:
        """A number."""
        return int(_U32.unpack(self._take(4))[0])

    def u64(self) -> int:
        """A large number."""
        return int.from_bytes(self._take(8), "big")

    def string(self) -> memoryview:
        """Bytes with their length before them."""
        return self._take(self.u32())

    def name(self) -> str:
        """A string that is a file name or a message."""
        return bytes(self.string()).decode("utf-8", "surrogateescape")

    def attributes(self) -> Attributes:
        """What is said of a file."""
        flags = self.u32()
        size = self.u64() if flags & _HAS_SIZE else None
        owner = None
        if flags & _HAS_OWNER:
            owner = self.u32()
            self._take(4)
        mode = self.u32() if flags & _HAS_MODE else None
        mtime = None
        if flags & _HAS_TIMES:
            self._take(4)
            mtime = self.u32()
        if flags & _HAS_MORE:
            for _ in range(self.u32()):
                self.string()
                self.string()
        return Attributes(size, mode, mtime, owner)

    def entries(self) -> list[Entry]:
        """The names of a folder."""
        found = []
        for _ in range(self.u32()):
            name = self.name()
            self.string()  # what ls would write
            found.append(Entry(name, self.attributes()))
        return found

    def extensions(self) -> frozenset[str]:
        """The extensions that a server names behind its version."""
        found = set()
        while self._at < len(self._data):
            found.add(self.name())
            self.string()
        return frozenset(found)

    def rest(self) -> memoryview:
        """All that is left."""
        return self._take(len(self._data) - self._at)

    def _take(self, count: int) -> memoryview:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise Malformed("a packet of the server is cut short")
        self._at += count
        return part


def free_bytes(reply: memoryview) -> int:
    """What a ``statvfs@openssh.com`` reply says is free for this user: f_bavail times f_frsize."""
    if len(reply) < _STATVFS.size:
        raise Malformed("a statvfs reply is cut short")
    values = _STATVFS.unpack(reply[: _STATVFS.size])
    return int(values[4] * (values[1] or values[0]))


def limits(reply: memoryview) -> Limits:
    """What a ``limits@openssh.com`` reply allows; 0 stands for no limit."""
    if len(reply) < _LIMITS.size:
        raise Malformed("a limits reply is cut short")
    packet, read, write, _ = _LIMITS.unpack(reply[: _LIMITS.size])
    most = min(packet or MAX_PACKET_BYTES, MAX_PACKET_BYTES) - 1024
    return Limits(*(max(4096, min(value or most, most)) for value in (read, write)))
