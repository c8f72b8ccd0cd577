"""The thread in which libvirt tells of its events; one for a process, begun with its first connection."""

from __future__ import annotations

import os
import threading
from typing import Any

_lock = threading.Lock()
_started_in = 0


def start_event_loop(lib: Any) -> None:
    """Begin, unless it is done. libvirt wants this before a connection is opened."""
    global _started_in
    with _lock:
        if _started_in == os.getpid():
            return
        lib.virEventRegisterDefaultImpl()
        threading.Thread(target=_run, args=(lib,), name="vmsnap-libvirt-events", daemon=True).start()
        _started_in = os.getpid()


def _run(lib: Any) -> None:
    while True:
        lib.virEventRunDefaultImpl()
