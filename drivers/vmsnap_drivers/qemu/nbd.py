"""`NbdClient`: reads an export of an NBD server, several requests in flight, straight into the caller's buffer.

It is our own because there is no well-kept NBD client among the Python packages: libnbd's binding comes with the
system's packages only, for the system's Python only, and the others are servers or speak the old negotiation. What a
backup needs of the protocol is small: read, and ask what is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmsnap_drivers.qemu import nbd_wire as wire
from vmsnap_drivers.qemu.nbd_handshake import negotiate
from vmsnap_drivers.qemu.nbd_socket import NbdSocket
from vmsnap_drivers.qemu.nbd_wire import NbdError, NbdRefused

__all__ = ["ALLOCATION", "NbdClient", "NbdError", "NbdRefused", "StatusRange"]

ALLOCATION: Final = "base:allocation"
"""The metadata context that tells holes and zeros from data."""

_STATUS_STEP_BYTES: Final = 1 << 30
_ZEROS: Final = memoryview(bytes(1 << 20))


@dataclass(frozen=True)
class StatusRange:
    """A range of an export whose metadata have the same `flags` (``nbd_wire.STATE_…`` for `ALLOCATION`)."""

    offset: int
    length: int
    flags: int


@dataclass
class _Read:
    offset: int
    target: memoryview
    covered: list[tuple[int, int]] = field(default_factory=list)
    error: NbdRefused | None = None

    def claim(self, offset: int, length: int) -> memoryview | None:
        """The part of the buffer for that range of the export, once; None where it is not this request's or came
        before.
        """
        start, end = offset - self.offset, offset - self.offset + length
        if length < 1 or start < 0 or end > len(self.target) or any(a < end and start < b for a, b in self.covered):
            return None
        if self.covered and self.covered[-1][1] == start:
            self.covered[-1] = (self.covered[-1][0], end)
        else:
            self.covered.append((start, end))
        return self.target[start:end]

    def is_whole(self) -> bool:
        return sum(end - start for start, end in self.covered) == len(self.target)


class NbdClient:
    """One connection to one export. Used by one thread at a time.

    Reads are answered in one piece where the server offers that: QEMU then reads and nothing else, instead of looking
    for holes first. They are cut at multiples of `request_bytes`, so that no two requests in flight share a sector and
    none crosses a border that matters to the server.

    After an `NbdRefused` it can be used on; after any other `NbdError` it is closed.

    :param path: the UNIX socket on which the server listens
    :param export: the export's name
    :param contexts: metadata contexts to ask for; see `contexts`
    :param timeout_seconds: how long the server may send nothing
    :param request_bytes: the longest single request; what is longer is split
    :param in_flight: how many requests are under way at once
    :raises NbdError: nobody listens, no such export, or the server breaks the protocol
    """

    def __init__(
        self,
        path: Path,
        export: str,
        *,
        contexts: Sequence[str] = (ALLOCATION,),
        timeout_seconds: float = 30.0,
        request_bytes: int = 256 * 1024,
        in_flight: int = 8,
    ) -> None:
        self._socket = NbdSocket(path, timeout_seconds)
        try:
            self._export = negotiate(self._socket, export, contexts)
        except BaseException:
            self._socket.close()
            raise
        self._request_bytes = min(request_bytes, self._export.longest_request_bytes)
        self._in_flight = in_flight
        self._next_cookie = 0
        self._header = memoryview(bytearray(wire.CHUNK.size))
        whole = self._export.flags & wire.TRANSMISSION_CAN_READ_WHOLE
        self._read_flags = wire.COMMAND_FLAG_WHOLE if whole else 0

    @property
    def size_bytes(self) -> int:
        """The size of the export."""
        return self._export.size_bytes

    @property
    def read_only(self) -> bool:
        """The server takes no writes."""
        return bool(self._export.flags & wire.TRANSMISSION_READ_ONLY)

    @property
    def contexts(self) -> frozenset[str]:
        """The metadata contexts that the server granted."""
        return frozenset(self._export.contexts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill all of `buffer` (writable, contiguous bytes) from `offset`. Blocks.

        :raises NbdRefused: the server could not read; `buffer` holds anything
        :raises NbdError: the range leaves the export, or the connection is lost
        """
        target = buffer.cast("B")
        if offset < 0 or offset + len(target) > self.size_bytes:
            raise NbdError(f"{len(target)} bytes from {offset} leave the export of {self.size_bytes} bytes")
        asked: dict[int, _Read] = {}
        position = 0
        error: NbdRefused | None = None
        try:
            while position < len(target) or asked:
                while position < len(target) and len(asked) < self._in_flight and error is None:
                    start = offset + position
                    part = target[position : position + self._request_bytes - start % self._request_bytes]
                    asked[self._request(wire.COMMAND_READ, start, len(part), self._read_flags)] = _Read(start, part)
                    position += len(part)
                if not asked:
                    break
                error = self._take_read_chunk(asked) or error
        except BaseException:
            # Replies are still under way: nothing that follows could be told from them.
            self._socket.close()
            raise
        if error is not None:
            raise error

    def ranges(self, context: str = ALLOCATION, offset: int = 0, length: int | None = None) -> Iterator[StatusRange]:
        """Yield the metadata of `length` bytes from `offset` (None: to the end), ascending, without gap or overlap,
        adjacent ranges of the same flags merged. Lazily, in bounded memory.

        :raises NbdRefused: the server could not tell
        :raises NbdError: the context was not granted, the range leaves the export, or the connection is lost
        """
        end = self.size_bytes if length is None else offset + length
        if context not in self._export.contexts:
            raise NbdError(f"the NBD server does not tell {context}")
        if not 0 <= offset <= end <= self.size_bytes:
            raise NbdError(f"bytes {offset} to {end} leave the export of {self.size_bytes} bytes")
        pending: StatusRange | None = None
        while offset < end:
            step = min(_STATUS_STEP_BYTES, end - offset)
            for covered, flags in self._ask_status(context, offset, step):
                covered = min(covered, end - offset)
                if pending is not None and pending.flags == flags:
                    pending = StatusRange(pending.offset, pending.length + covered, flags)
                else:
                    if pending is not None:
                        yield pending
                    pending = StatusRange(offset, covered, flags)
                offset += covered
                if offset == end:
                    break
        if pending is not None:
            yield pending

    def close(self) -> None:
        """Say good-bye and hang up; idempotent."""
        if self._socket.closed:
            return
        try:
            self._request(wire.COMMAND_DISCONNECT, 0, 0)
        except NbdError:
            return  # the server hung up first
        self._socket.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, command: int, offset: int, length: int, flags: int = 0) -> int:
        cookie = self._next_cookie
        self._next_cookie = (cookie + 1) % (1 << 64)
        self._socket.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, cookie, offset, length))
        return cookie

    def _receive_chunk(self) -> tuple[int, int, int, int]:
        """The head of the next reply: flags, type, cookie, length of what follows."""
        short = self._header[: wire.SIMPLE_REPLY.size]
        self._socket.receive_into(short)
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(short)
        if magic == wire.SIMPLE_REPLY_MAGIC:
            if not error:
                raise self._socket.broken("it sent a reply without structure")
            raise self._socket.broken(f"it failed a request with error {error}, cookie {cookie}")
        if magic != wire.STRUCTURED_REPLY_MAGIC:
            raise self._socket.broken("what it sent is no reply")
        self._socket.receive_into(self._header[len(short) :])
        _, flags, kind, cookie, length = wire.CHUNK.unpack(self._header)
        return flags, kind, cookie, length

    def _take_read_chunk(self, asked: dict[int, _Read]) -> NbdRefused | None:
        flags, kind, cookie, length = self._receive_chunk()
        read = asked.get(cookie)
        if read is None:
            raise self._socket.broken("it replied to a request that was not made")
        if kind == wire.CHUNK_DATA and length > 8:
            offset = int.from_bytes(self._socket.receive(8), "big")
            self._socket.receive_into(self._claim(read, offset, length - 8))
        elif kind == wire.CHUNK_HOLE and length == 12:
            answer = self._socket.receive(12)
            hole = self._claim(read, int.from_bytes(answer[:8], "big"), int.from_bytes(answer[8:], "big"))
            for start in range(0, len(hole), len(_ZEROS)):
                part = hole[start : start + len(_ZEROS)]
                part[:] = _ZEROS[: len(part)]
        elif kind & wire.CHUNK_ERROR_BIT:
            read.error = self._receive_error(kind, length)
        elif kind != wire.CHUNK_NONE or length or not flags & wire.CHUNK_DONE:
            raise self._socket.broken(f"it replied to a read with a chunk of type {kind}, length {length}")
        if not flags & wire.CHUNK_DONE:
            return None
        del asked[cookie]
        if read.error is None and not read.is_whole():
            raise self._socket.broken("it left out a part of what was asked")
        return read.error

    def _claim(self, read: _Read, offset: int, length: int) -> memoryview:
        place = read.claim(offset, length)
        if place is None:
            raise self._socket.broken(f"it sent {length} bytes at {offset} that were not asked, or twice")
        return place

    def _receive_error(self, kind: int, length: int) -> NbdRefused:
        if not 6 <= length <= 6 + wire.LONGEST_STRING + 8:
            raise self._socket.broken(f"its error message is {length} bytes long")
        answer = self._socket.receive(length)
        number = int.from_bytes(answer[:4], "big")
        text_length = int.from_bytes(answer[4:6], "big")
        tail = 8 if kind == wire.CHUNK_ERROR_OFFSET else 0
        if not number or 6 + text_length + tail > length:
            raise self._socket.broken("its error message has not the protocol's form")
        text = answer[6 : 6 + text_length].decode(errors="replace")
        return NbdRefused(f"the NBD server failed a request: {text or 'no reason given'} (error {number})", number)

    def _ask_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        wanted = self._request(wire.COMMAND_BLOCK_STATUS, offset, length)
        found: list[tuple[int, int]] | None = None
        error: NbdRefused | None = None
        done = 0
        while not done:
            flags, kind, cookie, size = self._receive_chunk()
            if cookie != wanted:
                raise self._socket.broken("it replied to a request that was not made")
            if kind == wire.CHUNK_BLOCK_STATUS:
                number, extents = self._receive_extents(size)
                if number == self._export.contexts[context]:
                    if found is not None:
                        raise self._socket.broken("it told the same metadata twice")
                    found = extents
                elif number not in self._export.contexts.values():
                    raise self._socket.broken("it told metadata that were not asked")
            elif kind & wire.CHUNK_ERROR_BIT:
                error = self._receive_error(kind, size)
            elif kind != wire.CHUNK_NONE or size or not flags & wire.CHUNK_DONE:
                raise self._socket.broken(f"it replied with a chunk of type {kind}, length {size}")
            done = flags & wire.CHUNK_DONE
        if error is not None:
            raise error
        if found is None:
            raise self._socket.broken(f"it did not tell {context}")
        return found

    def _receive_extents(self, size: int) -> tuple[int, list[tuple[int, int]]]:
        if not 12 <= size <= wire.LONGEST_STATUS or (size - 4) % wire.EXTENT.size:
            raise self._socket.broken(f"its metadata are {size} bytes long")
        answer = self._socket.receive(size)
        extents = list(wire.EXTENT.iter_unpack(memoryview(answer)[4:]))
        if any(not covered for covered, _ in extents):
            raise self._socket.broken("it told metadata of no bytes")
        return int.from_bytes(answer[:4], "big"), extents
