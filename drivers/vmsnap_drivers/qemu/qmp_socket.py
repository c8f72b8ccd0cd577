"""The wire under `Monitor`: a QMP socket, opened with a clear answer to everything that can be wrong with it.

QMP is one JSON object per line in each direction (``docs/interop/qmp-spec`` of QEMU, 7.2 and 10.0). The package
``qemu.qmp`` speaks it too, over asyncio: a round trip took 0.36 ms with it and 0.11 ms with a plain socket (median of
500 ``query-status``, QEMU 7.2, 2 cores). A capture makes about five within the pause, so this one is plain, and needs
no event loop, no thread and no package.
"""

from __future__ import annotations

import array
import errno
import json
import select
import socket
import stat
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vmsnap.errors import Busy, HypervisorError, UnknownVm, UsageError, VmGone
from vmsnap_drivers.qemu.unix_socket import connect_unix

GREETING_TIMEOUT_SECONDS: Final = 3.0
"""A QEMU that serves another client leaves a new one in the backlog of its socket, without a greeting."""

_LONGEST_GREETING: Final = 64 * 1024
_LONGEST_LINE: Final = 256 * 1024 * 1024
_READ_BYTES: Final = 256 * 1024
_UCRED: Final = struct.Struct("3i")


class QmpSocket:
    """A connected QMP socket past its greeting. Reading and writing may be done by two threads at once.

    :ivar greeting: what QEMU said first
    :ivar peer_pid: the process that listens on the socket
    :raises UnknownVm: there is no such socket
    :raises VmGone: nobody listens on it any more
    :raises Busy: it serves another client
    :raises UsageError: it is no QMP socket, or not open to this user
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = _connect(path)
        self._pending = bytearray()
        try:
            self.peer_pid: int = _UCRED.unpack(
                self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            )[0]
            self.greeting = self._await_greeting()
        except BaseException:
            self._socket.close()
            raise

    def send(self, messages: Sequence[object], descriptors: Sequence[int] = (), *, timeout_seconds: float) -> None:
        """Send messages, the descriptors with their first byte.

        :raises VmGone: the other side is gone
        :raises HypervisorError: it did not take the message in time; the connection cannot be used any more
        """
        data = memoryview(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        deadline = time.monotonic() + timeout_seconds
        while data:
            try:
                sent = self._socket.sendmsg([data], ancillary)
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline):
                    self.close()
                    raise HypervisorError(f"the QEMU at {self.path} did not take a command in time") from None
                continue
            except OSError as e:
                raise self._gone() from e
            data = data[sent:]
            ancillary = []

    def receive(self, timeout_seconds: float) -> list[dict[str, Any]]:
        """Return the messages that are there, after waiting `timeout_seconds` for the first; none after a time-out.

        :raises VmGone: the other side is gone
        """
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._pending:
            if not self._wait(select.POLLIN, deadline):
                return []
            self._read_once(_LONGEST_LINE)
        *lines, rest = self._pending.split(b"\n")
        self._pending = bytearray(rest)
        return [self._parse(line) for line in lines if line.strip()]

    def close(self) -> None:
        """Disconnect; idempotent."""
        self._socket.close()

    def _await_greeting(self) -> dict[str, Any]:
        """QEMU sends what happens between accepting a client and its greeting to that client, first: only a client
        that it has greeted, and that has not asked for ``qmp_capabilities`` yet, is spared events
        (``monitor_qapi_event_emit`` in monitor/monitor.c of 7.2 and 10.0).
        """
        deadline = time.monotonic() + GREETING_TIMEOUT_SECONDS
        while True:
            message = self._parse(self._first_line(deadline))
            if "event" in message and time.monotonic() < deadline:
                continue
            if not isinstance(message.get("QMP"), dict):
                raise self._no_qmp()
            return message

    def _first_line(self, deadline: float) -> bytearray:
        while b"\n" not in self._pending:
            if not self._wait(select.POLLIN, deadline):
                if self._pending:
                    raise self._no_qmp()
                raise Busy(
                    f"the QMP socket {self.path} serves another client",
                    cure="end the other client, or give QEMU a second -qmp socket for vmsnap",
                )
            self._read_once(_LONGEST_GREETING)
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _read_once(self, longest: int) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as e:
            raise self._gone() from e
        if not data:
            raise self._gone()
        self._pending += data
        if len(self._pending) > longest:
            raise self._no_qmp()

    def _parse(self, line: bytes | bytearray) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except ValueError as e:
            raise self._no_qmp() from e
        if not isinstance(message, dict):
            raise self._no_qmp()
        return message

    def _wait(self, what: int, deadline: float) -> bool:
        if self._socket.fileno() < 0:
            raise self._gone()
        poll = select.poll()
        poll.register(self._socket, what)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _gone(self) -> VmGone:
        return VmGone(f"the QEMU behind {self.path} is gone")

    def _no_qmp(self) -> UsageError:
        return UsageError(
            f"what listens on {self.path} does not speak QMP",
            cure="name the socket of QEMU's option -qmp, not of a serial port, -monitor or guest agent",
        )


def _connect(path: str) -> socket.socket:
    place = Path(path)
    try:
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UnknownVm(
            f"there is no QMP socket {path}", cure="start the VM with -qmp unix:PATH,server=on,wait=off"
        ) from e
    except OSError as e:
        raise UsageError(f"the QMP socket {path} cannot be looked at: {e.strerror}") from e
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} is no socket", cure="name the socket of QEMU's option -qmp")
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.setblocking(False)
        connect_unix(client, place)
    except OSError as e:
        client.close()
        if e.errno == errno.EAGAIN:
            raise Busy(f"too many clients wait for the QMP socket {path}") from e
        if e.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET):
            raise VmGone(f"no QEMU listens on {path} any more") from e
        raise UsageError(f"the QMP socket {path} cannot be opened: {e.strerror}") from e
    return client
