"""Disks that their hypervisor holds at the instant, so that their snapshots may be slow: taken after the pause, of
disks to which nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.snapshots import Snapshots
from vmsnap.errors import CannotCapture, UsageError
from vmsnap.journal import Operation
from vmsnap.model import Disk, FreezePlan, Moment, Window, to_json
from vmsnap.roles import Hypervisor

OVERLAY: Final = "overlay"
NO_FREEZE: Final = "none"
WAYS: Final = (NO_FREEZE, OVERLAY)
"""How disks can be held, by the words of command line, configuration and manifests."""

LOOK_EACH_SECONDS: Final = 0.5
"""How often it is seen to, while snapshots are taken, that the disks are held and that there is room."""


def is_frozen(freeze: str) -> bool:
    """Whether disks are to be held, by the user's word.

    :raises UsageError: it is none
    """
    if freeze not in WAYS:
        raise UsageError(f"disks cannot be frozen by {freeze!r}", cure=f"one of: {', '.join(WAYS)}")
    return freeze == OVERLAY


class FrozenDisks:
    """The disks of one VM whose mechanisms are asked after the pause; none until `plan` has found some."""

    def __init__(self, hypervisor: Hypervisor, operation: Operation, drivers: Drivers) -> None:
        self.snapshots = Snapshots(operation, drivers)
        self.moment: Moment | None = None
        self._hypervisor = hypervisor
        self._operation = operation
        self._drivers = drivers
        self._disks: list[Disk] = []
        self._plan: FreezePlan | None = None
        self._position: int | None = None

    def check(self) -> None:
        """See that the hypervisor can hold disks.

        :raises CannotCapture: it cannot
        """
        if not self._hypervisor.freezes:
            raise CannotCapture(
                f"VM {self._hypervisor.vm!r} cannot be backed up with its disks frozen: driver"
                f" {self._hypervisor.name!r} has no overlays",
                cure="back it up without --freeze",
            )

    def plan(self, vm: str, disks: Mapping[str, Sequence[Disk]], window: Window) -> dict[str, Sequence[Disk]]:
        """Plan the snapshots by all mechanisms that can be asked after the pause; returns what is left for others."""
        late: dict[str, Sequence[Disk]] = {}
        others: dict[str, Sequence[Disk]] = {}
        for name, its in disks.items():
            mechanism = self._drivers.mechanism(name)
            mechanism.close()
            (late if mechanism.of_storage else others)[name] = its
        self.snapshots.plan(vm, late, window)
        self._disks = [disk for its in late.values() for disk in its]
        return others

    def prepare(self) -> None:
        """All that is slow, with the guest running. What is made to hold the disks stands in the journal before."""
        if not self._disks:
            return
        plan = self._hypervisor.plan_freeze(self._disks, self._operation.name)
        self._position = self._operation.will_make("freeze", self._hypervisor.name, to_json(plan))
        self._plan = plan
        self.snapshots.prepare()
        self._hypervisor.prepare_freeze(plan)

    def freeze(self) -> None:
        """Hold the disks, within the pause."""
        if self._plan is not None:
            self.moment = self._hypervisor.freeze_disks(self._plan)

    @property
    def complete(self) -> bool:
        """Whether all of them are held at the instant."""
        return self._plan is None or self.moment is not None

    @property
    def owed(self) -> bool:
        """Whether something that may hold the guest's newest data is there, or was and is not known to be gone."""
        return self._plan is not None

    def begin(self) -> None:
        """Begin to take the snapshots; the guest runs."""
        self.snapshots.begin()

    def take(self) -> None:
        """Wait until the snapshots are taken, of disks that are still held then: their instant is that at which they
        were. Blocks for as long as the mechanisms take.

        :raises VmsnapError: one failed, a disk was not held still, or the room for what the guest writes runs out
        """
        if self._plan is None or self.moment is None:
            return
        while not self.snapshots.await_settled(LOOK_EACH_SECONDS):
            self._hypervisor.check_frozen(self._plan)
        self.snapshots.end()
        self._hypervisor.check_frozen(self._plan)
        moment = self.moment
        self.snapshots.taken[:] = [replace(snapshot, instant=moment) for snapshot in self.snapshots.taken]

    def thaw(self) -> None:
        """Bring what the guest wrote into its disks, and remove what held them. Idempotent; blocks.

        :raises VmsnapError: it is not done; it stands in the journal
        """
        if self._plan is not None and self._position is not None:
            self._hypervisor.thaw_disks(self._plan)
            self._operation.is_gone(self._position)
            self._plan = None

    def forget(self) -> None:
        """Begin anew, with nothing planned; what there was is thawed and deleted."""
        self.snapshots.forget()
        self._disks = []
        self._position = self.moment = None
