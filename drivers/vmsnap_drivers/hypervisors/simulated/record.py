"""The record of a simulated VM: a file beside its socket, locked by the VM's process for as long as it lives.

The lock is what makes a name taken; a file without it is what a killed VM left.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import AlreadyExists
from vmsnap_drivers.hypervisors.simulated.lock import is_locked, try_lock

SOCKET_SUFFIX = ".sock"


@dataclass(frozen=True)
class Record:
    """What stands in the file. `loaded`: vmsnap made this VM from a duplicate, and may destroy it."""

    vm: str
    pid: int
    loaded: bool
    port: str


def record_path(socket_path: Path) -> Path:
    """Where the record of the VM with that socket lies."""
    return socket_path.with_name(socket_path.name + ".json")


def log_path(socket_path: Path) -> Path:
    """Where a VM's process writes why it crashed."""
    return socket_path.with_name(socket_path.name + ".log")


def claim(socket_path: Path) -> int:
    """Take the VM's name: create and lock its record; returns the descriptor that holds the lock.

    :raises AlreadyExists: a VM has it
    """
    path = record_path(socket_path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_lock(descriptor):
            os.close(descriptor)
            raise AlreadyExists(f"a simulated VM exists at {socket_path}")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        # its last holder removed the file between our open and our lock
        os.close(descriptor)


def write(descriptor: int, record: Record) -> None:
    """Fill in the record that `claim` locked."""
    text = json.dumps({"vm": record.vm, "pid": record.pid, "loaded": record.loaded, "port": record.port})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def read(socket_path: Path) -> Record | None:
    """The record, whether its VM lives or not; None when there is none (or it is not written yet)."""
    try:
        values = json.loads(record_path(socket_path).read_text())
        return Record(values["vm"], values["pid"], values["loaded"], values["port"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def alive(socket_path: Path) -> bool:
    """Whether a process holds the record."""
    return is_locked(record_path(socket_path))


def remove(socket_path: Path, port: str) -> None:
    """Remove the files of a VM that is gone; succeeds where there are none."""
    files = [socket_path, log_path(socket_path), record_path(socket_path)]
    for path in [Path(port), *files] if port else files:
        path.unlink(missing_ok=True)


def records_in(folder: Path) -> Iterator[tuple[Path, Record]]:
    """Socket path and record of every VM that has its record in this folder, in the order of their names."""
    for path in sorted(folder.glob(f"*{SOCKET_SUFFIX}.json")):
        socket_path = path.with_name(path.name.removesuffix(".json"))
        record = read(socket_path)
        if record is not None:
            yield socket_path, record
