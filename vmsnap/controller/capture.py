"""The first half of every backup: from a running VM to a duplicate and snapshots of one instant, the VM running
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from vmsnap.controller.choosing import by_mechanism, check_cloneable, choose_mechanisms
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.freezing import FrozenDisks
from vmsnap.controller.health import Tell
from vmsnap.controller.instant import Instant
from vmsnap.controller.snapshots import Snapshots
from vmsnap.errors import CannotCapture, DoesNotConverge, PauseExceeded, ProtocolError, VmGone
from vmsnap.guardian import Guard, NoGuard
from vmsnap.journal import Operation
from vmsnap.model import CapturePlan, Disk, DiskSnapshot, Duplicate, Moment, VmDescription, VmState, to_json
from vmsnap.protocol import Compensation, Instruction
from vmsnap.repository import check_device
from vmsnap.roles import CaptureRequest, DriverContext, Hypervisor, SnapshotMechanism
from vmsnap.vmtable import VmRow, VmTable

T = TypeVar("T")

COPY_STALL_SECONDS = 10.0
"""How long the copy of the memory may stand still, beyond the pause that is allowed, before the guardian ends it."""

GuardianStart = Callable[[DriverContext, str, str, Mapping[str, str]], Guard]


class Capture:
    """Carries out check, prepare, pause, snapshot, duplicate and resume for one VM, and undoes them."""

    def __init__(
        self,
        row: VmRow,
        operation: Operation,
        drivers: Drivers,
        table: VmTable,
        *,
        duplicate_name: str,
        max_pause_seconds: float,
        start_guardian: GuardianStart,
        threatened: Tell,
        needs_clones: bool = False,
        freeze: bool = False,
    ) -> None:
        """`freeze`: disks are held within the pause, and their snapshots taken after it, where their mechanisms and the
        hypervisor can do that. `threatened` is told, by another thread, what will cost the snapshots.
        """
        self.row = row
        self.executing = False
        self._owes_execution = False
        self._runs_again = False
        self._is_free = False
        self._hypervisor: Hypervisor | None = None
        self._description: VmDescription | None = None
        self._plan: CapturePlan | None = None
        self._duplicate: Duplicate | None = None
        self._duplicate_position: int | None = None
        self._paused: Moment | None = None
        self._resumed: Moment | None = None
        self._disks = Snapshots(operation, drivers)
        self._operation = operation
        self._drivers = drivers
        self._table = table
        self._request = CaptureRequest(duplicate_name, max_pause_seconds)
        self._start_guardian = start_guardian
        self._threatened = threatened
        self._needs_clones = needs_clones
        self._guard: Guard = NoGuard()
        self._frozen = FrozenDisks(self.hypervisor, operation, drivers) if freeze else None

    @property
    def actions(self) -> dict[Instruction, Callable[[], None]]:
        """What carries out the instructions of a capture."""
        return {
            Instruction.CHECK: self.check,
            Instruction.PREPARE: self.prepare,
            Instruction.PAUSE: self.pause,
            Instruction.SNAPSHOT: self.snapshot,
            Instruction.FREEZE: self.freeze,
            Instruction.THAW: self.thaw,
            Instruction.DUPLICATE: self.take_duplicate,
            Instruction.RESUME: self.resume,
        }

    @property
    def compensations(self) -> dict[Compensation, Callable[[], None]]:
        """What sets a failed capture right; each is idempotent."""
        return {
            Compensation.RESUME_VM: self.make_it_run,
            Compensation.ABANDON_CAPTURE: self.abandon,
            Compensation.THAW_DISKS: self.thaw,
            Compensation.DELETE_SNAPSHOTS: self.delete_snapshots,
            Compensation.DISCARD_DUPLICATE: self.discard_duplicate,
        }

    # -- what the later half needs

    @property
    def hypervisor(self) -> Hypervisor:
        """The driver of the VM."""
        if self._hypervisor is None:
            self._hypervisor = self._drivers.hypervisor(self.row.hypervisor, self.row.vm, self.row.options)
        return self._hypervisor

    @property
    def description(self) -> VmDescription:
        """What the VM was at the check."""
        return _known(self._description, "description")

    @property
    def plan(self) -> CapturePlan:
        """How the RAM is captured."""
        return _known(self._plan, "capture plan")

    @property
    def mechanisms(self) -> Mapping[str, SnapshotMechanism]:
        """Those of the disks, by their names."""
        return {**self._disks.mechanisms, **(self._frozen.snapshots.mechanisms if self._frozen else {})}

    @property
    def snapshots(self) -> Sequence[DiskSnapshot]:
        """The snapshots that were taken."""
        return [*self._disks.taken, *(self._frozen.snapshots.taken if self._frozen else ())]

    @property
    def frozen(self) -> bool:
        """Whether disks were held, and their snapshots taken after the pause."""
        return self._frozen is not None and self._frozen.moment is not None

    @property
    def duplicate(self) -> Duplicate:
        """The captured memory."""
        return _known(self._duplicate, "duplicate")

    @property
    def duplicate_name(self) -> str:
        """Its name."""
        return self._request.duplicate

    @property
    def duplicate_position(self) -> int:
        """Where it stands in the journal."""
        return _known(self._duplicate_position, "duplicate")

    def instant(self) -> Instant:
        """The evidence, checked.

        :raises HypervisorError: it does not show one instant
        :raises PauseExceeded: the guest stood still longer than it was allowed to
        """
        moments = {snapshot.instant for snapshot in self.snapshots}
        if self._frozen is not None and self._frozen.moment is not None:
            moments.add(self._frozen.moment)
        instant = Instant(
            self._paused,
            tuple(sorted(moments, key=lambda moment: moment.monotonic_ns)),
            self.duplicate.instant,
            self._resumed,
        )
        instant.check()
        if instant.pause_seconds() > self._request.max_pause_seconds:
            raise PauseExceeded(
                f"VM {self.row.vm!r} stood still for {instant.pause_seconds():.3f} s, longer than the"
                f" {self._request.max_pause_seconds:g} s that were allowed",
                cure="allow more with --max-pause",
            )
        return instant

    def finish_duplicate(self, progress: Callable[[int], None]) -> Duplicate:
        """Wait until the copy is complete. From then on the VM does not depend on us, and the guardian has done its
        duty, unless it still has to see to it that frozen disks are thawed.
        """
        copied_bytes = -1

        def show(done_bytes: int) -> None:
            nonlocal copied_bytes
            if done_bytes > copied_bytes:
                copied_bytes = done_bytes
                self._await_copy()
            progress(done_bytes)

        self._await_copy()
        self._duplicate = self.hypervisor.finish_duplicate(self.duplicate, show)
        self._settle_debt()
        return self._duplicate

    # -- instructions

    def check(self) -> None:
        """Ask what the VM is and choose a mechanism for each disk; refuse before anything is touched."""
        description = self._description = self.hypervisor.describe()
        if description.refusals:
            raise CannotCapture(
                f"VM {self.row.vm!r} cannot be backed up live: {'; '.join(description.refusals)}",
                cure="nothing was paused",
            )
        if description.state not in (VmState.EXECUTING, VmState.STOPPED):
            raise VmGone(f"VM {self.row.vm!r} is {description.state.value}", cure="start it, then back it up")
        self.executing = description.state is VmState.EXECUTING
        if self._frozen is not None:
            self._frozen.check()
        for disk in description.disks:
            check_device(disk.device)
        disks = choose_mechanisms(self._drivers, description.disks, self.row.disks)
        if self._needs_clones:
            check_cloneable(self.row.vm, disks, self._drivers)
        self._table.set_disks(self.row.vm, disks)
        self._table.set_state(self.row.vm, description.state.value)
        self.row = self._table.get(self.row.vm)
        self._owes_execution = self.executing
        self._operation.must_execute(self.executing)

    def prepare(self) -> None:
        """All that is slow; the guest runs. The guardian watches from here on, since a pre-copy may end in a pause.

        A way of capture that does not come to an end gives its place to another one, here or in `pause`.
        """
        description = self.description
        self._plan = self.hypervisor.plan_capture(self._request)
        chosen: Mapping[str, Sequence[Disk]] = by_mechanism(description.disks, self.row.disks)
        if self._frozen is not None:
            chosen = self._frozen.plan(self.row.vm, chosen, self._plan.window)
        self._disks.plan(self.row.vm, chosen, self._plan.window)
        self._duplicate_position = self._operation.will_make(
            "duplicate", self.row.hypervisor, to_json(self._request.duplicate)
        )
        self._disks.prepare()
        if self._frozen is not None:
            self._frozen.prepare()
        if self.executing and not self._request.without:
            self._guard = self._start_guardian(
                self._drivers.context, self.row.vm, self.row.hypervisor, dict(self.row.options)
            )
        # The guest runs meanwhile, but a pre-copy that is at its end at once may have stopped it.
        self._guard.arm(self._plan.prepare_seconds + self._request.max_pause_seconds)
        try:
            self.hypervisor.prepare(self._request, self._plan)
        except DoesNotConverge as e:
            self._prepare_without(e.capture)
        self._guard.arm(self.plan.lead_seconds + self._request.max_pause_seconds)

    def pause(self) -> None:
        """Stop the VM."""
        if not self.executing and self.hypervisor.state() is VmState.EXECUTING:
            raise CannotCapture(f"VM {self.row.vm!r} stood still and was started meanwhile", cure="try again")
        self._guard.arm(self.plan.lead_seconds + self._request.max_pause_seconds)
        try:
            self._paused = self.hypervisor.pause()
        except DoesNotConverge as e:
            self._prepare_without(e.capture)
            self._paused = self.hypervisor.pause()
        paused_seconds = (time.monotonic_ns() - self._paused.monotonic_ns) / 1e9
        self._guard.arm(max(0.0, self._request.max_pause_seconds - paused_seconds))

    def snapshot(self) -> None:
        """Fix all disks, several mechanisms side by side."""
        self._disks.take()

    def freeze(self) -> None:
        """Hold the disks, and fix those for which that is not needed."""
        if self._frozen is not None:
            self._frozen.freeze()
        self._disks.take()

    def take_duplicate(self) -> None:
        """Fix the memory.

        :raises ProtocolError: the disks were to be fixed before, and are not
        """
        frozen = self._frozen is None or self._frozen.complete
        if self.plan.disks_first and not (frozen and self._disks.complete):
            raise ProtocolError(f"capture {self.plan.capture!r} needs the disks' snapshots before the memory's")
        self._duplicate = self.hypervisor.duplicate()

    def resume(self) -> None:
        """Let the VM run."""
        self._resumed = self.hypervisor.resume()
        self._await_copy()

    def begin_snapshots(self) -> None:
        """Begin with the snapshots of frozen disks; `snapshot_frozen` ends it."""
        if self._frozen is not None:
            self._frozen.begin()

    def snapshot_frozen(self) -> None:
        """Wait for the snapshots of frozen disks. Blocks for as long as they take."""
        if self._frozen is not None:
            self._frozen.take()
            # Thawing writes into these disks: that alone may be more than their snapshots have room for.
            self._frozen.snapshots.watch(self._threatened)

    def thaw(self) -> None:
        """Put back what the guest wrote while its disks were frozen. Idempotent; what cannot be put back now stays
        where it is, and in the journal.
        """
        if self._frozen is not None:
            self._frozen.thaw()
            if self._is_free:
                self._settle_debt()

    def settle_frozen(self) -> None:
        """What the mechanisms of frozen disks have put off until these were thawed."""
        if self._frozen is not None:
            self._frozen.snapshots.settle()

    def _prepare_without(self, capture: str) -> None:
        """Take back what was prepared, the guest running, and prepare again for another way: the disks' part depends
        on the way too.
        """
        self._guard.arm(self.plan.prepare_seconds + self._request.max_pause_seconds)
        self.hypervisor.abandon()
        if self.executing:
            self.hypervisor.resume()
        if self._frozen is not None:
            self._frozen.thaw()
        self.delete_snapshots()
        self.discard_duplicate()
        self._disks.forget()
        if self._frozen is not None:
            self._frozen.forget()
        self._request = replace(self._request, without=(*self._request.without, capture))
        self.prepare()

    def _await_copy(self) -> None:
        """Where the guest's writes wait for us to copy, a worker that stands still is as bad as a pause; else only its
        death matters."""
        if self.plan.needs_worker:
            self._guard.arm(COPY_STALL_SECONDS + self._request.max_pause_seconds)
        else:
            self._guard.disarm()

    def settled(self) -> None:
        """After the pause: the VM table, the evidence, and what the mechanisms had put off."""
        if self.executing:
            self._table.set_state(self.row.vm, VmState.EXECUTING.value, resume_flag=False)
        self.instant()
        self._disks.watch(self._threatened)
        self._disks.settle()

    # -- compensations

    def make_it_run(self) -> None:
        """Make the VM execute again if it did and we may have stopped it; tells the table."""
        if self._owes_execution:
            try:
                self._resumed = self.hypervisor.resume()
            except VmGone:
                self._table.set_state(self.row.vm, VmState.ABSENT.value, resume_flag=False)
                self._settle_debt()
                raise
            self._runs_again = True
            self._guard.disarm()
            self._table.set_state(self.row.vm, VmState.EXECUTING.value, resume_flag=False)

    def abandon(self) -> None:
        """Give the capture of memory up; after it the VM does not depend on us."""
        self.hypervisor.abandon()
        if self._runs_again or not self._owes_execution:
            self._settle_debt()

    def delete_snapshots(self) -> None:
        """Remove the snapshots; what cannot be removed stays in the journal.

        :raises SnapshotError: the first that could not be removed, after all were tried
        """
        try:
            self._disks.delete()
        finally:
            if self._frozen is not None:
                self._frozen.snapshots.delete()

    def discard_duplicate(self) -> None:
        """Remove the duplicate from host memory, unless it was handed over."""
        if self._duplicate_position is not None and not self._operation.owns(self._duplicate_position):
            return
        self.hypervisor.discard_duplicate(self._request.duplicate)
        if self._duplicate_position is not None:
            self._operation.is_gone(self._duplicate_position)

    def close(self) -> None:
        """Let go of all connections. A guardian that is still there goes on alone: what it guards was not set right."""
        self._disks.close()
        if self._frozen is not None:
            self._frozen.snapshots.close()
        if self._hypervisor is not None:
            self._hypervisor.close()
        self._guard.hand_over()

    def _settle_debt(self) -> None:
        """The VM does not depend on us any more: neither the guardian nor a recovery has to see to it. Not so while
        what the guest writes goes to an overlay: a guardian puts that back where we die.
        """
        self._is_free = True
        if self._frozen is not None and self._frozen.owed:
            self._guard.disarm()
            return
        self._owes_execution = False
        self._operation.must_execute(False)
        guard, self._guard = self._guard, NoGuard()
        guard.dismiss()


def _known(value: T | None, what: str) -> T:
    if value is None:
        raise ProtocolError(f"there is no {what} yet")
    return value
