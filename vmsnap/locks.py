"""One VM, one operation at a time: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmsnap.errors import Busy, VmsnapError
from vmsnap.model import check_name

GUARDIAN = "guardian"
"""The purpose of a guardian that sets a capture right; it takes a second or two and is waited for."""
GUARDIAN_PATIENCE_SECONDS = 60.0
_UNNAMED_PATIENCE_SECONDS = 10.0
"""How long a holder is waited for whose note is missing or of a process that has ended: it is about to write one."""
_LOOK_EACH_SECONDS = 0.02


@contextmanager
def vm_lock(
    state_dir: Path, vm: str, purpose: str, *, patience_seconds: float = 0.0, kind: str = "VM"
) -> Iterator[None]:
    """Hold the lock of `vm` (flock(2) on a file in the state folder; the kernel drops it when the process ends).

    Waits `patience_seconds` for another holder, and for a guardian as long as that takes. A holder who has not said yet
    who it is may be one. What is locked may be something else than a VM, as `kind` says.

    :raises Busy: another process holds it; who, what for and since when is in the message
    :raises VmsnapError: the file cannot be made
    """
    path = state_dir / "locks" / f"{check_name(vm, f'{kind} name')}.lock"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise VmsnapError(f"{kind} {vm!r} cannot be locked: {e.strerror}: {path}") from e
    begun = time.monotonic()
    try:
        while not _taken(descriptor):
            holder = _note(descriptor)
            patience = patience_seconds
            if holder.get("purpose") == GUARDIAN:
                patience = max(patience, GUARDIAN_PATIENCE_SECONDS)
            elif not _lives(holder):
                patience = max(patience, _UNNAMED_PATIENCE_SECONDS)
            if time.monotonic() - begun >= patience:
                raise Busy(f"{kind} {vm!r} is busy: {_holder(holder)}", cure="try again when it is done")
            time.sleep(_LOOK_EACH_SECONDS)
        note = {"pid": os.getpid(), "purpose": purpose, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        _write_note(descriptor, json.dumps(note).encode())
        try:
            yield
        finally:
            # Not to be taken for the next holder's.
            _write_note(descriptor, b"")
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_note(descriptor: int, note: bytes) -> None:
    # It is for people: where a full disk does not take it the lock holds all the same.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note, 0)


def _note(descriptor: int) -> dict[str, object]:
    try:
        note = json.loads(os.pread(descriptor, 1000, 0))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _lives(note: dict[str, object]) -> bool:
    return isinstance(note.get("pid"), int) and Path("/proc", str(note["pid"])).exists()


def _holder(note: dict[str, object]) -> str:
    if not note.keys() >= {"pid", "purpose", "since"}:
        return "another process holds its lock"
    return f"{note['purpose']} by process {note['pid']} since {note['since']}"
