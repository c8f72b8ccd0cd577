"""`NbdTarget`: a disk that a backup is written onto through QEMU's own qemu-nbd: an image format, or a LUN.

qemu-nbd locks an image as a running QEMU does, listens on a socket in a folder that nobody else may enter, and ends by
itself when the last connection is gone, so also when this process is killed.
"""

from __future__ import annotations

import queue
import shutil
import subprocess
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from vmsnap.errors import DriverUnavailable, StorageError, UsageError, VmsnapError
from vmsnap.nbd import NbdConnection
from vmsnap.roles import DiskWriter

_CONNECTIONS: Final = 4
_START_SECONDS: Final = 30.0
_REFUSAL_SECONDS: Final = 5.0
_END_SECONDS: Final = 60.0
_LOOK_EACH_SECONDS: Final = 0.01


def tool(name: str, purpose: str = "qcow2", package: str = "qemu-utils") -> str:
    """The path of one of QEMU's tools.

    :param purpose: what needs it
    :param package: Debian's, or several
    :raises DriverUnavailable: it is not installed
    """
    found = shutil.which(name)
    if not found:
        raise DriverUnavailable(
            f"{purpose} needs {name}, which is not installed", cure=f"on Debian: apt install {package}"
        )
    return found


class NbdTarget(DiskWriter):
    """A disk that qemu-nbd opens, and that this one alone uses until `close`.

    May be used by several threads at once. A context manager. A further kind of disk is a further class.
    """

    def __init__(self, label: str, address: str, program: str, arguments: Sequence[str]) -> None:
        """Start qemu-nbd on the disk and connect; changes nothing. Blocks.

        :param label: what messages call the disk
        :param address: as hypervisors are told it
        :param program: the path of qemu-nbd
        :param arguments: what tells it the disk and how to open that
        :raises VmsnapError: qemu-nbd cannot open it; see `refusal`
        """
        self.label = label
        self.address = address
        self._free: queue.SimpleQueue[NbdConnection] = queue.SimpleQueue()
        self._status: queue.SimpleQueue[NbdConnection] = queue.SimpleQueue()
        self._connections: list[NbdConnection] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._serving = False
        with ExitStack() as on_failure, tempfile.TemporaryDirectory(prefix="vmsnap-nbd-") as folder:
            on_failure.callback(self.close)
            self._start(program, arguments, Path(folder))
            on_failure.pop_all()
        self._serving = True
        self.size_bytes = self._connections[0].size_bytes

    @abstractmethod
    def refusal(self, said: str) -> VmsnapError:
        """The error for qemu-nbd not opening the disk, which `said` why, as one line; or nothing."""

    @abstractmethod
    def cure_of_size(self, size_bytes: int) -> str:
        """How a disk of this kind gets that size."""

    def _start(self, program: str, arguments: Sequence[str], folder: Path) -> None:
        listening = folder / "socket"
        command = [program, f"--socket={listening}", f"--shared={_CONNECTIONS + 1}", *arguments]
        with (folder / "messages").open("w+b") as messages:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, close_fds=True
            )
            deadline = time.monotonic() + _START_SECONDS
            while len(self._connections) <= _CONNECTIONS:
                try:
                    # The first stays open all the time: qemu-nbd ends with its last connection.
                    self._connections.append(NbdConnection(listening, self.label, status=not self._connections))
                except (FileNotFoundError, ConnectionRefusedError, StorageError) as e:
                    # It listens before it opens the disk, so it can hang up on us when that fails.
                    hung_up = isinstance(e, StorageError)
                    if hung_up:
                        with suppress(subprocess.TimeoutExpired):
                            self._process.wait(_REFUSAL_SECONDS)
                    if self._process.poll() is not None:
                        messages.seek(0)
                        raise self.refusal(" ".join(messages.read().decode(errors="replace").split())) from e
                    if hung_up:
                        raise
                    if time.monotonic() > deadline:
                        raise StorageError(f"qemu-nbd does not serve {self.label}") from e
                    time.sleep(_LOOK_EACH_SECONDS)
        self._status.put(self._connections[0])
        for connection in self._connections[1:]:
            self._free.put(connection)

    def fit(self, size_bytes: int) -> None:
        """See that the disk has that size.

        :raises UsageError: it has another one
        """
        if self.size_bytes != size_bytes:
            raise UsageError(
                f"the disk in {self.label} has {self.size_bytes} bytes, that in the backup {size_bytes}",
                cure=self.cure_of_size(size_bytes),
            )

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length of what may be something else than zeros, ascending."""
        # Asked for piece by piece, so that no thread holds the connection while it works.
        end = offset + length
        while offset < end:
            step = min(end - offset, 64 << 20)
            with _taken(self._status) as connection:
                ranges = list(connection.data_ranges(offset, step))
            yield from ranges
            offset += step

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Blocks."""
        with _taken(self._free) as connection:
            connection.read_into(offset, buffer)

    def write(self, offset: int, contents: Sequence[bytes | memoryview]) -> None:
        """Write `contents`, one after the other, from `offset` on. Blocks."""
        with _taken(self._free) as connection:
            connection.write(offset, contents)

    def write_zeros(self, offset: int, length: int) -> None:
        """Make zeros of a range; it takes no room where it can. Blocks."""
        with _taken(self._free) as connection:
            connection.write_zeros(offset, length)

    def flush(self) -> None:
        """Return when everything written is durable. Blocks; not while another thread writes."""
        # Each connection's flush counts for what was written over that one, says the protocol.
        for connection in self._connections[1:]:
            connection.flush()

    def close(self) -> None:
        """Hang up and wait until qemu-nbd has ended, killing it where it does not; idempotent.

        :raises StorageError: qemu-nbd failed
        """
        while self._connections:
            self._connections.pop().close()
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if not self._serving:  # without a connection it would wait for one
                process.terminate()
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired as e:
            process.kill()
            raise StorageError(f"qemu-nbd did not end when {self.label} was closed") from e
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode and self._serving:
            raise StorageError(f"qemu-nbd failed when {self.label} was closed")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except StorageError:
            if kind is None:  # else what went wrong first says more
                raise


@contextmanager
def _taken(connections: queue.SimpleQueue[NbdConnection]) -> Iterator[NbdConnection]:
    connection = connections.get()
    try:
        yield connection
    finally:
        connections.put(connection)
