"""What a watch sees to: a thick snapshot, which it extends, and a thin pool, which it relieves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from vmsnap.model import Finding
from vmsnap_drivers.snapshots.lvm import room
from vmsnap_drivers.snapshots.lvm.commands import Lvm, device_name
from vmsnap_drivers.snapshots.lvm.fills import Fill
from vmsnap_drivers.snapshots.lvm.names import VolumeNames, is_made_for
from vmsnap_drivers.snapshots.lvm.volumes import Volume, named

_GROW_FROM: Final = 0.6
"""How full a thick snapshot is when it is extended, to twice its size where there is room; else it is told of."""
_NEAR: Final = 0.9
"""The part of its limit from which on a thin pool is told of."""


class Watched(ABC):
    """One device, and the snapshots that are lost with it. `problem` is what keeps it from being helped."""

    def __init__(self, lvm: Lvm, device: str, names: Sequence[VolumeNames]) -> None:
        self.device = device
        self.names = names
        self.given_up = ""
        """Why its snapshots are lost; empty while they are not."""
        self.problem = ""
        self.threats: tuple[Finding, ...] = ()
        """What will cost the backup unless somebody helps."""
        self._lvm = lvm

    @abstractmethod
    def see_to(self, fill: Fill | None) -> None:
        """Do what is needed; `fill` is None where there is no such device.

        :raises VmsnapError: a command failed; the next call tries again
        """


class WatchedSnapshot(Watched):
    """A thick snapshot: it gets more room in time, where it may and there is some."""

    def __init__(self, lvm: Lvm, names: VolumeNames, *, grow: bool) -> None:
        super().__init__(lvm, device_name(names.group, names.snapshot), [names])
        self._names = names
        self._grow = grow
        self._never_overflows = False

    def see_to(self, fill: Fill | None) -> None:
        """See `Watched.see_to`."""
        if fill is not None and fill.lost and not self.given_up:
            why = f"the guest overwrote more than the {self._names.room_bytes} bytes of room that it began with"
            self.given_up = f"{why}; {self.problem}" if self.problem else why
        # What was told stands until it is done, not only until it is begun.
        threats: tuple[Finding, ...] = ()
        if fill is not None and fill.data >= _GROW_FROM and not self.given_up and not self._never_overflows:
            threats = self._extend(fill)
        self.threats = threats
        self.problem = self.problem if threats else ""

    def _extend(self, fill: Fill) -> tuple[Finding, ...]:
        group = self._names.group
        volumes = self._lvm.volumes([group])
        volume, origin = named(volumes, group, self._names.snapshot), named(volumes, group, self._names.origin)
        if volume is None or origin is None:
            return ()
        lacking = room.most_of(origin) - volume.size_bytes
        if lacking <= 0:
            self._never_overflows = True
            return ()
        more = min(volume.size_bytes, lacking, volume.group_free_bytes) // volume.extent_bytes * volume.extent_bytes
        if self._grow and more:
            self._lvm.change("lvextend", "--size", f"+{more}b", volume.full_name)
            return ()
        if self._grow:
            self.problem = f"group {group} has no room left to extend it"
            cure = f"add a disk to the group: vgextend {group} DEVICE"
        else:
            self.problem = "the option grow=no keeps it from being extended"
            cure = f"extend it: lvextend --size +SIZE {volume.full_name}; then set grow=yes, or a larger snapshot_size"
        return (
            Finding(
                f"the snapshot {volume.full_name} of {self._names.device}",
                "note",
                f"{fill.data:.0%} of its {volume.size_bytes} bytes of room are used, and {self.problem}: an overflow"
                " costs the backup",
                cure,
            ),
        )


class WatchedPool(Watched):
    """A thin pool: where it fills up, it is relieved of the records of changes that are kept in it, and where that is
    not enough, of the plan's snapshots.
    """

    def __init__(self, lvm: Lvm, names: Sequence[VolumeNames], tag: str, limit: float) -> None:
        self._group, self._pool = names[0].group, names[0].pool
        super().__init__(lvm, f"{device_name(self._group, self._pool)}-tpool", names)
        self._tag = tag
        self._limit = limit
        self._tried_marks: set[str] = set()
        self._relieved: tuple[Finding, ...] = ()
        self._removed = False

    def see_to(self, fill: Fill | None) -> None:
        """See `Watched.see_to`. Marks go first and alone: the next look shows whether that was enough."""
        self.problem = ""
        if fill is None or self._removed:
            return
        used = max(fill.data, fill.metadata)
        if not self.given_up and used < self._limit:
            near = [self._near(fill)] if used >= self._limit * _NEAR else []
            self.threats = (*self._relieved, *near)
            return
        ours = [v for v in self._lvm.volumes([self._group]) if v.pool == self._pool and v.ours]
        if not self.given_up and self._remove_marks(fill, [v for v in ours if v.kind == "mark"]):
            return
        self.given_up = self.given_up or (
            f"thin pool {self._group}/{self._pool} is full to {fill.data:.0%} (metadata {fill.metadata:.0%}), and the"
            " snapshot was given up to spare the guests"
        )
        wanted = {names.snapshot for names in self.names}
        # It fails while somebody reads one; the next look finds it closed.
        self._lvm.remove([v for v in ours if v.name in wanted and is_made_for(v, self._tag, "snapshot")])
        self._removed = True

    def _remove_marks(self, fill: Fill, marks: Sequence[Volume]) -> bool:
        """Whether there was one to be removed. One that cannot be is not tried again: guests do not wait for it."""
        untried = [mark for mark in marks if mark.full_name not in self._tried_marks]
        if not untried:
            return False
        self._tried_marks |= {mark.full_name for mark in untried}
        self._lvm.remove(untried)
        self._relieved = self.threats = (
            Finding(
                f"kept snapshots in thin pool {self._group}/{self._pool}",
                "note",
                f"{len(untried)} were removed, because the pool was full to {fill.data:.0%} (metadata"
                f" {fill.metadata:.0%}): the next backup reads these disks whole",
                "extend the pool (lvextend), or set marks=0",
            ),
        )
        return True

    def _near(self, fill: Fill) -> Finding:
        disks = ", ".join(names.device for names in self.names)
        return Finding(
            f"thin pool {self._group}/{self._pool}",
            "note",
            f"{fill.data:.0%} of its data and {fill.metadata:.0%} of its metadata are used: from {self._limit:.0%} on"
            f" the snapshots of {disks} are given up, which costs the backup",
            "extend the pool (lvextend), or remove volumes from it",
        )
