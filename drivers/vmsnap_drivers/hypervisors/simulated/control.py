"""The control socket of a simulated VM: JSON lines over a UNIX socket, one reply a call, any number of clients."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from vmsnap.errors import HypervisorError, UsageError, VmGone

MAX_LINE_BYTES = 1 << 20
_CREDENTIALS = struct.Struct("3i")

Reply = dict[str, Any]


class NoAnswer(HypervisorError):
    """The VM's process is there and did not answer in time."""


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end.

    :raises PermissionError: it is another user's
    """
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in (0, os.geteuid()):
        raise PermissionError(f"process {pid} belongs to user {uid}")
    return int(pid)


def bind_in_folder(path: Path, kind: socket.SocketKind) -> socket.socket:
    """A socket bound at `path`, readable by its owner only; works for paths of any length.

    :raises UsageError: the file name itself is too long for a socket
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    bound = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")
    except OSError as e:
        bound.close()
        raise UsageError(f"no socket can be made at {path}: {e}") from e
    finally:
        os.umask(mask)
        os.close(folder)
    return bound


class Control:
    """A client's connection to one VM; connects when first used, and again after a failure."""

    def __init__(self, path: Path) -> None:
        """Remember where the socket is."""
        self.path = path
        self._connection: socket.socket | None = None
        self._received = b""

    def call(self, name: str, timeout_seconds: float, **arguments: Any) -> Reply:
        """Give one command and return its result.

        :raises VmGone: nobody is there (any more)
        :raises NoAnswer: no answer in time; the connection was closed, with which the VM forgets the command
        :raises HypervisorError: the VM refused or failed
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            self._send(json.dumps({"command": name, "arguments": arguments}).encode() + b"\n", deadline)
            reply = json.loads(self._line(deadline))
        except TimeoutError as e:
            self.close()
            raise NoAnswer(f"{self.path}: no answer to {name!r} within {timeout_seconds:g} s") from e
        except (OSError, ValueError) as e:
            self.close()
            raise VmGone(f"{self.path}: no simulated VM is there ({e})") from e
        if "error" in reply:
            kind = VmGone if reply.get("gone") else HypervisorError
            raise kind(f"simulated VM: {name}: {reply['error']}")
        result: Reply = reply["ok"]
        return result

    def _send(self, line: bytes, deadline: float) -> None:
        if self._connection is None:
            self._connection = self._connect(deadline)
        self._connection.settimeout(_left(deadline))
        self._connection.sendall(line)

    def _connect(self, deadline: float) -> socket.socket:
        folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(f"/proc/self/fd/{folder}/{self.path.name}")
            peer_pid(connection)
        except OSError:
            connection.close()
            raise
        finally:
            os.close(folder)
        self._received = b""
        return connection

    def _line(self, deadline: float) -> bytes:
        connection = self._connection
        if connection is None:
            raise ConnectionError("not connected")
        while b"\n" not in self._received:
            connection.settimeout(_left(deadline))
            data = connection.recv(65536)
            if not data:
                raise ConnectionError("the VM closed the connection")
            self._received += data
            if len(self._received) > MAX_LINE_BYTES:
                raise ValueError("the answer is too long")
        line, _, self._received = self._received.partition(b"\n")
        return line

    def close(self) -> None:
        """Close the connection; idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("too late")
    return left


def ask(path: Path, name: str, timeout_seconds: float = 5.0, **arguments: Any) -> Reply:
    """Give one command over a connection of its own; raises as `Control.call` does."""
    control = Control(path)
    try:
        return control.call(name, timeout_seconds, **arguments)
    finally:
        control.close()
