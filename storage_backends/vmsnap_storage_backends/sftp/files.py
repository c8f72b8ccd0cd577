"""The content of files on a server, written and read in as few round trips as it can be."""

from __future__ import annotations

import struct
from collections import deque
from contextlib import suppress

from vmsnap_storage_backends.sftp.conversation import Conversation, Refused
from vmsnap_storage_backends.sftp.wire import (
    FSYNC,
    Code,
    Kind,
    Malformed,
    Mode,
    attributes,
    text,
)

# What may be on its way to us at once: enough for 250 MB/s from 100 ms away, and what a conversation holds in memory.
_AHEAD_BYTES = 24 << 20
_FILE_MODE = 0o600


class CutShort(Exception):
    """A file ends before the range that was asked for. `size_bytes` is what it has."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.size_bytes = size_bytes


class NotAFile(Exception):
    """There is a folder or something else of that name."""


def write_new(talk: Conversation, path: str, data: memoryview) -> int | None:
    """Make the file `path` with `data`, on the server's disk where it can say so, and close it.

    Returns the server's time, where it tells. The file may be there in part after an exception.

    :raises Refused: the server did not do it
    """
    handle = _open(talk, path, Mode.WRITE | Mode.CREATE | Mode.EXCLUSIVE)
    waiting: deque[int] = deque()
    looked: list[int] = []
    try:
        length = talk.limits.write_bytes
        for at in range(0, len(data), length):
            part = data[at : at + length]
            place = struct.pack(">QI", at, len(part))
            waiting.append(talk.ask(Kind.WRITE, handle, place, part))
            # A disk that is full says so at once, and spares sending the rest.
            while waiting and talk.has_heard():
                talk.answer(waiting.popleft())
        if FSYNC in talk.extensions:
            waiting.append(talk.ask(Kind.EXTENDED, text(FSYNC), handle))
        looked.append(talk.ask(Kind.FSTAT, handle))
        while waiting:
            talk.answer(waiting.popleft())
        with suppress(Refused):
            return talk.answer(looked.pop()).attributes().mtime
        return None
    except Refused:
        talk.forget(*waiting, *looked)
        raise
    finally:
        # Also what was refused is closed; that a file is closed says nothing that its fsync has not said.
        if not talk.lost:
            talk.forget(talk.ask(Kind.CLOSE, handle))


def read_range(talk: Conversation, path: str, offset: int, length: int | None) -> bytes:
    """The bytes of a file from `offset`, `length` or all.

    :raises Refused: the server did not do it
    :raises CutShort: the file has not so many
    :raises NotAFile: it is none
    """
    handle = _open(talk, path, Mode.READ)
    try:
        looking = talk.ask(Kind.FSTAT, handle)
        # With the look goes the first request for data, which is all that a small object needs.
        most = talk.limits.read_bytes
        first = most if length is None else min(most, length)
        early = talk.ask(Kind.READ, handle, struct.pack(">QI", offset, first)) if first else None
        found = talk.answer(looking).attributes()
        size = found.size_bytes if found.size_bytes is not None else -1
        end = size if length is None else offset + length
        if not found.is_file or size < 0 or end > size or offset > size:
            if early is not None:
                talk.forget(early)
            if not found.is_file or size < 0:
                raise NotAFile
            raise CutShort(size)
        return _read(talk, handle, offset, end, early, first)
    finally:
        if not talk.lost:
            talk.forget(talk.ask(Kind.CLOSE, handle))


def _read(talk: Conversation, handle: bytes, start: int, end: int, early: int | None, first: int) -> bytes:
    if end <= start:
        if early is not None:
            talk.forget(early)
        return b""
    content: list[memoryview] = []
    most = talk.limits.read_bytes
    waiting: deque[tuple[int, int, int]] = deque()
    if early is not None:
        waiting.append((early, start, min(first, end - start)))
    asked = start + (first if early is not None else 0)
    try:
        while waiting or asked < end:
            while asked < end and asked - (waiting[0][1] if waiting else asked) < _AHEAD_BYTES:
                count = min(most, end - asked)
                waiting.append((talk.ask(Kind.READ, handle, struct.pack(">QI", asked, count)), asked, count))
                asked += count
            request, at, count = waiting.popleft()
            parts = talk.data(request, asked - at)
            content += parts
            came = sum(len(part) for part in parts)
            if came > count:
                raise Malformed("the server gives more data than it was asked for")
            if came < count:
                # A server may give less than it is asked for.
                if not came:
                    raise CutShort(at)
                at, count = at + came, count - came
                again = talk.ask(Kind.READ, handle, struct.pack(">QI", at, count))
                waiting.appendleft((again, at, count))
    except Refused as e:
        talk.forget(*(request for request, _, _ in waiting))
        if e.code == Code.EOF:
            raise CutShort(at) from e
        raise
    return b"".join(content)


def _open(talk: Conversation, path: str, mode: Mode) -> bytes:
    permissions = attributes(_FILE_MODE if mode & Mode.CREATE else None)
    return text(bytes(talk.call(Kind.OPEN, text(path), struct.pack(">I", mode), permissions).string()))
