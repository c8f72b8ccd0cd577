"""The state of a machine's devices: out of a QEMU that stands still, and into one that waits for it.

It is a migration stream in which the RAM is left out, by the capability ``x-ignore-shared`` (since QEMU 4.0): RAM that
is a shared file is copied as a file.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from vmsnap.errors import HypervisorError, SnapshotError
from vmsnap.roles.filereader import next_data
from vmsnap_hmp.monitor import MAX_SOCKET_PATH, Monitor

_CAPABILITY = "migrate_set_capability x-ignore-shared"
_BUFFER_BYTES = 1 << 20
_EACH_SECONDS = 0.002


def leave_out_ram(monitor: Monitor, on: bool, timeout_seconds: float) -> None:
    """Set the capability."""
    monitor.tell(f"{_CAPABILITY} {'on' if on else 'off'}", timeout_seconds)


def save_devices(monitor: Monitor, file: Path, timeout_seconds: float) -> None:
    """Save the state of a VM that stands still, into a new file.

    Afterwards QEMU's word for it is ``postmigrate``, which only executing ends; its disks are flushed and given up.

    :raises HypervisorError: it failed; the VM stands still as before
    """
    deadline = time.monotonic() + timeout_seconds
    with _listening(file.with_suffix(".socket"), timeout_seconds) as listener:
        monitor.tell(f"migrate -d unix:{file.with_suffix('.socket')}", timeout_seconds)
        try:
            connection, _ = listener.accept()
            with connection, os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                connection.settimeout(timeout_seconds)
                while content := connection.recv(_BUFFER_BYTES):
                    out.write(content)
        except OSError as e:
            raise HypervisorError(f"VM {monitor.vm!r}: the state of its devices did not come: {e}") from e
    _await_migration(monitor, deadline)


def _await_migration(monitor: Monitor, deadline: float) -> None:
    while True:
        answer = monitor.ask("info migrate", max(0.1, deadline - time.monotonic()))
        status = answer.partition("Migration status: ")[2].split(" ")[0].split("\n")[0]
        if status == "completed":
            return
        if status not in ("setup", "active", "device") or time.monotonic() > deadline:
            raise HypervisorError(f"VM {monitor.vm!r}: the state of its devices is {status or 'not'} saved")
        time.sleep(_EACH_SECONDS)


def load_devices(monitor: Monitor, file: Path, timeout_seconds: float) -> None:
    """Give a QEMU that waits (``-incoming defer -S``) its state; it stands still afterwards.

    :raises HypervisorError: it did not take it
    """
    path = file.with_suffix(".incoming")
    leave_out_ram(monitor, True, timeout_seconds)
    try:
        monitor.tell(f"migrate_incoming unix:{path}", timeout_seconds)
        with socket.socket(socket.AF_UNIX) as connection, file.open("rb") as content:
            connection.settimeout(timeout_seconds)
            connection.connect(str(path))
            connection.sendfile(content)
    except OSError as e:
        raise HypervisorError(f"VM {monitor.vm!r} did not take the state of its devices: {e}") from e
    finally:
        path.unlink(missing_ok=True)
    monitor.await_status(("paused", "postmigrate", "prelaunch"), timeout_seconds)
    leave_out_ram(monitor, False, timeout_seconds)


@contextlib.contextmanager
def _listening(path: Path, timeout_seconds: float) -> Iterator[socket.socket]:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise HypervisorError(f"{path} is too long for a socket", cure="use a shorter memory folder")
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(1)
        except OSError as e:
            raise HypervisorError(f"no socket can be made at {path}: {e.strerror}") from e
        listener.settimeout(timeout_seconds)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def copy_ram(source: Path, target: Path) -> int:
    """Copy a file of RAM into a new one, and return how many bytes were data; what was never written stays a hole.

    :raises HypervisorError: it failed
    """
    copied = 0
    try:
        reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(reading).st_size
                os.ftruncate(writing, size)
                at = 0
                while at < size:
                    at, end = next_data(reading, at, size)
                    os.lseek(writing, at, os.SEEK_SET)
                    while at < end:
                        count = os.sendfile(writing, reading, at, end - at)
                        if not count:
                            raise OSError("the file became shorter")
                        at, copied = at + count, copied + count
            finally:
                os.close(writing)
        finally:
            os.close(reading)
    except (OSError, SnapshotError) as e:
        raise HypervisorError(f"the RAM {source} cannot be copied to {target}: {e}") from e
    return copied
