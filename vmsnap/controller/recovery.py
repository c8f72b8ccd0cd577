"""Finishes or undoes what a crash left, by the journal: the same compensations as after a failure, from another
process.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.folders import remove_file
from vmsnap.controller.reach import WORKING
from vmsnap.controller.results import RecoveryResult
from vmsnap.controller.running import LoadedRecord
from vmsnap.controller.takeover import settle_takeover
from vmsnap.errors import VmGone, VmsnapError
from vmsnap.heldduplicates import HeldDuplicates
from vmsnap.journal import (
    Deed,
    Journal,
    Operation,
    OperationRow,
    Resource,
    duplicate_name_of,
    is_duplicate_name,
)
from vmsnap.locks import vm_lock
from vmsnap.model import ClonePlan, FreezePlan, SnapshotPlan, VmState, from_json
from vmsnap.roles import Hypervisor
from vmsnap.vmtable import VmTable


class Recovery:
    """Goes through the unfinished operations of one VM or of all.

    Each is taken up only when its worker is dead and its VM's lock is free. Whatever cannot be reached stays in the
    journal and is reported as kept; a second run changes nothing more.
    """

    def __init__(self, drivers: Drivers, journal: Journal, table: VmTable) -> None:
        self._drivers = drivers
        self._journal = journal
        self._table = table
        self._resumed: list[str] = []
        self._removed: list[str] = []
        self._kept: list[str] = []

    def run(self, vm: str | None = None, *, locked: bool = False) -> RecoveryResult:
        """Recover `vm`, or every VM. `locked`: the caller holds the lock of `vm`. Blocks; idempotent."""
        for row in self._journal.unfinished(vm):
            try:
                with nullcontext() if locked else vm_lock(self._drivers.context.state_dir, row.vm, "recover"):
                    # What it was may have changed while the lock was waited for.
                    for present in self._journal.unfinished(row.vm):
                        if present.operation == row.operation:
                            self._recover(present)
            except Exception as e:  # noqa: BLE001 - what is wrong with one VM must not keep the others from recovery
                self._kept.append(f"{row.operation} (VM {row.vm}): {e}")
        self._remove_stray_rows(vm)
        return RecoveryResult(tuple(self._resumed), tuple(self._removed), tuple(self._kept))

    def finish(self, operation: str) -> RecoveryResult:
        """Remove what one operation of this process has left; the lock of its VM is held by the caller."""
        for row in self._journal.unfinished():
            if row.operation == operation:
                self._recover(row)
        return RecoveryResult(tuple(self._resumed), tuple(self._removed), tuple(self._kept))

    def _remove_stray_rows(self, vm: str | None) -> None:
        """A backup that ended and died before it struck its duplicate out of the VM table has nothing else left."""
        # Asked in this order, so that a backup that begins meanwhile is seen as one that is at work.
        rows, held = self._table.rows(), HeldDuplicates(self._table.database)
        at_work = {duplicate_name_of(row.operation) for row in self._journal.unfinished()}
        for row in rows:
            if not is_duplicate_name(row.vm) or row.kind == WORKING or vm not in (None, row.duplicate_of):
                continue
            if row.vm not in at_work and not held.is_held(row.vm):
                self._table.remove(row.vm)

    def _recover(self, row: OperationRow) -> None:
        if row.outcome is None and row.worker_alive():
            self._kept.append(f"{row.operation}: process {row.pid} is still at it")
            return
        operation = self._journal.open_operation(row.operation)
        counts = len(self._resumed), len(self._removed), len(self._kept)
        settled = True
        if row.protocol.startswith("backup") and (row.outcome is None or row.executing):
            settled = self._free_vm(row)
        for resource in reversed(operation.resources()):
            try:
                told = self._remove(row, resource)
            except VmsnapError as e:
                self._kept.append(f"{resource.kind} of {row.operation}: {e}")
            else:
                operation.is_gone(resource.position)
                if told is None:
                    self._removed.append(f"{resource.kind} of {row.operation} (VM {row.vm})")
                elif told:
                    self._removed.append(told)
        self._enter(operation, *counts)
        if settled:
            operation.must_execute(False)
            if row.outcome is None:
                operation.end("recovered")

    def _enter(self, operation: Operation, resumed: int, removed: int, kept: int) -> None:
        """Enter what was done for one operation: what was reported since these counts."""
        operation.did(
            *(Deed.now("recover", f"VM {vm} executes again") for vm in self._resumed[resumed:]),
            *(Deed.now("recover", f"removed {line}") for line in self._removed[removed:]),
            *(Deed.now("recover", line, "failed") for line in self._kept[kept:]),
        )

    def _free_vm(self, row: OperationRow) -> bool:
        """Make the VM execute if that is owed, and give the capture up; False where it could not be done now."""
        hypervisor = self._drivers.hypervisor(row.hypervisor, row.vm, row.options)
        try:
            if row.executing:
                self._make_it_run(row, hypervisor)
            hypervisor.abandon()
        except VmGone:
            # With the VM its settings and running copies are gone; its files are resources of their own.
            self._table.set_state(row.vm, VmState.ABSENT.value, resume_flag=False)
        except VmsnapError as e:
            self._kept.append(f"VM {row.vm}: {e}")
            return False
        finally:
            hypervisor.close()
        return True

    def _make_it_run(self, row: OperationRow, hypervisor: Hypervisor) -> None:
        state = hypervisor.state()
        if state in (VmState.STOPPED, VmState.EXECUTING):
            # One that executes may still depend on its dead worker: resuming it frees it from that too.
            hypervisor.resume()
            if state is VmState.STOPPED:
                self._resumed.append(row.vm)
            state = VmState.EXECUTING
        self._table.set_state(row.vm, state.value, resume_flag=False)

    def _remove(self, row: OperationRow, resource: Resource) -> str | None:
        """Returns what is to be reported instead of the removal, empty where nothing is."""
        if resource.kind == "takeover":
            return self._settle_takeover(row, resource)
        remove = {
            "snapshot": self._delete_snapshot,
            "freeze": self._thaw_disks,
            "clone": self._delete_clone,
            "duplicate": self._discard_duplicate,
            "loaded": self._destroy_loaded,
            "file": self._remove_file,
        }.get(resource.kind)
        if remove is None:
            raise VmsnapError(f"the journal names a {resource.kind!r}, which this vmsnap does not know")
        remove(row, resource)
        return None

    def _delete_snapshot(self, _row: OperationRow, resource: Resource) -> None:
        mechanism = self._drivers.mechanism(resource.driver)
        try:
            mechanism.delete(from_json(resource.data, SnapshotPlan))
        finally:
            mechanism.close()

    def _thaw_disks(self, row: OperationRow, resource: Resource) -> None:
        hypervisor = self._drivers.hypervisor(resource.driver, row.vm, row.options)
        try:
            hypervisor.thaw_disks(from_json(resource.data, FreezePlan))
        finally:
            hypervisor.close()

    def _delete_clone(self, _row: OperationRow, resource: Resource) -> None:
        mechanism = self._drivers.mechanism(resource.driver)
        try:
            mechanism.delete_clone(from_json(resource.data, ClonePlan))
        finally:
            mechanism.close()

    def _discard_duplicate(self, row: OperationRow, resource: Resource) -> None:
        name = from_json(resource.data, str)
        hypervisor = self._drivers.hypervisor(resource.driver, row.vm, row.options)
        try:
            hypervisor.discard_duplicate(name)
        finally:
            hypervisor.close()
        self._table.remove(name)

    def _destroy_loaded(self, _row: OperationRow, resource: Resource) -> None:
        loaded = from_json(resource.data, LoadedRecord)
        if any(vm.vm == loaded.vm and vm.kind == WORKING for vm in self._table.rows()):
            raise VmsnapError(f"VM {loaded.vm!r} is registered", cure=f"vmsnap vm remove {loaded.vm}")
        hypervisor = self._drivers.hypervisor(resource.driver, loaded.vm, loaded.options)
        try:
            hypervisor.destroy()
        finally:
            hypervisor.close()
        self._table.remove(loaded.vm)

    def _settle_takeover(self, row: OperationRow, resource: Resource) -> str:
        hypervisor = self._drivers.hypervisor(resource.driver, row.vm, row.options)
        try:
            name, operation = from_json(resource.data, str), self._journal.open_operation(row.operation)
            settled = settle_takeover(name, operation, hypervisor, self._table)
        finally:
            hypervisor.close()
        if settled.runs:
            self._resumed.append(row.vm)
            return ""
        return settled.line

    def _remove_file(self, _row: OperationRow, resource: Resource) -> None:
        path = Path(from_json(resource.data, str))
        used = [vm.vm for vm in self._table.rows() for disk in vm.disks if disk.address == str(path)]
        if used:
            raise VmsnapError(f"{path} is a disk of VM {used[0]!r} now", cure=f"vmsnap vm remove {used[0]}")
        remove_file(path)
