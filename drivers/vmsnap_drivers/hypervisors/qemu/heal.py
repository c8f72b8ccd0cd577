"""Makes a QEMU whole again after a background snapshot that was broken off.

QEMU before 9.0 (seen with 7.2) keeps the mark ``RAM_UF_WRITEPROTECT`` on its RAM blocks then, and every later ordinary
migration of that VM fails, its operator's too ("uffd_change_protection() failed", ``ram_save_release_protection``,
``migration/ram.c``). Only a background snapshot that completes takes the mark away: so one is made, and thrown away.
"""

from __future__ import annotations

import socket
import threading
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap.model import VmState
from vmsnap_drivers.hypervisors.qemu.cow import CAPABILITIES, LEAVES_STOPPED_FROM
from vmsnap_drivers.hypervisors.qemu.describe import vm_state
from vmsnap_drivers.hypervisors.qemu.drain import DESCRIPTOR_NAME, STREAM_URI
from vmsnap_drivers.hypervisors.qemu.revive import cancel_migration, migration_status
from vmsnap_drivers.hypervisors.qemu.settings import Settings, apply
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.unprotect import kept_unprotected

_TIMEOUT_SECONDS: Final = 300.0
_BUFFER_BYTES: Final = 1024 * 1024


def needs_healing(monitor: Monitor) -> bool:
    """Whether the last migration, which must have been a background snapshot, left marks behind.

    A guest that stands still is left alone, as these QEMUs would start it.
    """
    if monitor.version >= LEAVES_STOPPED_FROM or vm_state(monitor) is not VmState.EXECUTING:
        return False
    return migration_status(monitor) in ("failed", "cancelled")


def heal(monitor: Monitor) -> None:
    """Make a background snapshot and throw it away: about 0.6 s a GiB, and a pause of some milliseconds. The migration
    settings are those of a capture afterwards.

    :raises HypervisorError: it did not complete
    """
    near, far = socket.socketpair()
    with near:
        with far:
            apply(monitor, Settings.read(monitor), CAPABILITIES, downtime_ms=300)
            monitor.send_descriptor(DESCRIPTOR_NAME, far.fileno())
        reader = threading.Thread(target=_throw_away, args=(near,), name="vmsnap-heal", daemon=True)
        reader.start()
        mark = monitor.mark()
        try:
            monitor.execute("migrate", {"uri": STREAM_URI})
            ended = monitor.wait_for_event(
                "MIGRATION",
                since=mark,
                timeout_seconds=_TIMEOUT_SECONDS,
                match=lambda event: event.data["status"] in ("completed", "failed", "cancelled"),
            )
        except BaseException:
            # Broken off, it does what it is to cure.
            with kept_unprotected(monitor.peer_pid):
                cancel_migration(monitor)
            raise
        if ended.data["status"] != "completed":
            raise HypervisorError(
                f"the QEMU at {monitor.path} cannot migrate any more, after a capture that was broken off",
                cure="restart the VM when it suits",
            )
        reader.join()


def _throw_away(near: socket.socket) -> None:
    buffer = bytearray(_BUFFER_BYTES)
    while near.recv_into(buffer):
        pass
