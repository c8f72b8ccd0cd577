"""Failover: the VM is shown not to run, then its held duplicate goes on in its place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.executing import see_it_execute
from vmsnap.controller.execution import Execution
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.reach import Reach, rows_of
from vmsnap.controller.recovery import Recovery
from vmsnap.controller.results import FailoverResult
from vmsnap.controller.takeover import Settled, settle_takeover, take_place
from vmsnap.errors import Busy, HypervisorError, UnknownDuplicate, UsageError, VmsnapError
from vmsnap.heldduplicates import HeldDuplicate, HeldDuplicates
from vmsnap.journal import Journal
from vmsnap.locks import vm_lock
from vmsnap.model import Disk, VmState, to_json
from vmsnap.protocol import FAILOVER, Compensation, Instruction
from vmsnap.roles import LoadRequest
from vmsnap.vmtable import VmTable


@dataclass(frozen=True)
class FailoverOrder:
    """Whose place is to be taken. `fence`: kill it first if it lives."""

    vm: str
    fence: bool = False


class Failover:
    """One failover: the actions and compensations of the protocol `FAILOVER`.

    The duplicate and its disks are the only copy left of the failed VM: no failure removes them.
    """

    def __init__(
        self, order: FailoverOrder, drivers: Drivers, journal: Journal, table: VmTable, interruption: Interruption
    ) -> None:
        self._order = order
        self._drivers = drivers
        self._journal = journal
        self._table = table
        self._interruption = interruption
        self._duplicates = HeldDuplicates(table.database)
        self._warnings: list[str] = []
        self._was = "unknown"
        self._fenced = ""
        self._seconds = 0.0
        self._disks: Sequence[Disk] = ()
        self._settled: Settled | None = None
        self._position: int | None = None
        self._begun = 0.0

    def run(self) -> FailoverResult:
        """Carry it out. Blocks until the guest runs.

        :raises UnknownVm: not registered
        :raises UnknownDuplicate: no duplicate of it is held in memory
        :raises Busy: the VM lives, another one has its network address, or another operation works on it
        :raises VmsnapError: it failed; the duplicate is held as before, or runs all the same, as the notes say
        """
        self._begun = time.monotonic()
        vm = self._order.vm
        self._table.get(vm)
        with vm_lock(self._drivers.context.state_dir, vm, "failover"):
            recovered = Recovery(self._drivers, self._journal, self._table).run(vm, locked=True)
            self._warnings += [f"left by an earlier run and not removed yet: {line}" for line in recovered.kept]
            row = self._table.get(vm)
            held = self._held = self._choose()
            operation = self._operation = self._journal.begin(
                FAILOVER.name, vm, row.hypervisor, row.options, backup=held.backup
            )
            self._hypervisor = self._drivers.hypervisor(row.hypervisor, vm, row.options)
            # The duplicate's own row is that of the very disks that are to be used.
            self._reach = Reach(self._drivers, self._table, vm, but=held.name)
            execution = Execution(
                FAILOVER,
                operation,
                vm,
                actions={
                    Instruction.FENCE: self._fence,
                    Instruction.LOAD: self._load,
                    Instruction.SWITCH_DISKS: self._switch_disks,
                    Instruction.RESUME_DUPLICATE: self._resume,
                    Instruction.AWAIT_EXECUTING: self._await_executing,
                    Instruction.NOTIFY: self._take_place,
                },
                compensations={Compensation.SETTLE_TAKEOVER: self._settle},
                holds=lambda _: True,
                interruption=self._interruption,
            )
            try:
                execution.run()
            except BaseException as error:
                if self._settled is not None and self._settled.line:
                    error.add_note(self._settled.line)
                raise
            finally:
                self._hypervisor.close()
        return FailoverResult(
            vm=vm,
            state=VmState.EXECUTING.value,
            was=self._was,
            fenced=self._fenced,
            disks=rows_of(self._disks),
            duplicate=held.name,
            backup=held.backup,
            instant=held.capture.instant.wall_ns / 1e9,
            seconds=self._seconds,
            warnings=tuple(self._warnings),
        )

    def _choose(self) -> HeldDuplicate:
        vm = self._order.vm
        row = self._table.get(vm)
        if row.kind != "working":
            raise UsageError(f"{vm!r} is a duplicate", cure=f"name its VM: vmsnap failover {row.duplicate_of}")
        held = self._duplicates.all(vm)
        fit = [each for each in held if each.in_memory and not self._duplicates.spent(each.name)]
        if fit:
            # One whose time is over and that nobody has discarded yet is better than none.
            return fit[-1]
        cure = f"restore its last backup (vmsnap restore), and next time: vmsnap backup {vm} --keep-duplicate"
        if not held:
            raise UnknownDuplicate(f"no duplicate of VM {vm!r} is held in memory", cure=cure)
        last = held[-1]
        if not last.in_memory:
            raise UnknownDuplicate(
                f"the duplicate {last.name} of VM {vm!r} is gone from memory, as the host was restarted", cure=cure
            )
        raise UnknownDuplicate(
            f"the duplicate {last.name} of VM {vm!r} has run already, so its disks in {last.folder} are no longer of"
            " its memory's instant",
            cure=f"look at the disks, or restore backup {last.backup}",
        )

    # -- instructions

    def _fence(self) -> str:
        # Nothing is killed for a duplicate that could not take the place.
        self._see_that_it_can()
        try:
            self._was = self._hypervisor.state().value
        except VmsnapError as e:
            self._was = f"not answering: {e.message}"
        try:
            self._fenced = self._hypervisor.fence(kill=self._order.fence)
        except Busy as e:
            raise Busy(e.message, cure="nothing was done; to kill it first, add --fence") from e
        self._table.set_state(self._order.vm, VmState.ABSENT.value, resume_flag=False)
        return self._fenced

    def _see_that_it_can(self) -> None:
        held = self._held
        for path in (held.capture.device_state, *(image.path for image in held.capture.images)):
            if not path.is_file():
                raise HypervisorError(
                    f"the duplicate {held.name} has lost {path}",
                    cure=f"vmsnap duplicate discard {held.name}, and restore backup {held.backup}",
                )
        self._reach.check_disks(tuple(each.disk for each in held.disks))
        try:
            nics = self._hypervisor.describe().nics
        except VmsnapError:
            # It is dead or does not answer; the addresses are seen again when the duplicate is loaded.
            return
        self._reach.check_nics(nics)

    def _load(self) -> None:
        held = self._held
        disks = tuple(each.disk for each in held.disks)
        self._position = self._operation.will_make("takeover", held.hypervisor, to_json(held.name))
        self._hypervisor.load(
            LoadRequest(
                definition=held.definition,
                images=held.capture.images,
                device_state=held.capture.device_state,
                disks=disks,
                details=held.capture.details,
                takeover=True,
            )
        )
        self._reach.check_nics(self._hypervisor.describe().nics)

    def _switch_disks(self) -> None:
        self._disks = self._hypervisor.switch_disks(tuple(each.disk for each in self._held.disks))
        self._reach.check_disks(self._disks)

    def _resume(self) -> None:
        self._hypervisor.resume()

    def _await_executing(self) -> None:
        see_it_execute(self._hypervisor)
        self._seconds = time.monotonic() - self._begun

    def _take_place(self) -> None:
        try:
            self._disks = take_place(self._held, self._operation, self._hypervisor, self._duplicates)
        except VmsnapError as e:
            if self._duplicates.is_held(self._held.name):
                raise
            self._warnings.append(f"not removed yet, vmsnap recover will try again: {e}")

    # -- compensations

    def _settle(self) -> None:
        if self._position is None:
            return
        self._settled = settle_takeover(self._held.name, self._operation, self._hypervisor, self._table)
        self._operation.is_gone(self._position)
