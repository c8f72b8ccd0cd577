"""One SFTP conversation: requests go out without waiting for the answers to earlier ones, so that the distance to the
server costs one round trip for many of them instead of one for each.

paramiko's own SFTP client is not used: it asks for 32 KiB at a time, keeps what it reads in a dictionary that it
searches for every block, and hides which extensions the server has. Its transport and its channels are used.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from paramiko import SSHException

from vmsnap_storage_backends.sftp.wire import (
    LIMITS,
    MAX_PACKET_BYTES,
    VERSION,
    Code,
    Fields,
    Kind,
    Limits,
    Malformed,
    limits,
    text,
)

T = TypeVar("T")

_HEADER = struct.Struct(">IBI")
_RECEIVE_BYTES = 4 << 20
# One packet of SSH: 32 KiB is what every server takes, and paramiko keeps 64 of it for itself.
_SEND_BYTES = (32 << 10) - 64
# Each message costs the interpreter a fifth of a millisecond: requests for data are small, and go by the dozen.
_TOGETHER_BYTES = 4 << 10
# What is received before anything of it is looked at, of data that comes fast.
_STRETCH_BYTES = 8 << 20
# A listing of many names has many small packets, and none of them is as long as that.
_MOST_BYTES = MAX_PACKET_BYTES + 4096


class Channel(Protocol):
    """What is needed of a paramiko channel, whose time-out is set."""

    def send(self, s: bytes, /) -> int:
        """Send some of it and return how much; 0 when the channel is closed."""

    def recv(self, nbytes: int, /) -> bytes:
        """Some bytes; none when the channel is closed."""

    def recv_ready(self) -> bool:
        """Whether there are bytes to be had without waiting."""

    def close(self) -> None:
        """Close it."""


class Refused(Exception):
    """The server answered that it did not do it. `code` is one of `Code`, or another number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Lost(Exception):
    """The connection broke or the server fell silent: nobody knows what it did of the last requests."""


class Conversation:
    """Speaks with the server. Used by one thread at a time; of no more use after `Lost`.

    `in_order`: whether the server is known to carry requests out one after the other, as OpenSSH does.
    `answer_seconds`: how long it took to answer once, where it was asked.
    """

    def __init__(self, channel: Channel, *, in_order: bool = False, gather: Callable[[int], None]) -> None:
        """Greet the server and hear what it can.

        :param gather: waits until `channel` has so many bytes, while they come
        :raises Lost: it does not speak SFTP, or not any more
        """
        self.in_order = in_order
        self.lost = False
        self._channel = channel
        self._gather = gather
        self._last = 0
        self._unsent: list[bytes | memoryview] = []
        self._heard: memoryview = memoryview(b"")
        self._early: dict[int, tuple[int, Sequence[memoryview]]] = {}
        self._forgotten: set[int] = set()
        self.extensions = self._greet()
        self.limits = Limits()
        self.answer_seconds: float | None = None
        if LIMITS in self.extensions:
            begun = time.monotonic()
            self.limits = limits(self.call(Kind.EXTENDED, text(LIMITS)).rest())
            self.answer_seconds = time.monotonic() - begun

    def ask(self, kind: Kind, *parts: bytes | memoryview) -> int:
        """Make a request and return its number, by which `answer` finds what the server says to it. Small requests go
        out together, when an answer is waited for or one of them is forgotten.

        :raises Lost: the connection broke
        """
        self._last = self._last + 1 & 0xFFFFFFFF
        length = 5 + sum(len(part) for part in parts)
        self._unsent += [_HEADER.pack(length, kind, self._last), *parts]
        if length > _TOGETHER_BYTES:
            self._send_all()
        return self._last

    def answer(self, request: int) -> Fields:
        """Wait for the answer to a request, but of one for data; the fields behind its number.

        :raises Refused: the server did not do it
        :raises Lost: the connection broke, or the server is silent
        """
        return Fields(_joined(self._wait_for(request)))

    def data(self, request: int, coming_bytes: int) -> Sequence[memoryview]:
        """Wait for the answer to a request for data, which is left as it came.

        :param coming_bytes: how much data was asked for and has not been waited for yet, this included
        :raises Refused: the server did not do it; `Code.EOF` where the file ends
        :raises Lost: the connection broke, or the server is silent
        """
        if request not in self._early and not self.has_heard():
            self._send_all()
            self._gather(min(coming_bytes, _STRETCH_BYTES))
        return self._wait_for(request)

    def call(self, kind: Kind, *parts: bytes | memoryview) -> Fields:
        """`ask` and `answer`."""
        return self.answer(self.ask(kind, *parts))

    def forget(self, *requests: int) -> None:
        """Pay no heed to the answers to these requests."""
        for request in requests:
            if self._early.pop(request, None) is None:
                self._forgotten.add(request)
        self._send_all()

    def has_heard(self) -> bool:
        """Whether some answer may be had without waiting."""
        return bool(self._heard) or self._channel.recv_ready()

    def close(self) -> None:
        """End it; idempotent."""
        self.lost = True
        self._channel.close()

    # -- inside

    def _greet(self) -> frozenset[str]:
        self._unsent.append(struct.pack(">IBI", 5, Kind.INIT, VERSION))
        self._send_all()
        packet = self._packet()
        if packet[0] != Kind.VERSION:
            raise self._broken("the server does not speak SFTP")
        fields = Fields(packet[1:])
        version, extensions = self._parsed(lambda: (fields.u32(), fields.extensions()))
        if version < VERSION:
            raise self._broken(f"the server speaks SFTP version {version}, and {VERSION} is needed")
        return extensions

    def _send_all(self) -> None:
        unsent = memoryview(b"".join(self._unsent))
        self._unsent.clear()
        try:
            while unsent:
                sent = self._channel.send(bytes(unsent[:_SEND_BYTES]))
                if not sent:
                    raise EOFError
                unsent = unsent[sent:]
        except (OSError, EOFError, SSHException) as e:
            raise self._broken(_reason(e)) from e

    def _wait_for(self, request: int) -> Sequence[memoryview]:
        self._send_all()
        while request not in self._early:
            number, kind, parts = self._hear()
            if number in self._forgotten:
                self._forgotten.discard(number)
            else:
                self._early[number] = kind, parts
        kind, parts = self._early.pop(request)
        if kind == Kind.STATUS:
            fields = Fields(_joined(parts))
            code, message = self._parsed(lambda: (fields.u32(), fields.name()))
            if code != Code.OK:
                raise Refused(code, message)
        return parts

    def _hear(self) -> tuple[int, int, Sequence[memoryview]]:
        length, kind, number = _HEADER.unpack(self._take(_HEADER.size))
        rest = self._checked(length) - (_HEADER.size - 4)
        if rest >= 4 and kind == Kind.DATA:
            count = int.from_bytes(self._take(4), "big")
            if count != rest - 4:
                raise self._broken("the server gives data of another length than it says")
            rest = count
        if rest < 0:
            raise self._broken("a packet of the server is cut short")
        return number, kind, self._parts(rest)

    def _packet(self) -> memoryview:
        return self._take(self._checked(int.from_bytes(self._take(4), "big")))

    def _checked(self, length: int) -> int:
        if not 1 <= length <= _MOST_BYTES:
            raise self._broken("the server does not speak SFTP")
        return length

    def _take(self, count: int) -> memoryview:
        return _joined(self._parts(count))

    def _parts(self, count: int) -> Sequence[memoryview]:
        """The next bytes, as they came."""
        parts = []
        while count:
            if not self._heard:
                self._gather(count)
                self._heard = self._receive()
            part, self._heard = self._heard[:count], self._heard[count:]
            parts.append(part)
            count -= len(part)
        return parts

    def _receive(self) -> memoryview:
        try:
            received = self._channel.recv(_RECEIVE_BYTES)
        except (OSError, EOFError, SSHException) as e:
            raise self._broken(_reason(e)) from e
        if not received:
            raise self._broken("the server closed the connection")
        return memoryview(received)

    def _parsed(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except Malformed as e:
            raise self._broken(str(e)) from e

    def _broken(self, reason: str) -> Lost:
        self.lost = True
        return Lost(reason)


def _joined(parts: Sequence[memoryview]) -> memoryview:
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "the server does not answer"
    return getattr(error, "strerror", None) or str(error) or "the connection broke"
