"""The byte stream under the NBD client: a connected UNIX socket whose calls end in time and say what went wrong."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Final

from vmsnap_drivers.qemu.nbd_wire import NbdError
from vmsnap_drivers.qemu.unix_socket import connect_unix

_TIMEVAL: Final = struct.Struct("@ll")


class NbdSocket:
    """A connection to the server that listens on `path`. Any failure leaves it closed.

    The socket blocks in the kernel, with the kernel's own time-outs, so that one call takes in a whole megabyte
    (``MSG_WAITALL``); with Python's time-outs it would return to Python for each few hundred kilobytes.

    :param timeout_seconds: how long one call may wait without any byte moving
    :raises NbdError: nobody listens there
    """

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        whole = int(timeout_seconds)
        timeout = _TIMEVAL.pack(whole, round((timeout_seconds - whole) * 1_000_000))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            connect_unix(self._socket, path)
        except OSError as e:
            self._socket.close()
            raise NbdError(f"no NBD server answers on {path}: {e.strerror}") from e

    @property
    def closed(self) -> bool:
        """It can carry nothing any more."""
        return self._socket.fileno() < 0

    def send(self, data: bytes) -> None:
        """Send all of `data`. Blocks.

        :raises NbdError: the server is gone or takes nothing
        """
        self._check_open()
        try:
            self._socket.sendall(data)
        except OSError as e:
            raise self._failed(e) from e

    def receive_into(self, buffer: memoryview) -> None:
        """Fill all of `buffer`. Blocks.

        :raises NbdError: the server is gone or sends nothing
        """
        self._check_open()
        filled = 0
        while filled < len(buffer):
            try:
                count = self._socket.recv_into(buffer[filled:], 0, socket.MSG_WAITALL)
            except OSError as e:
                raise self._failed(e) from e
            if not count:
                raise self.broken("it hung up")
            filled += count

    def receive(self, length: int) -> bytes:
        """Return the next `length` bytes. Raises what `receive_into` raises."""
        data = bytearray(length)
        self.receive_into(memoryview(data))
        return bytes(data)

    def await_end(self) -> None:
        """Wait until the server hangs up, and close. Blocks.

        :raises NbdError: it does not, or sends something instead
        """
        self._check_open()
        try:
            more = self._socket.recv(1)
        except ConnectionResetError:
            more = b""
        except OSError as e:
            raise self._failed(e) from e
        if more:
            raise self.broken("it goes on after its last answer")
        self.close()

    def broken(self, what: str) -> NbdError:
        """Close, and return the error to raise: the server did `what`, after which nothing it sends can be trusted."""
        self.close()
        return NbdError(f"the NBD server on {self._path} cannot be used: {what}")

    def close(self) -> None:
        """Hang up; idempotent."""
        self._socket.close()

    def _check_open(self) -> None:
        if self.closed:
            raise NbdError(f"the connection to the NBD server on {self._path} is closed")

    def _failed(self, error: OSError) -> NbdError:
        if isinstance(error, BlockingIOError):
            return self.broken(f"no answer within {self._timeout_seconds:g} s")
        return self.broken(f"{error.strerror}")
