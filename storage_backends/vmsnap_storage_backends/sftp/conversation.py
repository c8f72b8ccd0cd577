"""One SFTP conversation: requests go out without waiting for the answers to earlier ones, so that the distance to the
server costs one round trip for many of them instead of one for each.

paramiko's own SFTP client is not used: it asks for 32 KiB at a time, keeps what it reads in a dictionary that it
searches for every block, and hides which extensions the server has. Its transport and its channels are used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
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
    """

    def __init__(self, channel: Channel, *, in_order: bool = False) -> None:
        """Greet the server and hear what it can.

        :raises Lost: it does not speak SFTP, or not any more
        """
        self.in_order = in_order
        self.lost = False
        self._channel = channel
        self._last = 0
        self._heard: memoryview = memoryview(b"")
        self._early: dict[int, tuple[int, Fields]] = {}
        self._forgotten: set[int] = set()
        self.extensions = self._greet()
        self.limits = Limits()
        if LIMITS in self.extensions:
            self.limits = limits(self.call(Kind.EXTENDED, text(LIMITS)).rest())

    def ask(self, kind: Kind, *parts: bytes | memoryview) -> int:
        """Send a request and return its number, by which `answer` finds what the server says to it.

        :raises Lost: the connection broke
        """
        self._last = self._last + 1 & 0xFFFFFFFF
        length = 5 + sum(len(part) for part in parts)
        self._send(b"".join([_HEADER.pack(length, kind, self._last), *parts]))
        return self._last

    def answer(self, request: int) -> Fields:
        """Wait for the answer to a request; the fields behind its number.

        :raises Refused: the server did not do it
        :raises Lost: the connection broke, or the server is silent
        """
        while request not in self._early:
            number, kind, fields = self._hear()
            if number in self._forgotten:
                self._forgotten.discard(number)
            else:
                self._early[number] = kind, fields
        kind, fields = self._early.pop(request)
        if kind == Kind.STATUS:
            code, message = self._parsed(lambda: (fields.u32(), fields.name()))
            if code != Code.OK:
                raise Refused(code, message)
        return fields

    def call(self, kind: Kind, *parts: bytes | memoryview) -> Fields:
        """`ask` and `answer`."""
        return self.answer(self.ask(kind, *parts))

    def forget(self, *requests: int) -> None:
        """Pay no heed to the answers to these requests."""
        for request in requests:
            if self._early.pop(request, None) is None:
                self._forgotten.add(request)

    def has_heard(self) -> bool:
        """Whether some answer may be had without waiting."""
        return bool(self._heard) or self._channel.recv_ready()

    def close(self) -> None:
        """End it; idempotent."""
        self.lost = True
        self._channel.close()

    # -- inside

    def _greet(self) -> frozenset[str]:
        self._send(struct.pack(">IBI", 5, Kind.INIT, VERSION))
        packet = self._packet()
        if packet[0] != Kind.VERSION:
            raise self._broken("the server does not speak SFTP")
        fields = Fields(packet[1:])
        version, extensions = self._parsed(lambda: (fields.u32(), fields.extensions()))
        if version < VERSION:
            raise self._broken(f"the server speaks SFTP version {version}, and {VERSION} is needed")
        return extensions

    def _send(self, packet: bytes) -> None:
        try:
            view = memoryview(packet)
            while view:
                sent = self._channel.send(bytes(view[:_SEND_BYTES]))
                if not sent:
                    raise EOFError
                view = view[sent:]
        except (OSError, EOFError, SSHException) as e:
            raise self._broken(_reason(e)) from e

    def _hear(self) -> tuple[int, int, Fields]:
        packet = self._packet()
        fields = Fields(packet[1:])
        return self._parsed(fields.u32), packet[0], fields

    def _packet(self) -> memoryview:
        length = int.from_bytes(self._take(4), "big")
        if not 1 <= length <= _MOST_BYTES:
            raise self._broken("the server does not speak SFTP")
        return self._take(length)

    def _take(self, count: int) -> memoryview:
        """The next bytes, without a copy where they came together."""
        if len(self._heard) < count:
            parts: list[bytes | memoryview] = [self._heard]
            missing = count - len(self._heard)
            while missing > 0:
                try:
                    part = self._channel.recv(_RECEIVE_BYTES)
                except (OSError, EOFError, SSHException) as e:
                    raise self._broken(_reason(e)) from e
                if not part:
                    raise self._broken("the server closed the connection")
                parts.append(part)
                missing -= len(part)
            self._heard = memoryview(b"".join(parts))
        taken, self._heard = self._heard[:count], self._heard[count:]
        return taken

    def _parsed(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except Malformed as e:
            raise self._broken(str(e)) from e

    def _broken(self, reason: str) -> Lost:
        self.lost = True
        return Lost(reason)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "the server does not answer"
    return getattr(error, "strerror", None) or str(error) or "the connection broke"
