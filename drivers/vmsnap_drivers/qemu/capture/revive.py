"""Makes a VM execute, in whatever state a capture left it, from any process; and stops it."""

from __future__ import annotations

import time
from typing import Final

from vmsnap.errors import HypervisorError, VmGone
from vmsnap.model import Moment
from vmsnap_drivers.qemu.capture.migration import MIGRATION_RUNS, cancel_migration, migration_status
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError

ENDED: Final = frozenset(["shutdown", "internal-error", "guest-panicked"])
"""What QEMU says of a guest that will not run again."""
_BETWEEN_TRIES_SECONDS: Final = 0.001


def make_run(monitor: Monitor, timeout_seconds: float = 5.0) -> Moment:
    """Make the VM execute and see that it does; return the moment it began. Idempotent.

    A migration is cancelled only where the VM stands still, so that a copy that goes on beside a running guest is left
    alone.

    :raises VmGone: QEMU or its guest has ended
    :raises HypervisorError: it could not be made to run in time
    """
    deadline = time.monotonic() + timeout_seconds
    mark = monitor.mark()
    refused = ""
    while True:
        status = monitor.execute("query-status")
        if status["running"]:
            resumed = [event for event in monitor.events_since(mark) if event.name == "RESUME"]
            return resumed[-1].moment("resume") if resumed else Moment.now("resume")
        if status["status"] in ENDED:
            raise VmGone(f"the guest behind {monitor.path} has ended ({status['status']})")
        if time.monotonic() > deadline:
            raise HypervisorError(f"the VM behind {monitor.path} cannot be made to run: {refused or status['status']}")
        if migration_status(monitor) in MIGRATION_RUNS:
            cancel_migration(monitor, max(0.1, deadline - time.monotonic()))
            continue
        try:
            monitor.execute("cont")
        except MonitorError as e:
            # QEMU 10.0 says "Migration is not finalized yet" for a moment after the end of a migration.
            refused = e.description
            time.sleep(_BETWEEN_TRIES_SECONDS)


def stop(monitor: Monitor) -> Moment:
    """Stop a VM, its disks drained and flushed; one that stands still stays so. Return the moment."""
    mark = monitor.mark()
    monitor.execute("stop")
    stopped = [event for event in monitor.events_since(mark) if event.name == "STOP"]
    return stopped[-1].moment("pause") if stopped else Moment.now("pause")
