"""Backup, mode live: a capture, stored with one commit, and held in memory afterwards if that was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from vmsnap.controller.capture import Capture, GuardianStart
from vmsnap.controller.clones import Clones
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.execution import Action, Execution
from vmsnap.controller.freezing import OVERLAY
from vmsnap.controller.holding import Holding, keep, tell_of_held
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.previous import Previous
from vmsnap.controller.progress import Bars, ProgressCallback
from vmsnap.controller.recovery import Recovery
from vmsnap.controller.results import BackupDisk, BackupResult
from vmsnap.controller.storing import Storing, stored_text
from vmsnap.errors import ProtocolError, VmsnapError
from vmsnap.journal import Journal, Operation, duplicate_name_of
from vmsnap.locks import vm_lock
from vmsnap.model import DiskSnapshot, Duplicate, Finding
from vmsnap.protocol import BACKUP_LIVE, BACKUP_LIVE_FROZEN, Compensation, Condition, Instruction, Protocol
from vmsnap.repository import BackupFields, DiskImage, Manifest, ReadOnlyDisk, Repository
from vmsnap.vmtable import DiskRow, VmRow, VmTable


@dataclass(frozen=True)
class BackupOrder:
    """What is to be backed up, and how. `keep_duplicate`: hold it in memory afterwards, `keep_seconds` long at most.
    `freeze`: overlays hold the disks while their snapshots are taken, after the pause.
    """

    vm: str
    max_pause_seconds: float = 5.0
    tags: tuple[str, ...] = ()
    keep_duplicate: bool = False
    keep_seconds: float | None = None
    freeze: bool = False


class LiveBackup:
    """One backup in mode live: the actions and compensations of the protocol `BACKUP_LIVE`, or `BACKUP_LIVE_FROZEN`."""

    protocols: ClassVar[tuple[Protocol, Protocol]] = (BACKUP_LIVE, BACKUP_LIVE_FROZEN)
    """Without and with frozen disks."""

    def __init__(
        self,
        order: BackupOrder,
        repository: Repository,
        drivers: Drivers,
        journal: Journal,
        table: VmTable,
        *,
        start_guardian: GuardianStart,
        interruption: Interruption,
        progress: ProgressCallback,
        notify: Sequence[Callable[[BackupResult], None]] = (),
        prefer: Sequence[Instruction] = (),
    ) -> None:
        self._order = order
        self._repository = repository
        self._drivers = drivers
        self._journal = journal
        self._table = table
        self._start_guardian = start_guardian
        self._interruption = interruption
        self._bars = Bars(progress)
        self._notify = notify
        self._prefer = prefer
        self._holding = Holding(drivers, journal, table)
        self._warnings: list[str] = []
        self._threats: dict[str, str] = {}
        self._manifest: Manifest | None = None
        self._result: BackupResult | None = None
        self._finished: Duplicate | None = None
        self._kept: Clones | None = None
        self._begun = 0.0
        self._operation: Operation
        self._capture: Capture

    def run(self) -> BackupResult:
        """Carry it out. Blocks until the backup is committed and everything that was made for it is removed.

        :raises Busy: another operation works on this VM
        :raises VmsnapError: the backup failed; the VM runs if it ran, nothing half-stored is listed
        """
        self._begun = time.monotonic()
        self._table.get(self._order.vm)
        with vm_lock(self._drivers.context.state_dir, self._order.vm, "backup"):
            self._recover_first(self._order.vm)
            row = self._table.get(self._order.vm)
            protocol = self.protocols[self._order.freeze]
            operation = self._operation = self._journal.begin(protocol.name, row.vm, row.hypervisor, row.options)
            self._capture = Capture(
                row,
                operation,
                self._drivers,
                self._table,
                duplicate_name=duplicate_name_of(operation.name),
                max_pause_seconds=self._order.max_pause_seconds,
                start_guardian=self._start_guardian,
                threatened=self._threatened,
                needs_clones=self._needs_clones(),
                freeze=self._order.freeze,
            )
            execution = Execution(
                protocol,
                operation,
                row.vm,
                actions=self._actions(),
                compensations=self._compensations(),
                holds=self._holds,
                interruption=self._interruption,
                prefer=self._prefer,
            )
            try:
                execution.run()
            except BaseException as error:
                if self._manifest is not None:
                    error.add_note(f"the backup {self._manifest.backup} is stored all the same")
                raise
            finally:
                self._close()
        if self._result is None:
            raise ProtocolError(f"the backup of {row.vm!r} ended without a result")
        return self._result

    def _recover_first(self, vm: str) -> None:
        """What an earlier crash left on this VM is set right before anything new is begun."""
        recovered = Recovery(self._drivers, self._journal, self._table).run(vm, locked=True)
        self._warnings += [f"left by an earlier run and not removed yet: {line}" for line in recovered.kept]

    def _threatened(self, finding: Finding) -> None:
        """What is about to cost a snapshot is told at once, the first time; how it was at last, in the result."""
        new = finding.subject not in self._threats
        cure = f" ({finding.cure})" if finding.cure else ""
        self._threats[finding.subject] = line = f"{finding.subject}: {finding.message}{cure}"
        if new:
            self._bars.warn(line)

    def _actions(self) -> dict[Instruction, Action]:
        return {
            **self._capture.actions,
            Instruction.PREPARE: self._prepare,
            **self._frozen_actions(),
            Instruction.STORE: self._store,
            Instruction.KEEP: self._keep,
            Instruction.RELEASE: self._release,
            Instruction.NOTIFY: self._tell,
        }

    def _frozen_actions(self) -> dict[Instruction, Action]:
        if not self._order.freeze:
            return {}
        return {Instruction.SNAPSHOT: self._snapshot_frozen, Instruction.THAW: self._thaw}

    def _compensations(self) -> dict[Compensation, Action]:
        return {
            **self._capture.compensations,
            Compensation.DROP_UNCOMMITTED: self._drop,
            Compensation.REMOVE_DISKS: self._remove_disks,
        }

    def _holds(self, condition: Condition) -> bool:
        if condition is Condition.EXECUTING:
            return self._capture.executing
        return self._order.keep_duplicate

    def _close(self) -> None:
        self._capture.close()
        if not self._holding.held.is_held(self._capture.duplicate_name):
            self._table.remove(self._capture.duplicate_name)

    # -- instructions

    def _needs_clones(self) -> bool:
        return self._order.keep_duplicate

    def _prepare(self) -> None:
        with tell_of_held(self._holding.held, self._order.vm):
            self._capture.prepare()

    def _snapshot_frozen(self) -> None:
        """The snapshots of frozen disks, and meanwhile the copy of the memory."""
        self._capture.begin_snapshots()
        self._finish_copy()
        self._bars.show("snapshots of frozen disks", 0, None)
        self._capture.snapshot_frozen()

    def _thaw(self) -> None:
        self._bars.show("thawing disks", 0, None)
        self._capture.thaw()
        self._capture.settle_frozen()
        self._enter_captured()

    def _enter_captured(self) -> None:
        capture = self._capture
        found = [
            (each.disk.device, capture.mechanisms[each.plan.mechanism].address_of(each)) for each in capture.snapshots
        ]
        self._enter_duplicate([DiskRow(device, address) for device, address in found], "captured")

    def _finish_copy(self) -> Duplicate:
        """After the pause: the evidence, what the mechanisms had put off, and the copy of the memory."""
        if self._finished is None:
            capture, memory_bytes = self._capture, self._capture.description.memory_bytes
            capture.settled()
            self._enter_captured()
            self._finished = capture.finish_duplicate(
                lambda done: self._bars.show("copying memory", done, memory_bytes)
            )
        return self._finished

    def _enter_duplicate(self, disks: Sequence[DiskRow], state: str) -> None:
        """The duplicate's row in the VM table, beside that of its VM, for as long as there is one."""
        capture = self._capture
        self._table.remove(capture.duplicate_name)
        self._table.add(
            VmRow(
                vm=capture.duplicate_name,
                hypervisor=capture.row.hypervisor,
                options={},
                disks=tuple(disks),
                state=state,
                kind="duplicate",
                duplicate_of=capture.row.vm,
            )
        )

    def _store(self) -> str:
        self._store_live()
        return self._told_of_store()

    def _told_of_store(self) -> str:
        self._operation.has_stored(self._stored().backup)
        return stored_text(self._stored())

    def _store_live(self, *remarks: str) -> None:
        """Memory and disks as they were captured."""
        duplicate, capture = self._finish_copy(), self._capture
        total_bytes = sum(image.size_bytes for image in duplicate.images)
        total_bytes += sum(snapshot.disk.size_bytes for snapshot in capture.snapshots)
        self._bars.begin("storing", total_bytes)
        with self._repository.writer(purpose=f"backup of {capture.row.vm}") as writer:
            storing = Storing(writer, Previous(self._repository.latest(capture.row.vm)), self._bars)
            memory = tuple(storing.memory(image) for image in duplicate.images)
            device_state = storing.device_state(duplicate.device_state)
            disks = []
            for snapshot in capture.snapshots:
                name = snapshot.plan.mechanism
                mechanism = capture.mechanisms[name]
                base = storing.previous.disk(snapshot, name, mechanism)
                disks.append(storing.disk(snapshot.disk, name, mechanism.reader(snapshot), base, snapshot.mark))
            fields = replace(
                self._fields("live", tuple(disks)),
                memory=memory,
                memory_bytes=capture.description.memory_bytes,
                device_state=device_state,
                duplicate_details=duplicate.details,
                remarks=remarks,
            )
            self._manifest = writer.commit(
                fields, seconds=time.monotonic() - self._begun, instant_ns=duplicate.instant.wall_ns
            )
            self._warnings += writer.warnings
        for snapshot in capture.snapshots:
            self._keep_mark(snapshot, storing.previous)

    def _keep_mark(self, snapshot: DiskSnapshot, previous: Previous) -> None:
        """The backup is committed: what changes from it on is what the next one reads."""
        name = snapshot.plan.mechanism
        if not snapshot.mark:
            return
        try:
            self._capture.mechanisms[name].keep_mark(snapshot, previous.mark(snapshot, name))
        except VmsnapError as e:
            self._warnings.append(f"the next backup reads disk {snapshot.disk.device} whole: {e.message}")

    def _fields(self, mode: str, disks: tuple[DiskImage, ...]) -> BackupFields:
        """What every manifest says of the capture."""
        capture, description, instant = self._capture, self._capture.description, self._capture.instant()
        return BackupFields(
            vm=description.vm,
            hypervisor=description.hypervisor,
            hypervisor_version=description.hypervisor_version,
            mode=mode,
            capture=capture.plan.capture,
            freeze=OVERLAY if capture.frozen else "",
            pause_seconds=instant.pause_seconds(),
            moments=instant.moments(),
            resume_flag=capture.executing,
            definition=description.definition,
            disks=disks,
            read_only_disks=tuple(
                ReadOnlyDisk(disk.device, disk.size_bytes, disk.format, disk.address)
                for disk in description.disks
                if disk.read_only
            ),
            tags=self._order.tags,
        )

    def _keep(self) -> None:
        """Hold the duplicate; from then on it is the user's, and the ones before it are discarded."""
        capture = self._capture
        self._kept = Clones(
            capture.duplicate_name,
            self._drivers.context.folder_of_duplicate(capture.duplicate_name),
            self._operation,
            capture.mechanisms,
        )
        self._bars.show("cloning disks", 0, None)
        keep(
            capture,
            self._stored().backup,
            self._kept,
            self._operation,
            self._holding.held,
            keep_seconds=self._order.keep_seconds,
        )
        for older in self._holding.held.all(capture.row.vm):
            if older.name == capture.duplicate_name:
                continue
            try:
                self._holding.discard(older)
            except VmsnapError as e:
                self._warnings.append(f"the duplicate {older.name} that is superseded: {e}")

    def _release(self) -> None:
        """The backup is whole: what cannot be removed now stays in the journal and is a warning, not a failure."""
        for release in self._to_release():
            try:
                release()
            except VmsnapError as e:
                self._warnings.append(f"not removed yet, vmsnap recover will try again: {e}")

    def _to_release(self) -> Sequence[Action]:
        return (self._capture.delete_snapshots, self._capture.discard_duplicate)

    def _tell(self) -> None:
        manifest, capture = self._stored(), self._capture
        self._result = BackupResult(
            backup=manifest.backup,
            vm=manifest.vm,
            mode=manifest.mode,
            pause_seconds=manifest.pause_seconds or 0.0,
            read_bytes=manifest.stats.read_bytes,
            stored_bytes=manifest.stats.stored_bytes,
            seconds=time.monotonic() - self._begun,
            disks=tuple(BackupDisk(disk.device, disk.size_bytes) for disk in manifest.disks),
            memory_bytes=manifest.memory_bytes,
            capture=capture.plan.capture,
            warnings=(*self._warnings, *self._threats.values()),
            duplicate=capture.duplicate_name if self._order.keep_duplicate else "",
        )
        for tell in self._notify:
            tell(self._result)

    def _stored(self) -> Manifest:
        if self._manifest is None:
            raise ProtocolError("nothing was stored")
        return self._manifest

    # -- compensations

    def _drop(self) -> None:
        """Nothing to do: the writer has given up by itself when `_store` was left, and what is not named by a manifest
        is not listed; the chunks that it leaves are garbage to be collected."""

    def _remove_disks(self) -> None:
        if self._kept is not None:
            self._kept.delete()
