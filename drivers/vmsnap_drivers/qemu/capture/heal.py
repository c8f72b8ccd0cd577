"""Makes a QEMU whole again after a background snapshot that was broken off.

QEMU before 9.0 (seen with 7.2) keeps the mark ``RAM_UF_WRITEPROTECT`` on its RAM blocks then, and every later ordinary
migration of that VM fails, its operator's too ("uffd_change_protection() failed", ``ram_save_release_protection``,
``migration/ram.c``). Only a background snapshot that completes takes the mark away: so one is made, and thrown away.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from functools import partial
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap.model import VmState
from vmsnap_drivers.qemu.capture.cow import CAPABILITIES, LEAVES_STOPPED_FROM
from vmsnap_drivers.qemu.capture.drain import DESCRIPTOR_NAME, STREAM_URI
from vmsnap_drivers.qemu.capture.migration import (
    ENDS,
    cancel_migration,
    is_status,
    migration_status,
    start_migration,
)
from vmsnap_drivers.qemu.capture.settings import Settings, apply
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.status import vm_state
from vmsnap_drivers.qemu.unprotect import kept_unprotected, unprotect

_TIMEOUT_SECONDS: Final = 300.0
_AFTER_STREAM_SECONDS: Final = 5.0
"""How long after its stream's end a migration may take to say how it ended. One that somebody cancelled may say
nothing at all: a device writes to protected memory in QEMU's main loop, and waits there for ever."""
_LOOK_EACH_SECONDS: Final = 0.01
_TRIES: Final = 5
_BUFFER_BYTES: Final = 1024 * 1024


def needs_healing(monitor: Monitor) -> bool:
    """Whether the last migration, which must have been a background snapshot, left marks behind.

    A guest that stands still is left alone, as these QEMUs would start it.
    """
    if monitor.version >= LEAVES_STOPPED_FROM or vm_state(monitor) is not VmState.EXECUTING:
        return False
    return migration_status(monitor) in ("failed", "cancelled")


def heal(monitor: Monitor) -> None:
    """If it is needed, make a background snapshot and throw it away: about 0.6 s a GiB, and a pause of some
    milliseconds. The migration settings are those of a capture afterwards. Nobody else may touch the protection
    meanwhile (module `turn`).

    One that is broken off is tried again: somebody with a monitor of his own may have cancelled it.

    :raises HypervisorError: none completed
    """
    for _ in range(_TRIES):
        if not needs_healing(monitor):
            return
        _make_and_throw_away(monitor)
    if needs_healing(monitor):
        raise HypervisorError(
            f"the QEMU at {monitor.path} cannot migrate any more, after a capture that was broken off",
            cure="restart the VM when it suits",
        )


def _make_and_throw_away(monitor: Monitor) -> None:
    near, far = socket.socketpair()
    with near:
        with far:
            apply(monitor, Settings.read(monitor), CAPABILITIES, downtime_ms=300)
            monitor.send_descriptor(DESCRIPTOR_NAME, far.fileno())
        reader = threading.Thread(target=_throw_away, args=(near,), name="vmsnap-heal", daemon=True)
        reader.start()
        ended = False
        try:
            ended = _completes(monitor, start_migration(monitor, STREAM_URI), reader)
        finally:
            if not ended:
                # Broken off, it does what it is to cure.
                with kept_unprotected(partial(unprotect, monitor.peer_pid)):
                    cancel_migration(monitor)
            with contextlib.suppress(OSError):  # it has ended by itself already
                near.shutdown(socket.SHUT_RDWR)
            reader.join()


def _completes(monitor: Monitor, mark: int, reader: threading.Thread) -> bool:
    """Wait for the end of the migration that began at `mark`; `reader` ends with its stream."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    stream_flows = True
    while time.monotonic() < deadline:
        for event in monitor.events_since(mark):
            if is_status(event, ENDS):
                return is_status(event, ("completed",))
        if stream_flows and not reader.is_alive():
            stream_flows = False
            deadline = time.monotonic() + _AFTER_STREAM_SECONDS
        time.sleep(_LOOK_EACH_SECONDS)
    return False


def _throw_away(near: socket.socket) -> None:
    buffer = bytearray(_BUFFER_BYTES)
    while near.recv_into(buffer):
        pass
