"""Watches how full the pools behind LUNs become while snapshots are in them, and tells of it while there is time.

A pool that runs full would fail the writes of every guest that has a disk in it. So its snapshots are given up before:
that costs the backup, and no guest anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding
from vmsnap_drivers.snapshots.iscsi.stores import Fill

_EVERY_SECONDS: Final = 5.0
_FULL: Final = 0.95
_NEAR: Final = 0.9
"""How full a pool is when it is told of."""


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
        self._threats: dict[str, Finding] = {}
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

    def threats(self) -> Sequence[Finding]:
        """What will cost the backup unless somebody helps, as the last looks knew; once for each pool."""
        return list({threat.subject: threat for threat in list(self._threats.values())}.values())

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            for each in self._watched:
                self._look(each)

    def _look(self, watched: Watched) -> None:
        try:
            if watched.snapshot not in self._given_up and not self._is_full(watched):
                return
            watched.give_up()
        except VmsnapError:
            return  # it is in use, or cannot be asked: the next look may succeed

    def _is_full(self, watched: Watched) -> bool:
        """Whether the snapshot is to be given up, by how full its pool is now: another's may have been enough."""
        fill = watched.fill()
        self._threats.pop(watched.snapshot, None)
        if fill is None or fill.used < min(_NEAR, _FULL):
            return False
        self._threats[watched.snapshot] = Finding(
            fill.what,
            "note",
            f"{fill.used:.0%} of it is used: from {_FULL:.0%} on the snapshots in it are given up, which costs the"
            " backup",
            "extend the pool, or free room in it",
        )
        if fill.used < _FULL:
            return False
        self._given_up[watched.snapshot] = (
            f"{fill.what} is full to {fill.used:.0%}, and the snapshot was given up to spare the guests"
        )
        return True
