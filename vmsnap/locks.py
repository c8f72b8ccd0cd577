"""One VM, one operation at a time: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsnap.errors import Busy
from vmsnap.model import check_name


@contextmanager
def vm_lock(state_dir: Path, vm: str, purpose: str) -> Iterator[None]:
    """Hold the lock of `vm` (flock(2) on a file in the state folder; the kernel drops it when the process ends).

    :raises Busy: another process holds it; who, what for and since when is in the message
    """
    folder = state_dir / "locks"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{check_name(vm, 'VM name')}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"VM {vm!r} is busy: {_holder(descriptor)}", cure="try again when it is done") from None
        os.ftruncate(descriptor, 0)
        note = {"pid": os.getpid(), "purpose": purpose, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 1000, 0))
        return f"{note['purpose']} by process {note['pid']} since {note['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process holds its lock"
