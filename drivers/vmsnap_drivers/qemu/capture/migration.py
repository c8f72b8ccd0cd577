"""QEMU's outgoing migration as all captures need it: begun so that its events can be told from those of the one before,
and ended.
"""

from __future__ import annotations

import time
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap_drivers.qemu.monitor import Event, Monitor, MonitorError

MIGRATION_RUNS: Final = frozenset(
    ["setup", "active", "pre-switchover", "device", "wait-unplug", "cancelling", "postcopy-active", "colo"]
)
"""States of a migration that is going on."""
FAILURES: Final = ("failed", "cancelled")
ENDS: Final = ("completed", *FAILURES)
_BETWEEN_TRIES_SECONDS: Final = 0.001


def migration_status(monitor: Monitor) -> str:
    """What QEMU's migration does now; ``none`` where there was none yet."""
    return str(monitor.execute("query-migrate").get("status", "none"))


def start_migration(monitor: Monitor, uri: str, timeout_seconds: float = 5.0) -> int:
    """Begin a migration; the capability ``events`` is on. Returns the point in QEMU's events from which MIGRATION tells
    of this one.

    One that failed or was cancelled just before has its end in ``query-migrate`` first, then sends the event, and
    gives its place up last, in QEMU's main loop ("duplicate yank instance" until then; ``bg_migration_thread``,
    ``migrate_fd_cleanup`` and ``qmp_migrate`` in ``migration/migration.c``, 7.2). So a refusal is waited out, and
    events count from this migration's own ``setup``.

    :raises MonitorError: QEMU refused
    :raises HypervisorError: the one before did not give its place up in time
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        mark = monitor.mark()
        try:
            monitor.execute("migrate", {"uri": uri})
        except MonitorError as e:
            if "yank" not in e.description or time.monotonic() > deadline:
                raise
            # The refused one stands in "setup" until it is cancelled.
            cancel_migration(monitor, max(0.1, deadline - time.monotonic()))
            time.sleep(_BETWEEN_TRIES_SECONDS)
        else:
            begun = [event for event in monitor.events_since(mark) if is_status(event, ("setup",))]
            return begun[-1].number if begun else mark


def cancel_migration(monitor: Monitor, timeout_seconds: float = 5.0) -> None:
    """End a migration that is going on and wait until it has ended; the VM may run again by that. Idempotent.

    :raises HypervisorError: it did not end in time
    """
    deadline = time.monotonic() + timeout_seconds
    mark = monitor.mark()
    while migration_status(monitor) in MIGRATION_RUNS:
        monitor.execute("migrate_cancel")
        if time.monotonic() > deadline:
            raise HypervisorError(f"the migration of the QEMU at {monitor.path} cannot be cancelled")
        # The capability "events" may be off, so an event is only the quicker of the two ways to hear of the end.
        _wait_shortly(monitor, mark)


def is_status(event: Event, statuses: tuple[str, ...]) -> bool:
    """Whether the event tells that a migration came to one of the statuses."""
    return event.name == "MIGRATION" and event.data["status"] in statuses


def _wait_shortly(monitor: Monitor, mark: int) -> None:
    deadline = time.monotonic() + 0.01
    while time.monotonic() < deadline:
        if any(is_status(event, ENDS) for event in monitor.events_since(mark)):
            return
        time.sleep(_BETWEEN_TRIES_SECONDS)
