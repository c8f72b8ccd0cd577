"""Whose turn it is to touch the write protection of a QEMU whose capture by copy on write was broken off.

Anybody who needs such a QEMU lifts the protection: the guardian, a recovery, an onlooker whose connection would wait
for ever. Who heals it (module `heal`) makes a background snapshot of his own, which must keep its protection. These may
be different processes, and one of them late. So the record of the capture is locked (flock(2), which ends with its
holder): by many who lift, each for the milliseconds of one look, or by the one who heals.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from vmsnap.errors import Busy
from vmsnap_drivers.qemu.capture import record
from vmsnap_drivers.qemu.unprotect import kept_unprotected, unprotect

_PATIENCE_SECONDS: Final = 60.0
_LOOK_EACH_SECONDS: Final = 0.002


@contextmanager
def turn_to_lift(place: Path, *, giving_up: bool) -> Iterator[int | None]:
    """Within, the QEMU of the record at `place` may be freed: its process id; None where there is nothing to free, or
    somebody heals it. A capture that a living process is at is left alone, unless that is this one, `giving_up`.

    :raises HypervisorError: the record is damaged
    """
    with _opened(place) as descriptor:
        if descriptor is None or not _lock(descriptor, fcntl.LOCK_SH) or not _is_current(descriptor):
            yield None
            return
        left = record.read(place)
        if left is None or left.capture != "cow" or not left.qemu_lives():
            yield None
            return
        ours = giving_up and left.worker_pid == os.getpid()
        yield left.pid if ours or not left.worker_lives() else None


@contextmanager
def kept_free(place: Path, *, giving_up: bool) -> Iterator[None]:
    """What a QEMU whose capture was broken off may need to go on at all, and its monitor with it: while this lasts,
    lift every protection as soon as it comes, for as long as it is our turn.

    Raises what `turn_to_lift` raises.
    """

    def lift() -> None:
        with turn_to_lift(place, giving_up=giving_up) as broken_off:
            if broken_off is not None:
                unprotect(broken_off)

    # Whose turn it is is asked at each look: who was killed a moment ago may seem to live still.
    left = record.read(place)
    may_be_needed = left is not None and left.capture == "cow" and left.qemu_lives()
    with kept_unprotected(lift) if may_be_needed else nullcontext():
        yield


@contextmanager
def turn_to_heal(place: Path) -> Iterator[bool]:
    """Within, nobody else touches the protection. False where the capture was settled by somebody else meanwhile.

    :raises Busy: another process heals, and has not come to an end
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with _opened(place) as descriptor:
        if descriptor is None:
            yield False
            return
        while not _lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Busy(f"another process sets the capture of {place} right", cure="try again when it is done")
            time.sleep(_LOOK_EACH_SECONDS)
        yield _is_current(descriptor)


@contextmanager
def _opened(place: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(descriptor: int) -> bool:
    """Whether the file that is locked is still the record."""
    return os.fstat(descriptor).st_nlink > 0
