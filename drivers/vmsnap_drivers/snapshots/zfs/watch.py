"""Watches how full pools get while there are snapshots in them, and gives these up before guests lack room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding
from vmsnap_drivers.snapshots.zfs import room
from vmsnap_drivers.snapshots.zfs.commands import Zfs

_EVERY_SECONDS: Final = 1.0
_NEAR: Final = 0.9
"""The part of its limit from which on a pool or a quota is told of."""


class Watch:
    """Watches the data sets of one plan, in a thread of its own, from `start` to `stop`. Once they are too full
    `give_up` is called, and again at each look: it removes what is closed by then of what pins room for the plan.
    """

    def __init__(self, zfs: Zfs, datasets: Sequence[str], limit_percent: int, give_up: Callable[[], None]) -> None:
        self._zfs = zfs
        self._datasets = datasets
        self._limit = limit_percent / 100
        self._give_up = give_up
        self._given_up = ""
        self._problem = ""
        self._threats: tuple[Finding, ...] = ()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="zfs watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for what it does at the moment; idempotent. Blocks."""
        self._stopped.set()
        self._thread.join()

    def given_up(self) -> str:
        """Why the snapshots were given up: nobody is to open them or their clones any more, so that they can be
        removed; empty while they are not.
        """
        return self._given_up

    def problem(self) -> str:
        """Why the snapshots are lost or about to be, as the last look knew; empty where nothing is known."""
        return self._given_up or self._problem

    def threats(self) -> Sequence[Finding]:
        """What will cost the backup unless somebody helps, as the last look knew."""
        return self._threats

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            try:
                self._look()
                self._problem = ""
            except VmsnapError as e:
                # It may succeed a second later; until then, whoever reads a lost snapshot is told of this.
                self._problem = e.message

    def _look(self) -> None:
        if not self._given_up:
            fills = room.fills(self._zfs, self._datasets)
            self._threats = tuple(self._threat(fill) for fill in fills if fill.used >= self._limit * _NEAR)
            full = next((fill for fill in fills if fill.used >= self._limit), None)
            if full is None:
                return
            self._given_up = (
                f"{full.what} is full to {full.used:.0%}, and the snapshot was given up to spare the guests"
            )
        self._give_up()

    def _threat(self, fill: room.Fill) -> Finding:
        return Finding(
            fill.what,
            "note",
            f"{fill.used:.0%} of it is used: from {self._limit:.0%} on the snapshots in it are given up, which costs"
            " the backup",
            "free room, add a disk to the pool, or raise the quota",
        )
