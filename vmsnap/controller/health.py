"""Asks what threatens snapshots as long as they are needed, so that it is told before it costs the backup."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding, SnapshotPlan
from vmsnap.roles import SnapshotMechanism

ASK_EACH_SECONDS: Final = 1.0
Tell = Callable[[Finding], None]


class Health:
    """The health of some snapshots, asked for by a thread of its own from `start` to `stop`."""

    def __init__(self, asked: Sequence[tuple[SnapshotMechanism, SnapshotPlan]], tell: Tell) -> None:
        """`tell` is called by that thread with whatever is found, again each time; it must not raise."""
        self._asked = list(asked)
        self._tell = tell
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._ask_on, name="health of snapshots", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for what is asked at the moment; idempotent."""
        self._stopped.set()
        self._thread.join()

    def _ask_on(self) -> None:
        while not self._stopped.wait(ASK_EACH_SECONDS):
            for mechanism, plan in list(self._asked):
                try:
                    for finding in mechanism.health(plan):
                        self._tell(finding)
                except VmsnapError:
                    continue  # it may be known a second later; whoever reads a snapshot that is lost is told so
                except Exception as e:  # noqa: BLE001 - a driver's defect here must not cost the backup, nor be hidden
                    self._asked.remove((mechanism, plan))
                    said = f"mechanism {mechanism.name!r} fails to tell how its snapshots fare: {e!r}"
                    self._tell(Finding(f"snapshots {plan.tag}", "note", said))
