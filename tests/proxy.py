"""A TCP proxy between vmsnap and a storage server, in which a test says what goes wrong and at which byte.

Knows nothing of the protocol, but for two things that tests of HTTP need: a trouble can wait until certain bytes were
sent (``PUT``, a key), and one trouble is an answer in the server's place.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

_PIECE_BYTES = 256 << 10
_POLL_SECONDS = 0.2


@dataclass
class Trouble:
    """What goes wrong once `at_bytes` more bytes went in `direction` (``up`` to the server), all connections together.

    ``cut`` resets the connection; ``stall`` moves nothing more on it, in either direction, until the proxy is closed
    or `Proxy.release` is called; ``corrupt`` flips a bit of that byte; ``slow`` lets `bytes_per_second` through from
    there on; ``answer`` gives the client `answer` in the server's place and ends the connection.

    :param after: bytes counted begin behind this, which is looked for in what goes up; empty: at once
    :param times: so often; counting begins anew each time
    :param refuse_afterwards: so many connections are reset as soon as they are made: the server is away for a while
    """

    kind: Literal["cut", "stall", "corrupt", "slow", "answer"]
    at_bytes: int = 0
    direction: Literal["up", "down"] = "up"
    after: bytes = b""
    times: int = 1
    bytes_per_second: int = 0
    answer: bytes = b""
    refuse_afterwards: int = 0
    struck: int = 0
    """How often it came true."""
    _left: int = field(init=False, repr=False, default=0)
    _armed: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        self.rearm()

    def rearm(self) -> None:
        """Begin to count anew."""
        self._left, self._armed = self.at_bytes, not self.after

    def event(self, data: bytes, direction: str) -> int | None:
        """Where in `data` it begins to count, or strikes; None: not in it."""
        if self.times <= 0:
            return None
        if not self._armed:
            # What is looked for is at the beginning of a request, and so never torn apart.
            found = data.find(self.after) if direction == "up" else -1
            return None if found < 0 else found + len(self.after)
        if direction != self.direction:
            return None
        # A byte that is to be changed must be there; else it strikes as soon as so many went through.
        return self._left if self._left + (self.kind == "corrupt") <= len(data) else None

    def pass_by(self, count: int, direction: str) -> None:
        """So many bytes went through without an event."""
        if self._armed and direction == self.direction:
            self._left = max(0, self._left - count)

    def happen(self) -> bool:
        """The event has come; True where it strikes, False where it only begins to count."""
        if not self._armed:
            self._armed = True
            return False
        self.struck += 1
        self.times -= 1
        self.rearm()
        return True


def http_answer(status: int, reason: str, code: str, *headers: str) -> bytes:
    """An error as an S3 server words it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{reason}</Message></Error>".encode()
    lines = [f"HTTP/1.1 {status} {reason}", "Content-Type: application/xml", "Connection: close", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class Proxy:
    """Listens on a port of the loopback and forwards to `upstream`. A context manager."""

    def __init__(
        self, upstream: tuple[str, int], *, latency_seconds: float = 0.0, tls: ssl.SSLContext | None = None
    ) -> None:
        """:param latency_seconds: added to each way; a round trip takes twice as long
        :param tls: clients speak TLS to the proxy, which speaks plainly to the server
        """
        self.upstream = upstream
        self._tls = tls
        self.latency_seconds = latency_seconds
        self.troubles: list[Trouble] = []
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self.refusing = False
        """While it is set, new connections are reset and nothing reaches the server: it is away."""
        self.refusals = 0
        """So many connections are reset before the server can be reached again."""
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._closed = False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, trouble: Trouble) -> Trouble:
        """Let this go wrong from now on; several troubles count at once."""
        with self._lock:
            self.troubles.append(trouble)
        return trouble

    def clear(self) -> None:
        """Nothing goes wrong any more; what is stalled is released."""
        with self._lock:
            self.troubles.clear()
        self.refusing = False
        self.release()

    def release(self) -> None:
        """End the connections that are stalled."""
        self._released.set()
        self._released = threading.Event()

    def cut_all(self) -> None:
        """Reset every connection that is open now."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            _reset(connection)

    def close(self) -> None:
        """End everything; returns when all threads have ended."""
        self._closed = True
        self._released.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()
        for thread in self._threads:
            thread.join(10)

    # -- inside

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.refusing or self.refusals:
                self.refusals = max(0, self.refusals - 1)
                _reset(client)
                continue
            try:
                if self._tls:
                    client = self._tls.wrap_socket(client, server_side=True)
                server = socket.create_connection(self.upstream, 10)
            except OSError:  # a failed handshake is one too
                _reset(client)
                continue
            for one in (client, server):
                one.settimeout(None)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            pair = _Pair(client, server)
            self._start(self._pump, pair, client, server, "up")
            self._start(self._pump, pair, server, client, "down")

    def _pump(
        self, pair: _Pair, source: socket.socket, target: socket.socket, direction: Literal["up", "down"]
    ) -> None:
        line = _DelayLine(target, self.latency_seconds) if self.latency_seconds else None
        try:
            while data := source.recv(_PIECE_BYTES):
                if not self._forward(pair, data, target, direction, line):
                    break
            else:
                if line:
                    line.finish()
                with suppress(OSError):
                    target.shutdown(socket.SHUT_WR)
                pair.finish(direction)
                return
        except OSError:
            pass
        if line:
            line.give_up()
        for one in (pair.client, pair.server):
            _reset(one)
        with self._lock:
            self._open -= {pair.client, pair.server}

    def _forward(
        self,
        pair: _Pair,
        data: bytes,
        target: socket.socket,
        direction: Literal["up", "down"],
        line: _DelayLine | None,
    ) -> bool:
        """Send on what goes through; False where the connection is over."""
        send = line.put if line else target.sendall
        while data:
            if pair.stalled:
                self._released.wait()
                return False
            trouble, whole = self._next(data, direction)
            through = data[:whole]
            if direction == "up":
                self.bytes_up += len(through)
            else:
                self.bytes_down += len(through)
            if pair.bytes_per_second:
                time.sleep(len(through) / pair.bytes_per_second)
            send(through)
            data = data[whole:]
            if trouble is None:
                continue
            if trouble.kind == "cut":
                return False
            if trouble.kind == "stall":
                pair.stalled = True
            elif trouble.kind == "corrupt":
                send(bytes([data[0] ^ 0x10]))
                data = data[1:]
            elif trouble.kind == "slow":
                pair.bytes_per_second = trouble.bytes_per_second
            elif trouble.kind == "answer":
                self._answer(pair, trouble.answer)
                return False
        return True

    def _next(self, data: bytes, direction: str) -> tuple[Trouble | None, int]:
        """The first trouble that strikes within `data`, and how much goes through before it."""
        with self._lock:
            events = [(at, trouble) for trouble in self.troubles if (at := trouble.event(data, direction)) is not None]
            at, first = min(events, key=lambda event: event[0]) if events else (len(data), None)
            for trouble in self.troubles:
                if trouble is not first:
                    trouble.pass_by(at, direction)
            if first is None or not first.happen():
                return None, at
            self.refusals += first.refuse_afterwards
            return first, at

    def _answer(self, pair: _Pair, answer: bytes) -> None:
        with suppress(OSError):
            pair.client.sendall(answer)
            pair.client.shutdown(socket.SHUT_WR)
            # What the client still sends is taken, or the reset would destroy the answer.
            pair.client.settimeout(_POLL_SECONDS)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and pair.client.recv(_PIECE_BYTES):
                pass


class _Pair:
    """One connection of a client, and its continuation to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.stalled = False
        self.bytes_per_second = 0
        self._finished: set[str] = set()

    def finish(self, direction: str) -> None:
        """One direction has ended in good order; after both the sockets are closed."""
        self._finished.add(direction)
        if len(self._finished) == 2:
            self.client.close()
            self.server.close()


class _DelayLine:
    """Sends what it is given a certain time later, without making the giver wait."""

    def __init__(self, target: socket.socket, seconds: float) -> None:
        self._target = target
        self._seconds = seconds
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._changed = threading.Condition()
        self._given_up = False
        self._ended = False
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Send `data` later."""
        with self._changed:
            self._pieces.append((time.monotonic() + self._seconds, data))
            self._changed.notify()

    def finish(self) -> None:
        """Return when all is sent."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def give_up(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._given_up = True
            self._changed.notify()

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._ended or self._given_up)
                if self._given_up or not self._pieces:
                    return
                due, data = self._pieces.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                self._target.sendall(data)
            except OSError:
                return


def _reset(connection: socket.socket) -> None:
    """Close at once, so that the other side sees a reset, whatever is still to be sent."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
