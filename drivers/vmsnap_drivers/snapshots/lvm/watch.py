"""Watches how full snapshots and their pools get from the moment at which they exist, and acts before it is too late.

A thick snapshot that fills up is extended while its group has room. A thin pool that fills up is relieved of what we
keep in it: its guests would else be stopped by it. What cannot be helped is told while there is time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding, SnapshotPlan
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.fills import parse_status
from vmsnap_drivers.snapshots.lvm.names import VolumeNames, names_of
from vmsnap_drivers.snapshots.lvm.watched import Watched, WatchedPool, WatchedSnapshot

_EVERY_SECONDS: Final = 1.0


class Watch:
    """Watches the snapshots of one plan, in a thread of its own, from `start` to `stop`."""

    def __init__(self, lvm: Lvm, plan: SnapshotPlan, grow: bool, limit_percent: int) -> None:
        self._lvm = lvm
        pools: dict[tuple[str, str], list[VolumeNames]] = {}
        thick = []
        for names in names_of(plan):
            if names.thin:
                pools.setdefault((names.group, names.pool), []).append(names)
            else:
                thick.append(names)
        # Pools first: guests depend on them.
        self._watched: list[Watched] = [
            *(WatchedPool(lvm, its, plan.tag, limit_percent / 100) for its in pools.values()),
            *(WatchedSnapshot(lvm, names, grow=grow) for names in thick),
        ]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"lvm watch {plan.tag}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for what it does at the moment; idempotent. Blocks."""
        self._stopped.set()
        self._thread.join()

    def problem(self, names: VolumeNames) -> str:
        """Why the snapshot of this disk is lost or about to be, as the last look knew; empty where nothing is known."""
        return self.given_up(names) or self._of(names).problem

    def given_up(self, names: VolumeNames) -> str:
        """Why the snapshot of this disk was given up: nobody is to open it any more, so that it can be removed; empty
        while it is not.
        """
        return self._of(names).given_up

    def threats(self) -> Sequence[Finding]:
        """What will cost the backup unless somebody helps, and what was given up for it, as the last look knew."""
        return [threat for each in self._watched for threat in each.threats]

    def look(self) -> None:
        """Look once, and do what is needed. What fails is tried again at the next look, and until then it is the reason
        that `problem` gives.
        """
        try:
            fills = parse_status(self._lvm.status())
        except VmsnapError as e:
            for each in self._watched:
                each.problem = e.message
            return
        for each in self._watched:
            try:
                each.see_to(fills.get(each.device))
            except VmsnapError as e:
                each.problem = e.message

    def _of(self, names: VolumeNames) -> Watched:
        return next(each for each in self._watched if names in each.names)

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            self.look()
