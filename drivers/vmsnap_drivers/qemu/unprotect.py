"""Frees the guest of a QEMU whose background snapshot was broken off.

QEMU 7.2 forgets to lift the protection when a background snapshot fails or is cancelled (seen with a dead reader, and
with ``migrate_cancel``; 10.0 does it right). The next write of the guest, or of a device in QEMU's main loop, then
waits for ever, and with the main loop the monitor. So the protection is lifted from outside, by QEMU's own
userfaultfd, taken over with ``pidfd_getfd`` (Linux 5.6; the right to trace the process).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_PIDFD_GETFD: Final = 438
_UNREGISTER: Final = 0x8010AA01
_WRITEPROTECT: Final = 0xC018AA06
_RANGE: Final = struct.Struct("QQ")
_PROTECTION: Final = struct.Struct("QQQ")
_EACH_SECONDS: Final = 0.003

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def unprotect(pid: int) -> int:
    """Lift all write protection from a process's memory, and wake who waits for it; idempotent.

    Returns the number of ranges that were protected. A process that has ended has none.

    :raises PermissionError: this user may not trace the process
    """
    try:
        ranges = _protected_ranges(pid)
        if ranges:
            for descriptor in _userfaultfds(pid):
                with contextlib.closing(_Borrowed(pid, descriptor)) as ours:
                    ours.lift(ranges)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return len(ranges)


@contextlib.contextmanager
def kept_unprotected(lift: Callable[[], object]) -> Iterator[None]:
    """While this lasts, `lift` every write protection as soon as it comes: QEMU may be about to set one. `lift` calls
    `unprotect`, if it may."""
    over = threading.Event()

    def repeat() -> None:
        with contextlib.suppress(PermissionError):
            while True:
                lift()
                if over.wait(_EACH_SECONDS):
                    lift()
                    return

    thread = threading.Thread(target=repeat, name="vmsnap-unprotect", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Borrowed:
    """A duplicate of another process's userfaultfd."""

    def __init__(self, pid: int, descriptor: int) -> None:
        process = os.pidfd_open(pid)
        try:
            self._descriptor = int(_libc.syscall(_PIDFD_GETFD, process, descriptor, 0))
        finally:
            os.close(process)
        if self._descriptor < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        os.set_inheritable(self._descriptor, False)

    def lift(self, ranges: list[tuple[int, int]]) -> None:
        for start, length in ranges:
            # A range that is another userfaultfd's, or was freed meanwhile, is no error: the next look tells.
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._descriptor, _WRITEPROTECT, _PROTECTION.pack(start, length, 0))
                fcntl.ioctl(self._descriptor, _UNREGISTER, _RANGE.pack(start, length))

    def close(self) -> None:
        os.close(self._descriptor)


def _userfaultfds(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc", str(pid), "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(entry.readlink()) == "anon_inode:[userfaultfd]":
                found.append(int(entry.name))
    return found


def _protected_ranges(pid: int) -> list[tuple[int, int]]:
    """Mappings with the flag ``uw`` (userfaultfd write protection)."""
    found = []
    start = end = 0
    for line in Path("/proc", str(pid), "smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
        elif first == "VmFlags:" and "uw" in rest.split():
            found.append((start, end - start))
    return found
