"""Restore: from the repository to a VM that exists again, running or stopped, on disks of its own."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.execution import Execution
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.progress import Bars, ProgressCallback
from vmsnap.controller.recovery import Recovery, remove_file
from vmsnap.controller.results import RestoreResult
from vmsnap.errors import AlreadyExists, Busy, HypervisorError, StorageFull, UnknownVm, UsageError, VmsnapError
from vmsnap.journal import Journal, Operation
from vmsnap.locks import vm_lock
from vmsnap.model import Disk, RamImage, VmState, check_name, to_json
from vmsnap.protocol import RESTORE, Compensation, Condition, Instruction
from vmsnap.repository import ImageRecord, LostRange, Manifest, Repository, accepted_losses
from vmsnap.roles import Hypervisor, LoadedVm, LoadRequest
from vmsnap.vmtable import DiskRow, VmRow, VmTable


@dataclass(frozen=True)
class RestoreOrder:
    """What is to be restored, as what, and where to. `target` None: a folder of the VM's own under the state folder.
    `accept_loss`: what is noted as lost for good reads as zeros.
    """

    backup: str
    name: str
    run: bool = False
    isolated: bool = False
    target: Path | None = None
    options: Mapping[str, str] | None = None
    accept_loss: bool = False


class Restore:
    """One restore: the actions and compensations of the protocol `RESTORE`."""

    def __init__(
        self,
        order: RestoreOrder,
        repository: Repository,
        drivers: Drivers,
        journal: Journal,
        table: VmTable,
        interruption: Interruption,
        progress: ProgressCallback,
    ) -> None:
        check_name(order.name, "VM name")
        self._order = order
        self._repository = repository
        self._drivers = drivers
        self._journal = journal
        self._table = table
        self._interruption = interruption
        self._progress = progress
        self._manifest: Manifest = repository.manifest(order.backup)
        self._options = dict(order.options or {})
        self._hypervisor: Hypervisor = drivers.hypervisor(self._manifest.hypervisor, order.name, self._options)
        self._folder = order.target or drivers.context.state_dir / "vms" / order.name
        self._images_folder = drivers.context.memory_dir / f"restore-{order.name}"
        self._files: list[tuple[int, Path]] = []
        self._loaded_position: int | None = None
        self._loaded: LoadedVm | None = None
        self._disks: tuple[Disk, ...] = ()
        self._lost: Mapping[str, Sequence[LostRange]] = {}
        self._operation: Operation | None = None

    def run(self) -> RestoreResult:
        """Carry it out. Blocks.

        :raises AlreadyExists: a VM of that name, or a file where a disk is to be, exists; nothing was touched
        :raises DamageFound: the backup is damaged, or has lost something and nobody accepted that
        """
        begun = time.monotonic()
        order = self._order
        with vm_lock(self._drivers.context.state_dir, order.name, f"restore of {self._manifest.backup}"):
            self._recover_first()
            self._refuse_existing()
            parts = [part for part, _ in self._manifest.images]
            self._lost = accepted_losses(self._repository, self._manifest, parts, accept=order.accept_loss)
            operation = self._operation = self._journal.begin(
                RESTORE.name, order.name, self._manifest.hypervisor, self._options
            )
            execution = Execution(
                RESTORE,
                operation,
                order.name,
                actions={
                    Instruction.LOAD: self._load,
                    Instruction.SWITCH_DISKS: self._switch_disks,
                    Instruction.CUT_NETWORK: self._cut_network,
                    Instruction.RESUME_DUPLICATE: self._resume,
                    Instruction.AWAIT_EXECUTING: self._await_executing,
                    Instruction.NOTIFY: self._enter_in_table,
                },
                compensations={
                    Compensation.DESTROY_LOADED: self._destroy,
                    Compensation.DISCARD_DUPLICATE: self._remove_images,
                    Compensation.REMOVE_DISKS: self._remove_disks,
                },
                holds={Condition.ISOLATED: order.isolated, Condition.RUN: order.run}.__getitem__,
                interruption=self._interruption,
            )
            try:
                execution.run()
            finally:
                self._hypervisor.close()
        row = self._table.get(order.name)
        return RestoreResult(row.vm, row.state, row.disks, row.options, self._manifest.backup, time.monotonic() - begun)

    # -- instructions

    def _recover_first(self) -> None:
        """What an earlier restore of this name left must be gone: its recovery, later, would take this one's for it."""
        recovered = Recovery(self._drivers, self._journal, self._table).run(self._order.name, locked=True)
        if recovered.kept:
            raise Busy(
                f"an earlier operation on VM {self._order.name!r} left something: {recovered.kept[0]}",
                cure="see: vmsnap recover; or choose another name with --as",
            )

    def _refuse_existing(self) -> None:
        try:
            self._table.get(self._order.name)
        except UnknownVm:
            pass
        else:
            raise AlreadyExists(
                f"a VM named {self._order.name!r} is already registered", cure="choose another name with --as"
            )
        if self._hypervisor.state() is not VmState.ABSENT:
            raise AlreadyExists(
                f"a VM named {self._order.name!r} exists, though it is not registered",
                cure="choose another name with --as",
            )
        for path in self._disk_paths().values():
            if os.path.lexists(path):
                raise AlreadyExists(f"{path} exists and is not overwritten", cure="choose another --target")
        if not self._order.target and self._folder.exists() and any(self._folder.iterdir()):
            raise AlreadyExists(f"the folder {self._folder} is not empty", cure="choose another --target")

    def _disk_paths(self) -> dict[str, Path]:
        """The new file of each disk that is in the backup, named by its device."""
        return {disk.device: self._folder / f"{disk.device}.raw" for disk in self._manifest.disks}

    def _load(self) -> None:
        operation = self._begun_operation()
        manifest = self._manifest
        self._make_folder(self._folder, operation)
        paths = self._disk_paths()
        bars = Bars(self._progress)
        total_bytes = sum(disk.size_bytes for disk in manifest.disks)
        bars.begin("reading", total_bytes + sum(memory.image.size_bytes for memory in manifest.memory))
        for disk in manifest.disks:
            path = paths[disk.device]
            self._fetch(disk.image, f"disk {disk.device}", path, bars)
            self._disks += (Disk(disk.device, str(path), disk.size_bytes, "raw"),)
        images, device_state = self._fetch_memory(operation, bars)
        self._loaded_position = operation.will_make("loaded", manifest.hypervisor, to_json(self._order.name))
        request = LoadRequest(
            manifest.definition,
            images,
            device_state,
            self._disks,
            isolated=self._order.isolated,
            images_disposable=True,
            details=manifest.duplicate_details,
        )
        try:
            self._loaded = self._hypervisor.load(request)
        except AlreadyExists:
            # Somebody else's: nothing of it is ours to destroy.
            operation.is_gone(self._loaded_position)
            self._loaded_position = None
            raise
        self._remove_images()

    def _fetch_memory(self, operation: Operation, bars: Bars) -> tuple[tuple[RamImage, ...], Path]:
        """RAM images and device state onto tmpfs, where the hypervisor can map them."""
        manifest = self._manifest
        if manifest.device_state is None:
            raise UsageError(
                f"backup {manifest.backup} holds disks alone, no memory", cure="vmsnap export gives its disks"
            )
        needed = sum(memory.image.size_bytes for memory in manifest.memory)
        free = shutil.disk_usage(self._drivers.context.memory_dir).free
        if self._drivers.context.memory_budget_bytes is not None:
            free = min(free, self._drivers.context.memory_budget_bytes)
        if needed > free:
            raise StorageFull(
                f"the machine has {needed >> 20} MiB of memory,"
                f" {self._drivers.context.memory_dir} has {free >> 20} MiB free",
                cure="free memory on this host",
            )
        self._make_folder(self._images_folder, operation)
        images = []
        for memory in manifest.memory:
            path = self._images_folder / f"{memory.file_name}.ram"
            self._fetch(memory.image, f"memory {memory.region}", path, bars)
            images.append(RamImage(memory.region, memory.image.size_bytes, path, memory.page_bytes))
        device_state = self._images_folder / "device-state"
        self._fetch(manifest.device_state, "device state", device_state, bars)
        return tuple(images), device_state

    def _fetch(self, image: ImageRecord, label: str, path: Path, bars: Bars) -> None:
        position = self._begun_operation().will_make("file", "", to_json(str(path)))
        try:
            with self._repository.reader(image, label, lost=self._lost.get(label, ())) as source:
                source.restore_to_file(path, bars.part)
        except AlreadyExists:
            self._begun_operation().is_gone(position)
            raise
        self._files.append((position, path))
        bars.part_done(image.size_bytes)

    def _switch_disks(self) -> None:
        self._disks = self._hypervisor.switch_disks(self._disks)

    def _cut_network(self) -> None:
        self._hypervisor.cut_network()

    def _resume(self) -> None:
        self._hypervisor.resume()

    def _await_executing(self) -> None:
        state = self._hypervisor.state()
        if state is not VmState.EXECUTING:
            raise HypervisorError(f"the restored VM {self._order.name!r} is {state.value} instead of executing")

    def _enter_in_table(self) -> None:
        """From here on the VM is the user's: nothing of it is ours to remove."""
        if self._loaded is None:
            raise HypervisorError(f"VM {self._order.name!r} was not loaded")
        state = VmState.EXECUTING if self._order.run else VmState.STOPPED
        self._begun_operation().hand_to_user(
            VmRow(
                vm=self._order.name,
                hypervisor=self._manifest.hypervisor,
                options=self._loaded.options,
                disks=tuple(DiskRow(disk.device, disk.address) for disk in self._disks),
                state=state.value,
                duplicate_of=self._manifest.vm,
            )
        )

    # -- compensations

    def _destroy(self) -> None:
        if self._loaded_position is not None:
            self._hypervisor.destroy()
            self._begun_operation().is_gone(self._loaded_position)

    def _remove_images(self) -> None:
        self._remove_files(lambda path: path == self._images_folder or self._images_folder in path.parents)

    def _remove_disks(self) -> None:
        self._remove_files(lambda _: True)

    def _remove_files(self, which: Callable[[Path], bool]) -> None:
        operation = self._begun_operation()
        for position, path in reversed(self._files):
            if which(path):
                remove_file(path)
                operation.is_gone(position)
        self._files = [(position, path) for position, path in self._files if not which(path)]

    # -- files

    def _make_folder(self, folder: Path, operation: Operation) -> None:
        for missing in reversed([folder, *folder.parents]):
            if not missing.exists():
                self._files.append((operation.will_make("file", "", to_json(str(missing))), missing))
                try:
                    missing.mkdir(mode=0o700)
                except OSError as e:
                    raise VmsnapError(f"cannot make the folder {missing}: {e.strerror}") from e

    def _begun_operation(self) -> Operation:
        if self._operation is None:
            raise VmsnapError("the restore was not begun")
        return self._operation
