"""Backup, mode live: a capture, stored with one commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmsnap.controller.capture import Capture, GuardianStart
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.execution import Execution
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.previous import Previous
from vmsnap.controller.progress import Bars, ProgressCallback
from vmsnap.controller.recovery import Recovery
from vmsnap.controller.results import BackupDisk, BackupResult
from vmsnap.errors import ProtocolError, VmsnapError
from vmsnap.journal import Journal
from vmsnap.locks import vm_lock
from vmsnap.model import DiskSnapshot, RamImage
from vmsnap.protocol import BACKUP_LIVE, Compensation, Condition, Instruction
from vmsnap.repository import (
    BackupFields,
    BackupWriter,
    DiskImage,
    ImageKind,
    Manifest,
    MemoryImage,
    Repository,
    SparseFileReader,
)
from vmsnap.vmtable import DiskRow, VmRow, VmTable


@dataclass(frozen=True)
class BackupOrder:
    """What is to be backed up, and how."""

    vm: str
    max_pause_seconds: float = 5.0
    tags: tuple[str, ...] = ()


class LiveBackup:
    """One backup in mode live: the actions and compensations of the protocol `BACKUP_LIVE`."""

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
        self._progress = progress
        self._notify = notify
        self._prefer = prefer
        self._warnings: list[str] = []
        self._manifest: Manifest | None = None
        self._result: BackupResult | None = None
        self._begun = 0.0
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
            operation = self._journal.begin(BACKUP_LIVE.name, row.vm, row.hypervisor, row.options)
            capture = self._capture = Capture(
                row,
                operation,
                self._drivers,
                self._table,
                duplicate_name=f"bk-{operation.name.removeprefix('vmsnap-')}",
                max_pause_seconds=self._order.max_pause_seconds,
                start_guardian=self._start_guardian,
            )
            execution = Execution(
                BACKUP_LIVE,
                operation,
                row.vm,
                actions={
                    **capture.actions,
                    Instruction.STORE: self._store,
                    Instruction.RELEASE: self._release,
                    Instruction.NOTIFY: self._tell,
                },
                compensations={**capture.compensations, Compensation.DROP_UNCOMMITTED: self._drop},
                holds=lambda condition: condition is Condition.EXECUTING and capture.executing,
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
                capture.close()
                self._table.remove(capture.duplicate_name)
        if self._result is None:
            raise ProtocolError(f"the backup of {row.vm!r} ended without a result")
        return self._result

    def _recover_first(self, vm: str) -> None:
        """What an earlier crash left on this VM is set right before anything new is begun."""
        recovered = Recovery(self._drivers, self._journal, self._table).run(vm, locked=True)
        self._warnings += [f"left by an earlier run and not removed yet: {line}" for line in recovered.kept]

    # -- instructions

    def _store(self) -> None:
        capture, description = self._capture, self._capture.description
        capture.settled()
        self._enter_duplicate()
        bars = Bars(self._progress)
        duplicate = capture.finish_duplicate(lambda done: bars.show("copying memory", done, description.memory_bytes))
        instant = capture.instant()
        mechanisms = {row.device: row.mechanism or "" for row in capture.row.disks}
        total_bytes = sum(image.size_bytes for image in duplicate.images)
        total_bytes += sum(snapshot.disk.size_bytes for snapshot in capture.snapshots)
        bars.begin("storing", total_bytes)
        with self._repository.writer(purpose=f"backup of {description.vm}") as writer:
            previous = Previous(self._repository.latest(description.vm))
            memory = tuple(self._store_memory(writer, image, previous, bars) for image in duplicate.images)
            device_state = writer.add_blob("device state", duplicate.device_state.read_bytes())
            disks = tuple(
                self._store_disk(writer, snapshot, mechanisms[snapshot.disk.device], previous, bars)
                for snapshot in capture.snapshots
            )
            fields = BackupFields(
                vm=description.vm,
                hypervisor=description.hypervisor,
                hypervisor_version=description.hypervisor_version,
                mode="live",
                capture=capture.plan.capture,
                pause_seconds=instant.pause_seconds(),
                moments=instant.moments(),
                resume_flag=capture.executing,
                memory_bytes=description.memory_bytes,
                definition=description.definition,
                duplicate_details=duplicate.details,
                memory=memory,
                device_state=device_state,
                disks=disks,
                tags=self._order.tags,
            )
            self._manifest = writer.commit(
                fields, seconds=time.monotonic() - self._begun, instant_ns=instant.duplicated.wall_ns
            )
            self._warnings += writer.warnings

    def _store_memory(self, writer: BackupWriter, image: RamImage, previous: Previous, bars: Bars) -> MemoryImage:
        base = previous.memory(image)
        with SparseFileReader(image.path, image.size_bytes) as source:
            record = writer.add_image(f"memory {image.region}", source, ImageKind.RAM, bars.part, base=base)
        bars.part_done(image.size_bytes)
        return MemoryImage(image.region, image.page_bytes, record)

    def _store_disk(
        self, writer: BackupWriter, snapshot: DiskSnapshot, mechanism: str, previous: Previous, bars: Bars
    ) -> DiskImage:
        disk = snapshot.disk
        driver = self._capture.mechanisms[mechanism]
        base = previous.disk(snapshot, mechanism, driver)
        with driver.reader(snapshot) as source:
            record = writer.add_image(f"disk {disk.device}", source, ImageKind.DISK, bars.part, base=base)
        bars.part_done(disk.size_bytes)
        return DiskImage(disk.device, disk.size_bytes, disk.format, disk.address, mechanism, record, snapshot.mark)

    def _enter_duplicate(self) -> None:
        """The duplicate's row in the VM table, for as long as it is held: its disks are the snapshots."""
        capture = self._capture
        self._table.add(
            VmRow(
                vm=capture.duplicate_name,
                hypervisor=capture.row.hypervisor,
                options={},
                disks=tuple(
                    DiskRow(snapshot.disk.device, f"{snapshot.plan.mechanism}:{snapshot.plan.tag}", None)
                    for snapshot in capture.snapshots
                ),
                state="captured",
                kind="duplicate",
                duplicate_of=capture.row.vm,
            )
        )

    def _release(self) -> None:
        """The backup is whole: what cannot be removed now stays in the journal and is a warning, not a failure."""
        for release in (self._capture.delete_snapshots, self._capture.discard_duplicate):
            try:
                release()
            except VmsnapError as e:
                self._warnings.append(f"not removed yet, vmsnap recover will try again: {e}")

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
            warnings=tuple(self._warnings),
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
