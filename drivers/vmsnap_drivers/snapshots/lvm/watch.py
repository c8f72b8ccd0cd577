"""Watches how full snapshots and their pools get while a backup reads them, and acts before it is too late.

A thick snapshot that fills up is extended while its group has room. A thin pool that fills up is relieved of our
snapshots: its guests would else be stopped by it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import SnapshotPlan
from vmsnap_drivers.snapshots.lvm import room
from vmsnap_drivers.snapshots.lvm.commands import Lvm, device_name
from vmsnap_drivers.snapshots.lvm.names import VolumeNames, is_made_for, names_of
from vmsnap_drivers.snapshots.lvm.volumes import named

_EVERY_SECONDS: Final = 1.0
_GROW_FROM: Final = 0.6
"""How full a thick snapshot is when it is extended, to twice its size where there is room."""


@dataclass(frozen=True)
class Fill:
    """How full something is, from 0 to 1; `lost` where it has overflowed."""

    data: float
    metadata: float = 0.0
    lost: bool = False


class Watch:
    """Watches the snapshots of one plan, in a thread of its own, from `start` to `stop`."""

    def __init__(self, lvm: Lvm, plan: SnapshotPlan, grow: bool, limit_percent: int) -> None:
        self._lvm = lvm
        self._plan = plan
        self._names = names_of(plan)
        self._grow = grow
        self._limit = limit_percent / 100
        self._done: set[str] = set()
        self._given_up: dict[str, str] = {}
        self._problems: dict[str, str] = {}
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
        """Why the snapshot of this disk is lost or about to be; empty where nothing is known."""
        return self.given_up(names) or self._problems.get(names.snapshot, "")

    def given_up(self, names: VolumeNames) -> str:
        """Why the snapshot of this disk was given up: nobody is to open it any more, so that it can be removed; empty
        while it is not.
        """
        return self._given_up.get(names.snapshot, "")

    def look(self) -> None:
        """Look once, and do what is needed.

        :raises VmsnapError: a command failed
        """
        fills = parse_status(self._lvm.status())
        for names in self._names:
            device = device_name(names.group, names.pool or names.snapshot)
            fill = fills.get(f"{device}-tpool" if names.thin else device)
            if fill is None or names.snapshot in self._done:
                continue
            if names.thin and max(fill.data, fill.metadata) >= self._limit:
                self._relieve(names, fill)
            elif not names.thin and (fill.lost or fill.data >= _GROW_FROM):
                self._extend(names, fill)

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            try:
                self.look()
            except VmsnapError as e:
                # It may succeed a second later; whoever reads a lost snapshot is told of this.
                for names in self._names:
                    self._problems[names.snapshot] = e.message

    def _extend(self, names: VolumeNames, fill: Fill) -> None:
        if fill.lost:
            known = self._problems.get(names.snapshot, "")
            why = f"the guest overwrote more than the {names.room_bytes} bytes of room that it began with"
            self._given_up[names.snapshot] = f"{why}; {known}" if known else why
            self._done.add(names.snapshot)
            return
        if not self._grow:
            return
        volumes = self._lvm.volumes([names.group])
        volume, origin = named(volumes, names.group, names.snapshot), named(volumes, names.group, names.origin)
        if volume is None or origin is None or volume.size_bytes >= room.most_of(origin):
            return
        more = min(volume.size_bytes, room.most_of(origin) - volume.size_bytes, volume.group_free_bytes)
        if more < volume.extent_bytes:
            self._problems[names.snapshot] = f"group {names.group} has no room left to extend it"
            return
        size = more // volume.extent_bytes * volume.extent_bytes
        self._lvm.change("lvextend", "--size", f"+{size}b", volume.full_name)

    def _relieve(self, names: VolumeNames, fill: Fill) -> None:
        ours = [v for v in self._lvm.volumes([names.group]) if v.pool == names.pool and v.ours]
        marks = [v for v in ours if v.kind == "mark"]
        if marks:
            self._lvm.remove(marks)
            return
        self._given_up[names.snapshot] = (
            f"thin pool {names.group}/{names.pool} is full to {fill.data:.0%} (metadata {fill.metadata:.0%}), and the"
            " snapshot was given up to spare the guests"
        )
        # It fails while somebody reads it; the next look finds it closed.
        self._lvm.remove([v for v in ours if v.name == names.snapshot and is_made_for(v, self._plan.tag, "snapshot")])
        self._done.add(names.snapshot)


def parse_status(text: str) -> Mapping[str, Fill]:
    """How full the snapshots and pools in ``dmsetup status`` are, by the names of their devices (the kernel's
    Documentation/admin-guide/device-mapper, snapshot.rst and thin-provisioning.rst).
    """
    found = {}
    for line in text.splitlines():
        device, _, rest = line.partition(": ")
        words = rest.split()
        if words[2:3] == ["snapshot"]:
            used = _ratio(words[3]) if len(words) > 3 else None
            found[device] = Fill(1.0, lost=True) if used is None else Fill(used)
        elif words[2:3] == ["thin-pool"] and len(words) > 5:
            metadata, data = _ratio(words[4]), _ratio(words[5])
            found[device] = Fill(1.0 if data is None else data, 1.0 if metadata is None else metadata)
    return found


def _ratio(text: str) -> float | None:
    used, slash, total = text.partition("/")
    return int(used) / max(1, int(total)) if slash and used.isdecimal() and total.isdecimal() else None
