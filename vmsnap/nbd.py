"""A small NBD client that writes: what is needed to bring a backup onto an image that qemu-nbd serves.

Source: ``doc/proto.md`` of the NBD project: fixed newstyle negotiation with ``NBD_OPT_GO``; simple replies for reading
and writing; structured replies on connections that ask for ``base:allocation`` and do nothing else. All fields are in
network byte order. (Snapshot drivers have a client of their own, which reads with many requests in flight.)
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmsnap.errors import StorageError

_SERVER_MAGIC: Final = 0x4E42444D41474943
_OPTION_MAGIC: Final = 0x49484156454F5054
_OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_SIMPLE_REPLY_MAGIC: Final = 0x67446698
_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_GO, _STRUCTURED_REPLY, _SET_META_CONTEXT = 7, 8, 10
_ACK, _INFO, _META_CONTEXT, _ERROR_BIT = 1, 3, 4, 1 << 31
_READ, _WRITE, _DISCONNECT, _FLUSH, _WRITE_ZEROES, _BLOCK_STATUS = 0, 1, 2, 3, 6, 7
_IS_READ_ONLY, _CAN_FLUSH, _CAN_WRITE_ZEROES = 1 << 1, 1 << 2, 1 << 6
_CHUNK_DONE, _CHUNK_NONE, _CHUNK_BLOCK_STATUS = 1, 0, 5
_STATE_ZERO: Final = 2
_ALLOCATION: Final = b"base:allocation"

_GREETING: Final = struct.Struct(">QQH")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE_REPLY: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")
_MOST_BYTES: Final = 32 << 20
"""What every server takes in one request."""
_MOST_ZEROS: Final = 1 << 30
_MOST_ANSWER: Final = 16 << 20
_TIMEOUT_SECONDS: Final = 300


class NbdConnection:
    """One connection to a server's default export, with one request under way at a time. Used by one thread at a time.

    After an error it can carry nothing any more.
    """

    def __init__(self, path: Path, label: str, *, status: bool = False) -> None:
        """Connect and negotiate. Blocks.

        :param path: the UNIX socket on which the server listens
        :param label: what messages call the image
        :param status: for `data_ranges`, and for nothing else
        :raises ConnectionRefusedError, FileNotFoundError: nobody listens (yet)
        :raises StorageError: the server breaks the protocol, or does not offer what is needed
        """
        self._label = label
        self._cookie = 0
        self._context = -1
        self.size_bytes = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            timeout = struct.pack("@ll", _TIMEOUT_SECONDS, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            self._socket.connect(str(path))
            self._negotiate(status)
        except BaseException:
            self._socket.close()
            raise

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Blocks.

        :raises StorageError: it cannot be read
        """
        for at in range(0, len(buffer), _MOST_BYTES):
            part = buffer[at : at + _MOST_BYTES]
            self._request(_READ, offset + at, len(part))
            self._receive_into(part)

    def write(self, offset: int, contents: Sequence[bytes | memoryview]) -> None:
        """Write `contents`, one after the other, from `offset` on. Blocks.

        :raises StorageError: it cannot be written
        """
        for content in contents:
            for at in range(0, len(content), _MOST_BYTES):
                part = memoryview(content)[at : at + _MOST_BYTES]
                self._request(_WRITE, offset, len(part), part)
                offset += len(part)

    def write_zeros(self, offset: int, length: int) -> None:
        """Make zeros of a range, which then takes no room if the server can. Blocks.

        :raises StorageError: it cannot be written
        """
        for at in range(0, length, _MOST_ZEROS):
            self._request(_WRITE_ZEROES, offset + at, min(_MOST_ZEROS, length - at))

    def flush(self) -> None:
        """Return when all that was written over this connection is durable. Blocks.

        :raises StorageError: it could not be written
        """
        self._request(_FLUSH, 0, 0)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length of what may be something else than zeros, ascending. Blocks.

        :raises StorageError: the server cannot tell
        """
        end = offset + length
        while offset < end:
            for covered, state in self._ask_status(offset, min(_MOST_ZEROS, end - offset)):
                covered = min(covered, end - offset)
                if covered and not state & _STATE_ZERO:
                    yield offset, covered
                offset += covered

    def close(self) -> None:
        """Say good-bye and hang up; idempotent."""
        if self._socket.fileno() >= 0:
            with suppress(OSError):  # the server has hung up
                self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
            self._socket.close()

    # -- the protocol

    def _negotiate(self, status: bool) -> None:
        magic, option_magic, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if magic != _SERVER_MAGIC or option_magic != _OPTION_MAGIC or not flags & _FIXED_NEWSTYLE:
            raise self._broken("it does not greet as an NBD server does")
        self._send(struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))
        if status:
            self._ask(_STRUCTURED_REPLY, b"")
            query = struct.pack(">III", 0, 1, len(_ALLOCATION)) + _ALLOCATION
            for kind, answer in self._ask(_SET_META_CONTEXT, query):
                if kind == _META_CONTEXT and answer[4:] == _ALLOCATION:
                    self._context = int.from_bytes(answer[:4], "big")
            if self._context < 0:
                raise self._broken("it does not tell what is allocated")
        flags = 0
        for kind, answer in self._ask(_GO, struct.pack(">IH", 0, 0)):
            if kind == _INFO and len(answer) == 12 and answer[:2] == b"\0\0":
                self.size_bytes, flags = struct.unpack(">QH", answer[2:])
        needed = _CAN_FLUSH | _CAN_WRITE_ZEROES
        if self.size_bytes < 0 or flags & _IS_READ_ONLY or flags & needed != needed:
            raise self._broken("it does not offer to write, to flush and to write zeros")

    def _ask(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        self._send(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        answers: list[tuple[int, bytes]] = []
        while True:
            magic, about, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or about != option or length > _MOST_ANSWER or len(answers) > 100:
                raise self._broken("it answered an option that was not asked")
            answer = self._receive(length)
            if kind & _ERROR_BIT:
                raise self._broken(f"it refused option {option}: {answer.decode(errors='replace')}")
            if kind == _ACK:
                return answers
            answers.append((kind, answer))

    def _request(self, command: int, offset: int, length: int, data: memoryview | None = None) -> None:
        self._send_request(command, offset, length)
        if data is not None:
            self._send(data)
        magic, error, cookie = _SIMPLE_REPLY.unpack(self._receive(_SIMPLE_REPLY.size))
        if magic != _SIMPLE_REPLY_MAGIC or cookie != self._cookie:
            raise self._broken("what it sent is no reply to what was asked")
        if error:
            raise self._broken(f"it failed a request at {offset} with error {error}")

    def _ask_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        self._send_request(_BLOCK_STATUS, offset, length)
        found: list[tuple[int, int]] = []
        while True:
            magic, flags, kind, cookie, size = _CHUNK.unpack(self._receive(_CHUNK.size))
            if magic != _STRUCTURED_REPLY_MAGIC or cookie != self._cookie or size > _MOST_ANSWER:
                raise self._broken("what it sent is no reply to what was asked")
            answer = self._receive(size)
            if kind == _CHUNK_BLOCK_STATUS and size % 8 == 4 and int.from_bytes(answer[:4], "big") == self._context:
                found = list(struct.iter_unpack(">II", answer[4:]))
            elif kind != _CHUNK_NONE:
                raise self._broken(f"it replied with a chunk of type {kind}")
            if flags & _CHUNK_DONE:
                break
        if not sum(covered for covered, _ in found):
            raise self._broken("it did not tell what is allocated")
        return found

    def _send_request(self, command: int, offset: int, length: int) -> None:
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length))

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.sendall(data)
        except OSError as e:
            raise self._broken(e.strerror or "it takes nothing") from e

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, buffer: memoryview) -> None:
        while buffer:
            try:
                count = self._socket.recv_into(buffer, 0, socket.MSG_WAITALL)
            except OSError as e:
                raise self._broken(e.strerror or "it sends nothing") from e
            if not count:
                raise self._broken("it hung up")
            buffer = buffer[count:]

    def _broken(self, what: str) -> StorageError:
        self._socket.close()
        return StorageError(f"the NBD server of {self._label} cannot be used: {what}")
