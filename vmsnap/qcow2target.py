"""`Qcow2Target`: a qcow2 image that a backup is written onto, through QEMU's own qemu-nbd.

qemu-nbd locks the image as a running QEMU does, listens on a socket in a folder that nobody else may enter, and ends
by itself when the last connection is gone, so also when this process is killed.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from vmsnap.errors import Busy, DriverUnavailable, NotFound, StorageError, UsageError, VmsnapError
from vmsnap.imagelock import refuse_loop_file
from vmsnap.nbd import NbdConnection

_CONNECTIONS: Final = 4
_START_SECONDS: Final = 30.0
_REFUSAL_SECONDS: Final = 5.0
_END_SECONDS: Final = 60.0
_LOOK_EACH_SECONDS: Final = 0.01


def tool(name: str) -> str:
    """The path of one of QEMU's tools.

    :raises DriverUnavailable: it is not installed
    """
    found = shutil.which(name)
    if not found:
        raise DriverUnavailable(f"qcow2 needs {name}, which is not installed", cure="on Debian: apt install qemu-utils")
    return found


def create_qcow2(path: Path, size_bytes: int) -> None:
    """Make an empty image, readable by its owner alone. Blocks.

    :raises DriverUnavailable: qemu-img is not installed
    :raises StorageError: it cannot be made
    """
    command = [tool("qemu-img"), "create", "-q", "-f", "qcow2", str(path.absolute()), str(size_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, umask=0o077)
    if done.returncode:
        raise StorageError(f"qemu-img could not make {path}: {' '.join(done.stderr.split())}")


class Qcow2Target:
    """A `vmsnap.repository.inplace.Target` on a qcow2 file, which nobody else uses until `close`.

    May be used by several threads at once. A context manager.
    """

    def __init__(self, path: Path) -> None:
        """Start qemu-nbd on the image and connect; changes nothing. Blocks.

        :raises NotFound: there is no such file
        :raises UsageError: it is no plain file, or no qcow2 image
        :raises Busy: somebody uses it
        :raises DriverUnavailable: qemu-nbd is not installed
        :raises StorageError: qemu-nbd cannot open it
        """
        self.label = str(path)
        self._free: queue.SimpleQueue[NbdConnection] = queue.SimpleQueue()
        self._status: queue.SimpleQueue[NbdConnection] = queue.SimpleQueue()
        self._connections: list[NbdConnection] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._serving = False
        program = tool("qemu-nbd")
        _check_file(path)
        with ExitStack() as on_failure, tempfile.TemporaryDirectory(prefix="vmsnap-nbd-") as folder:
            on_failure.callback(self.close)
            self._start(program, path.absolute(), Path(folder))
            on_failure.pop_all()
        self._serving = True
        self.size_bytes = self._connections[0].size_bytes

    def _start(self, program: str, path: Path, folder: Path) -> None:
        listening = folder / "socket"
        # Without the host's page cache, where the file system can.
        cache = "none" if _takes_direct(path) else "writeback"
        command = [program, f"--socket={listening}", "--format=qcow2", f"--shared={_CONNECTIONS + 1}"]
        command += [f"--cache={cache}", "--discard=unmap", "--", str(path)]
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
                    # It listens before it opens the image, so it can hang up on us when that fails.
                    hung_up = isinstance(e, StorageError)
                    if hung_up:
                        with suppress(subprocess.TimeoutExpired):
                            self._process.wait(_REFUSAL_SECONDS)
                    if self._process.poll() is not None:
                        messages.seek(0)
                        raise _refusal(path, " ".join(messages.read().decode(errors="replace").split())) from e
                    if hung_up:
                        raise
                    if time.monotonic() > deadline:
                        raise StorageError(f"qemu-nbd does not serve {path}") from e
                    time.sleep(_LOOK_EACH_SECONDS)
        self._status.put(self._connections[0])
        for connection in self._connections[1:]:
            self._free.put(connection)

    def fit(self, size_bytes: int) -> None:
        """See that the image has that size.

        :raises UsageError: it has another one
        """
        if self.size_bytes != size_bytes:
            raise UsageError(
                f"the disk in {self.label} has {self.size_bytes} bytes, that in the backup {size_bytes}",
                cure=f"qemu-img resize gives it {size_bytes} bytes",
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
        """Make zeros of a range; its clusters are given up. Blocks."""
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

    def __enter__(self) -> Qcow2Target:
        return self

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


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            if not path.exists():
                raise NotFound(f"there is no {path}", cure="vmsnap export --output makes new files")
            raise UsageError(f"{path} is no plain file", cure="qcow2 images on block devices are not written")
        with path.open("rb") as file:
            if not is_qcow2(file.read(4)):
                raise UsageError(f"{path} is no qcow2 image", cure="--format raw writes raw images")
    except OSError as e:
        raise StorageError(f"cannot open {path}: {e.strerror}") from e
    refuse_loop_file(path)


def is_qcow2(begin: bytes) -> bool:
    """Say whether a file that begins so is a qcow2 image."""
    return begin.startswith(b"QFI\xfb")


def _takes_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _refusal(path: Path, said: str) -> VmsnapError:
    if "lock" in said:
        return Busy(f"{path} is in use: QEMU or one of its tools holds it", cure="stop the VM first")
    return StorageError(f"qemu-nbd cannot open {path}: {said or 'it does not say why'}")
