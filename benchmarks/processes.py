"""Runs what is measured as a process of its own, from a cold cache to the disk, and says what it took."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vmsnap.repository import SparseFileReader

_READ_BYTES = 4 << 20
_READERS = 2


class ToolFailed(Exception):
    """A tool ended with an error; the message has its last words."""


@dataclass(frozen=True)
class Took:
    """What one run took."""

    seconds: float
    """Wall clock, until all that it wrote was on the disk."""
    processor_seconds: float
    """User and system time of the process and its children."""
    peak_bytes: int
    """The most memory that it had, resident."""


def run(argv: Sequence[str], environment: Mapping[str, str], written: Path, *, folder: Path, log: Path) -> Took:
    """Run a tool, make what it wrote durable, and return what both took. Blocks.

    Memory is the kernel's count for the process, which begins with that of this one: keep this one small.

    :param written: a file or folder; all files in it are synced, those that the tool has synced cost nothing
    :raises ToolFailed: it ended with an error
    """
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            argv, env={**environment}, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        _each_file(written, os.fsync)
        seconds = time.perf_counter() - begin
    if process.returncode:
        said = log.read_text(errors="replace")[-1000:]
        raise ToolFailed(f"{argv[0]} ended with {process.returncode}: {said}")
    return Took(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def drop_from_cache(*paths: Path) -> None:
    """Have the kernel forget the content of these files, and of all files in these folders; they are synced first."""
    for path in paths:
        _each_file(path, _forget)


def read_all(path: Path) -> float:
    """Read all data of a file, as fast as it goes, so that it is in the page cache; returns the seconds."""
    begin = time.perf_counter()
    with SparseFileReader(path, path.stat().st_size) as reader:
        places = [
            (at, min(_READ_BYTES, extent.offset + extent.length - at))
            for extent in reader.extents()
            if not extent.zero
            for at in range(extent.offset, extent.offset + extent.length, _READ_BYTES)
        ]
    # What is read is not looked at, so all pieces share one buffer.
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_READERS) as threads:
        for _ in threads.map(lambda place: os.preadv(file.fileno(), [buffer[: place[1]]], place[0]), places):
            pass
    return time.perf_counter() - begin


def stored_bytes(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _forget(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _each_file(path: Path, work: Callable[[int], None]) -> None:
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not file.is_file() or file.is_symlink():
            continue
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            work(fd)
        finally:
            os.close(fd)
