"""The guardians that a test has left behind: one ends a moment after what it recovers is seen to be done."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from vmsnap.host import HostFolders

PATIENCE_SECONDS = 60.0


def guardians_of(state: Path) -> set[int]:
    """The guardians of the VMs in a state folder: their standard error is its ``guardian.log``."""
    log, found = str(state / "guardian.log"), set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            errors = (process / "fd/2").readlink()
        except OSError:  # it has ended meanwhile
            continue
        if str(errors) == log:
            found.add(int(process.name))
    return found


def remove_host(place: Path) -> None:
    """Remove the folder of a test, whose state folder is ``state`` within, with what it has in memory, once its
    guardians have ended: they write to both.

    :raises AssertionError: one does not end
    """
    state = place / "state"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left := guardians_of(state):
        assert time.monotonic() < deadline, f"guardians {left} have not ended: {(state / 'guardian.log').read_text()}"
        time.sleep(0.02)
    shutil.rmtree(HostFolders.find(state).memory_dir, ignore_errors=True)
    shutil.rmtree(place)
