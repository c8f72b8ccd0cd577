"""Restore: from the repository to a VM that exists again, running or stopped, on disks of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.executing import see_it_execute
from vmsnap.controller.execution import Execution
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.named_disks import THE_ONE, opened
from vmsnap.controller.progress import Bars, ProgressCallback
from vmsnap.controller.reach import Reach
from vmsnap.controller.recovery import Recovery
from vmsnap.controller.results import RestoreResult
from vmsnap.controller.retrieval import Retrieval, disk_paths, with_memory
from vmsnap.controller.running import LoadedRecord
from vmsnap.errors import AlreadyExists, Busy, HypervisorError, UnknownVm, UsageError, VmsnapError
from vmsnap.journal import Journal, Operation
from vmsnap.locks import vm_lock
from vmsnap.model import Disk, VmState, check_name, to_json
from vmsnap.protocol import RESTORE, Compensation, Condition, Instruction
from vmsnap.repository import LostRange, Manifest, Repository, accepted_losses
from vmsnap.roles import DiskWriter, Hypervisor, LoadedVm
from vmsnap.vmtable import DiskRow, VmRow, VmTable


@dataclass(frozen=True)
class RestoreOrder:
    """What is to be restored, as what, and where to. `target` None: a folder of the VM's own under the state folder.
    `onto`: addresses of disks that exist, by the devices that are written onto them instead; what they hold is lost.
    `accept_loss`: what is noted as lost for good reads as zeros.
    """

    backup: str
    name: str
    run: bool = False
    isolated: bool = False
    target: Path | None = None
    options: Mapping[str, str] | None = None
    accept_loss: bool = False
    onto: Mapping[str, str] = field(default_factory=dict)


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
        self._retrieval: Retrieval | None = None
        self._loaded_position: int | None = None
        self._loaded: LoadedVm | None = None
        self._disks: tuple[Disk, ...] = ()
        self._lost: Mapping[str, Sequence[LostRange]] = {}
        self._operation: Operation | None = None
        self._onto: Mapping[str, DiskWriter] = {}

    def run(self) -> RestoreResult:
        """Carry it out. Blocks.

        :raises AlreadyExists: a VM of that name, or a file where a disk is to be, exists; nothing was touched
        :raises DamageFound: the backup is damaged, or has lost something and nobody accepted that
        :raises Busy: somebody uses a disk that is to be written onto; nothing was touched
        """
        begun = time.monotonic()
        order = self._order
        with_memory(self._manifest)
        with vm_lock(self._drivers.context.state_dir, order.name, f"restore of {self._manifest.backup}"):
            self._recover_first()
            self._refuse_existing()
            parts = [part for part, _ in self._manifest.images]
            self._lost = accepted_losses(self._repository, self._manifest, parts, accept=order.accept_loss)
            with self._disks_named() as self._onto:
                self._carry_out()
        row = self._table.get(order.name)
        return RestoreResult(row.vm, row.state, row.disks, row.options, self._manifest.backup, time.monotonic() - begun)

    @contextmanager
    def _disks_named(self) -> Iterator[Mapping[str, DiskWriter]]:
        """The disks that are there already, once it is sure that they may be written onto."""
        order = self._order
        if not order.onto:
            yield {}
            return
        if not self._hypervisor.loads_luns:
            raise UsageError(
                f"a VM of {self._manifest.hypervisor!r} cannot have a LUN for a disk", cure="give --target a folder"
            )
        with opened(self._drivers, self._manifest, order.onto) as onto:
            disks = [Disk(device, writer.address, writer.size_bytes) for device, writer in onto.items()]
            Reach(self._drivers, self._table, order.name).check_disks(disks)
            yield onto

    def _carry_out(self) -> None:
        operation = self._operation = self._journal.begin(
            RESTORE.name, self._order.name, self._manifest.hypervisor, self._options, backup=self._manifest.backup
        )
        self._retrieval = Retrieval(
            self._repository,
            self._manifest,
            operation,
            self._drivers,
            self._folder,
            f"restore-{self._order.name}",
            Bars(self._progress),
            self._lost,
            self._onto,
        )
        execution = Execution(
            RESTORE,
            operation,
            self._order.name,
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
                Compensation.DISCARD_DUPLICATE: self._retrieval.remove_images,
                Compensation.REMOVE_DISKS: self._retrieval.remove_all,
            },
            holds={Condition.ISOLATED: self._order.isolated, Condition.RUN: self._order.run}.__getitem__,
            interruption=self._interruption,
        )
        try:
            execution.run()
        finally:
            self._hypervisor.close()

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
        # The one disk is written onto what is there; else all those that are named.
        paths = {} if THE_ONE in self._order.onto else disk_paths(self._manifest, self._folder, self._order.onto)
        for path in paths.values():
            if os.path.lexists(path):
                raise AlreadyExists(f"{path} exists and is not overwritten", cure="choose another --target")
        if not self._order.target and self._folder.exists() and any(self._folder.iterdir()):
            raise AlreadyExists(f"the folder {self._folder} is not empty", cure="choose another --target")

    def _load(self) -> None:
        operation, retrieval = self._begun_operation(), self._retrieved()
        request = retrieval.fetch(isolated=self._order.isolated)
        self._disks = request.disks
        self._loaded_position = operation.will_make(
            "loaded", self._manifest.hypervisor, to_json(LoadedRecord(self._order.name, self._options))
        )
        try:
            self._loaded = self._hypervisor.load(request)
        except AlreadyExists:
            # Somebody else's: nothing of it is ours to destroy.
            operation.is_gone(self._loaded_position)
            self._loaded_position = None
            raise
        retrieval.remove_images()

    def _switch_disks(self) -> None:
        self._disks = self._hypervisor.switch_disks(self._disks)
        Reach(self._drivers, self._table, self._order.name).check_disks(self._disks)

    def _cut_network(self) -> None:
        self._hypervisor.cut_network()

    def _resume(self) -> None:
        self._hypervisor.resume()

    def _await_executing(self) -> None:
        see_it_execute(self._hypervisor)

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

    def _retrieved(self) -> Retrieval:
        if self._retrieval is None:
            raise VmsnapError("the restore was not begun")
        return self._retrieval

    def _begun_operation(self) -> Operation:
        if self._operation is None:
            raise VmsnapError("the restore was not begun")
        return self._operation
