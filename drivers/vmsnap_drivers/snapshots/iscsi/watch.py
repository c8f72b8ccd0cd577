"""Watches how full the pools behind LUNs become while snapshots are in them.

A pool that runs full would fail the writes of every guest that has a disk in it. So its snapshots are given up before:
that costs the backup, and no guest anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap_drivers.snapshots.iscsi.stores import Fill

_EVERY_SECONDS: Final = 5.0
_FULL: Final = 0.95


@dataclass(frozen=True)
class Watched:
    """One snapshot: how full its pool is, and what gives it up, with all that pins the same room; called at each look
    from then on, since a part of it may be in use until later.
    """

    snapshot: str
    fill: Callable[[], Fill | None]
    give_up: Callable[[], None]


class Watch:
    """Watches the snapshots of one plan, in a thread of its own, from `start` to `stop`."""

    def __init__(self, tag: str, watched: Sequence[Watched]) -> None:
        self._watched = watched
        self._given_up: dict[str, str] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"iscsi watch {tag}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for what it does at the moment; idempotent. Blocks."""
        self._stopped.set()
        self._thread.join()

    def given_up(self, snapshot: str) -> str:
        """Why a snapshot was given up, and neither that nor a clone of it is to be opened any more; empty while it is
        not.
        """
        return self._given_up.get(snapshot, "")

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            for each in self._watched:
                self._look(each)

    def _look(self, watched: Watched) -> None:
        try:
            if watched.snapshot not in self._given_up:
                fill = watched.fill()
                if fill is None or fill.used < _FULL:
                    return
                self._given_up[watched.snapshot] = (
                    f"{fill.what} is full to {fill.used:.0%}, and the snapshot was given up to spare the guests"
                )
            watched.give_up()
        except VmsnapError:
            return  # it is in use, or cannot be asked: the next look may succeed
