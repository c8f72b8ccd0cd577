"""The snapshots of one capture: what the mechanisms of a VM's disks are asked for, and in which order.

All that is made stands in the journal before, by the thread that carries the protocol out: the mechanisms themselves
may work on threads of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from vmsnap.controller.abreast import Abreast
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.health import Health, Tell
from vmsnap.errors import SnapshotError, VmsnapError
from vmsnap.journal import Operation
from vmsnap.model import Disk, DiskSnapshot, SnapshotPlan, Window, to_json
from vmsnap.roles import SnapshotMechanism

PATIENCE_SECONDS: Final = 60.0
"""How long a mechanism that is still at its snapshot is waited for before its snapshot is deleted; the guest runs."""


class Snapshots:
    """The mechanisms of one VM, each an object of its own, their plans and what they took."""

    def __init__(self, operation: Operation, drivers: Drivers) -> None:
        self.mechanisms: dict[str, SnapshotMechanism] = {}
        self.taken: list[DiskSnapshot] = []
        self._plans: list[tuple[int, SnapshotPlan]] = []
        self._operation = operation
        self._drivers = drivers
        self._at_work: Abreast[tuple[DiskSnapshot, ...]] | None = None
        self._health: Health | None = None

    def plan(self, vm: str, disks: Mapping[str, Sequence[Disk]], window: Window) -> None:
        """Plan a snapshot by each mechanism of the disks that are its, and enter all plans into the journal.

        :raises SnapshotError: it cannot be done; nothing was made or entered
        """
        plans = []
        for name, its in disks.items():
            mechanism = self.mechanisms[name] = self._drivers.mechanism(name)
            plans.append(mechanism.plan(vm, its, self._operation.name, window))
        for plan in plans:
            self._plans.append((self._operation.will_make("snapshot", plan.mechanism, to_json(plan)), plan))

    def prepare(self) -> None:
        """All that is slow, with the guest running."""
        for _, plan in self._plans:
            self.mechanisms[plan.mechanism].prepare(plan)

    def take(self) -> None:
        """Fix all disks, by all mechanisms side by side. Nothing is written to the journal. Blocks.

        Where one fails, this ends at once, so that the guest need not wait for the others: `delete` does that.

        :raises SnapshotError: what failed first
        """
        if len(self._plans) == 1:
            for _, plan in self._plans:
                self.taken += self.mechanisms[plan.mechanism].snapshot(plan)
        elif self._plans:
            self.begin()
            self.end()

    def begin(self) -> None:
        """Begin to take them; `end` waits for that. This thread may do something else meanwhile.

        :raises VmsnapError: the system gives no thread
        """
        self._at_work = Abreast(
            {plan.mechanism: partial(self.mechanisms[plan.mechanism].snapshot, plan) for _, plan in self._plans}
        )
        self._at_work.begin()

    def await_settled(self, seconds: float) -> bool:
        """Wait until all are taken, or one has failed; False where that is not so within `seconds`."""
        return self._at_work is None or self._at_work.await_settled(seconds)

    def end(self) -> None:
        """Wait for what was begun; as `take`.

        :raises SnapshotError: what failed first
        """
        if self._at_work is not None:
            for found in self._at_work.results().values():
                self.taken += found

    @property
    def complete(self) -> bool:
        """Whether all disks are fixed."""
        return len(self.taken) == sum(len(plan.disks) for _, plan in self._plans)

    def watch(self, tell: Tell) -> None:
        """From now on until they are deleted, have all that threatens them told; once they are taken."""
        if self._health is None and self._plans:
            self._health = Health([(self.mechanisms[plan.mechanism], plan) for _, plan in self._plans], tell)
            self._health.start()

    def settle(self) -> None:
        """What the mechanisms have put off until after the pause. May block for long."""
        for _, plan in self._plans:
            self.mechanisms[plan.mechanism].settle([s for s in self.taken if s.plan == plan])

    def delete(self) -> None:
        """Remove the snapshots; what cannot be removed stays in the journal. Idempotent.

        :raises SnapshotError: the first that could not be removed, after all were tried
        """
        self._stop_watching()
        failed: VmsnapError | None = None
        for position, plan in self._plans:
            try:
                self._await(plan.mechanism)
                self.mechanisms[plan.mechanism].delete(plan)
                self._operation.is_gone(position)
            except VmsnapError as e:
                failed = failed or e
        if failed is not None:
            raise failed

    def forget(self) -> None:
        """Begin anew, with nothing planned; what there was is deleted."""
        self.close()
        self.mechanisms.clear()
        self._plans.clear()
        self.taken.clear()
        self._at_work = None

    def close(self) -> None:
        """Let go of all connections. Idempotent."""
        self._stop_watching()
        for mechanism in self.mechanisms.values():
            mechanism.close()

    def _stop_watching(self) -> None:
        if self._health is not None:
            self._health.stop()
            self._health = None

    def _await(self, mechanism: str) -> None:
        # What is deleted while it is being made would be there again.
        if self._at_work is not None and not self._at_work.await_end(mechanism, PATIENCE_SECONDS):
            raise SnapshotError(
                f"mechanism {mechanism!r} does not end its snapshot", cure="vmsnap recover does the rest"
            )
