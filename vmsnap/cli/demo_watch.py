"""Watches from outside how a simulated guest counts."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event, Thread

from vmsnap.errors import VmsnapError
from vmsnap_drivers.hypervisors.simulated.control import Control

_INTERVAL_SECONDS = 0.002


class Watch:
    """Looks at a guest's counter all the time, from a thread, and remembers how long it ever stood still."""

    def __init__(self, socket: Path) -> None:
        self._control = Control(socket)
        self._end = Event()
        self._longest_seconds = 0.0
        self._thread = Thread(target=self._look, name="vmsnap-demo-watch", daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """End it; returns the longest time, in seconds, for which the counter was seen unchanged. Idempotent."""
        self._end.set()
        self._thread.join()
        self._control.close()
        return self._longest_seconds

    def _look(self) -> None:
        counter, since = -1, time.monotonic()
        while not self._end.wait(_INTERVAL_SECONDS):
            try:
                seen = int(self._control.call("status", 5.0)["counter"])
            except VmsnapError:
                # It does not answer: for whoever looks from outside it stands still.
                seen = counter
            now = time.monotonic()
            self._longest_seconds = max(self._longest_seconds, now - since)
            if seen != counter:
                counter, since = seen, now
