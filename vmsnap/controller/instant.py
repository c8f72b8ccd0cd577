"""The evidence that memory and all disks of a backup come from one pause window."""

from __future__ import annotations

from dataclasses import dataclass

from vmsnap.errors import HypervisorError
from vmsnap.model import Moment


@dataclass(frozen=True)
class Instant:
    """The evidence of one instant: the pause window, and that everything lies in it."""

    paused: Moment | None
    snapshots: tuple[Moment, ...]
    duplicated: Moment
    resumed: Moment | None

    def moments(self) -> tuple[Moment, ...]:
        """All of them, in the order of their times."""
        known = [m for m in (self.paused, *self.snapshots, self.duplicated, self.resumed) if m is not None]
        return tuple(sorted(known, key=lambda moment: moment.monotonic_ns))

    def pause_seconds(self) -> float:
        """How long the guest stood still because of us, by the hypervisor's own clock; 0 where it was stopped
        anyway.
        """
        if self.paused is None or self.resumed is None:
            return 0.0
        return (self.resumed.wall_ns - self.paused.wall_ns) / 1e9

    def check(self) -> None:
        """:raises HypervisorError: it cannot be shown that memory and all disks come from one pause window"""
        if self.paused is None or self.resumed is None:
            return
        for moment in (*self.snapshots, self.duplicated):
            if not self.paused.monotonic_ns <= moment.monotonic_ns <= self.resumed.monotonic_ns:
                raise HypervisorError(
                    f"{moment.name} was not taken inside the pause window, so memory and disks are not of one instant",
                    cure="this is a defect of the driver; the VM is not harmed",
                )
