"""Takes the migration stream from QEMU into RAM images, beside everything else, and can hold it back."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.stream import MigrationStreamReader
from vmsnap_drivers.qemu.stream_format import CapturedMemory

DESCRIPTOR_NAME: Final = "vmsnap-stream"
STREAM_URI: Final = f"fd:{DESCRIPTOR_NAME}"

_ROOM_BYTES: Final = 8 * 1024 * 1024
_PAGES_FLOW_BYTES: Final = 64 * 1024
"""More than a stream has before its first pages, on any machine."""


class Drain:
    """A pair of sockets: QEMU writes into one, a thread of ours reads the other into `folder`.

    A socket and not a pipe, because QEMU can shut a socket down: a cancelled migration then ends at once, even when
    nobody reads it.

    With `held`, the socket is full from the start, so QEMU stops at its first byte until `release`.

    :ivar pages_flow: set once pages come in
    """

    def __init__(self, folder: Path, *, stall_timeout_seconds: float, held: bool = False) -> None:
        self._folder = folder
        self._stall_timeout_seconds = stall_timeout_seconds
        self._near, self._far = socket.socketpair()
        self._filling = 0
        self._reader: MigrationStreamReader | None = None
        self._result: CapturedMemory | None = None
        self._error: HypervisorError | None = None
        self._thread = threading.Thread(target=self._run, name="vmsnap-drain", daemon=True)
        self._released = False
        self.pages_flow = threading.Event()
        if held:
            self._fill()

    @property
    def inode(self) -> int:
        """What tells QEMU's end from all other sockets."""
        return os.fstat(self._far.fileno()).st_ino

    @property
    def read_bytes(self) -> int:
        """Bytes of the stream read so far."""
        return self._reader.read_bytes if self._reader is not None else 0

    def hand_over(self, monitor: Monitor) -> None:
        """Give QEMU its end, to be named by `STREAM_URI`."""
        monitor.send_descriptor(DESCRIPTOR_NAME, self._far.fileno())

    def release(self) -> None:
        """Begin to read. QEMU must have its end. Idempotent."""
        if self._released:
            return
        self._released = True
        for size in (socket.SO_SNDBUF, 32):  # 32: SO_SNDBUFFORCE, beyond the limit for users; root only
            with contextlib.suppress(PermissionError):
                self._far.setsockopt(socket.SOL_SOCKET, size, _ROOM_BYTES)
        self._far.close()
        self._thread.start()

    def finish(self, timeout_seconds: float) -> CapturedMemory | None:
        """Wait for the end of the stream; None when it has not come in time.

        :raises HypervisorError: the stream was damaged, cut off or could not be kept
        """
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            return None
        if self._error is not None:
            raise self._error
        return self._result

    def stop(self) -> None:
        """Break the stream off; QEMU's migration fails, if it still runs. Idempotent."""
        self._far.close()
        with contextlib.suppress(OSError):  # it has ended by itself already
            self._near.shutdown(socket.SHUT_RDWR)
        if self._released:
            self._thread.join()
        self._near.close()

    def _fill(self) -> None:
        self._far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._filling += self._far.send(bytes(256))
        self._far.setblocking(True)

    def _run(self) -> None:
        try:
            while self._filling:
                self._filling -= len(self._near.recv(min(self._filling, 65536))) or self._filling
            self._reader = MigrationStreamReader(
                self._near.fileno(),
                self._folder,
                stall_timeout_seconds=self._stall_timeout_seconds,
                on_progress=self._progress,
            )
            self._result = self._reader.run()
        except HypervisorError as e:
            self._error = e
        except OSError as e:
            self._error = HypervisorError(f"the stream of the guest's memory broke off: {e.strerror}")
        finally:
            self.pages_flow.set()

    def _progress(self, read_bytes: int) -> None:
        if read_bytes > _PAGES_FLOW_BYTES and not self.pages_flow.is_set():
            self.pages_flow.set()
