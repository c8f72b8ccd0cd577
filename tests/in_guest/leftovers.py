"""What a test file can leave in a guest that others use after it: the storage guest is booted once, for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_SECONDS = 20.0
_POLL_SECONDS = 0.1


def present() -> frozenset[str]:
    """All that there is of it: devices, targets, sessions, pools, mounts, processes."""
    return frozenset(_present())


def left_since(before: frozenset[str], seconds: float = PATIENCE_SECONDS) -> list[str]:
    """What was not there before and does not go by itself: a process may be about to end."""
    deadline = time.monotonic() + seconds
    while left := sorted(present() - before):
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return left


def _present() -> Iterator[str]:
    for path in Path("/sys/block").glob("*/dm/name"):
        yield f"the volume {path.read_text().strip()}"
    # A volume group lies on such a device, with volumes that are active or without.
    for path in Path("/sys/block").glob("*/loop/backing_file"):
        yield f"a loop device on {path.read_text().strip()}"
    targets = Path("/sys/kernel/config/target")
    yield from (f"the target {path.name}" for path in targets.glob("iscsi/iqn*"))
    yield from (f"the backing store {path.name}" for path in targets.glob("core/*_*/*") if path.is_dir())
    yield from (f"the iSCSI session {path.name}" for path in Path("/sys/class/iscsi_session").glob("*"))
    yield from (f"the pool {path.parent.name}" for path in Path("/proc/spl/kstat/zfs").glob("*/state"))
    for line in Path("/proc/mounts").read_text().splitlines():
        source, place, kind = line.split()[:3]
        if source.startswith("/dev/") or kind == "zfs":
            yield f"the file system on {place}"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if words[0]:  # threads of the kernel have none
            yield f"process {path.parent.name}, {b' '.join(words).decode(errors='replace').strip()[:200]}"
