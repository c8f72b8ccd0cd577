"""A stored machine brought up out of everybody's reach and shut down in order: what consolidating and verifying by
booting have in common.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.execution import Action, Execution
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.progress import Bars, ProgressCallback
from vmsnap.controller.reach import rows_of
from vmsnap.controller.retrieval import Retrieval, with_memory
from vmsnap.controller.running import RunningDuplicate
from vmsnap.errors import ProtocolError
from vmsnap.journal import Journal, Operation
from vmsnap.locks import vm_lock
from vmsnap.protocol import Compensation, Condition, Instruction, Protocol
from vmsnap.repository import Manifest, Repository, accepted_losses
from vmsnap.vmtable import VmRow, VmTable


class CleanRun:
    """One run of `protocol`, which begins with loading and in which the guest is shut down.

    The machine runs under a name that nobody else has, isolated, on disks that were just read from the repository.
    """

    protocol: Protocol

    def __init__(
        self,
        repository: Repository,
        backup: str,
        drivers: Drivers,
        journal: Journal,
        table: VmTable,
        interruption: Interruption,
        progress: ProgressCallback,
        *,
        timeout_seconds: float,
        options: Mapping[str, str] | None = None,
        accept_loss: bool = False,
    ) -> None:
        self._repository = repository
        self._manifest: Manifest = repository.manifest(backup)
        self._drivers = drivers
        self._journal = journal
        self._table = table
        self._interruption = interruption
        self._bars = Bars(progress)
        self._timeout_seconds = timeout_seconds
        self._options = dict(options or {})
        self._accept_loss = accept_loss
        self._warnings: list[str] = []
        self._operation: Operation
        self._retrieval: Retrieval
        self._running: RunningDuplicate

    def _carry_out(self, prefix: str, folder: Path | None) -> None:
        """Go from start to goal; `prefix` begins the machine's name, its disks go into `folder` (None: one of its own).

        :raises UsageError: the backup holds disks alone
        :raises DamageFound: it is damaged, or has lost something and nobody accepted that
        :raises HypervisorError: the machine did not run, or did not shut down in order; nothing of it is left
        """
        manifest = self._manifest
        with_memory(manifest)
        parts = [part for part, _ in manifest.images]
        lost = accepted_losses(self._repository, manifest, parts, accept=self._accept_loss)
        name = f"{prefix}-{secrets.token_hex(5)}"
        context = self._drivers.context
        # Wrong options are told before anything is begun.
        self._drivers.hypervisor(manifest.hypervisor, name, self._options).close()
        with vm_lock(context.state_dir, name, self.protocol.name):
            operation = self._operation = self._journal.begin(
                self.protocol.name, name, manifest.hypervisor, self._options, backup=manifest.backup
            )
            self._retrieval = Retrieval(
                self._repository,
                manifest,
                operation,
                self._drivers,
                folder or context.folder_of_duplicate(name),
                name,
                self._bars,
                lost,
            )
            self._running = RunningDuplicate(
                name, manifest.hypervisor, self._options, operation, self._drivers, self._table
            )
            execution = Execution(
                self.protocol,
                operation,
                name,
                actions=self._actions(),
                compensations=self._compensations(),
                holds=self._holds,
                interruption=self._interruption,
            )
            try:
                execution.run()
            finally:
                self._running.close()

    def _actions(self) -> dict[Instruction, Action]:
        running = self._running
        return {
            Instruction.LOAD: self._load,
            Instruction.SWITCH_DISKS: running.switch_disks,
            Instruction.CUT_NETWORK: running.cut_network,
            Instruction.RESUME_DUPLICATE: running.resume,
            Instruction.AWAIT_EXECUTING: running.await_executing,
            Instruction.SHUT_DOWN: lambda: running.shut_down(self._timeout_seconds),
            Instruction.AWAIT_STOPPED: running.await_stopped,
            Instruction.RELEASE: self._release,
            Instruction.NOTIFY: lambda: None,
        }

    def _compensations(self) -> dict[Compensation, Action]:
        return {
            Compensation.DESTROY_LOADED: self._destroy,
            Compensation.DISCARD_DUPLICATE: self._retrieval.remove_images,
            Compensation.REMOVE_DISKS: self._retrieval.remove_all,
            Compensation.DROP_UNCOMMITTED: lambda: None,
        }

    def _holds(self, condition: Condition) -> bool:
        raise ProtocolError(f"nobody said whether {condition.value}")

    def _load(self) -> None:
        request = self._retrieval.fetch(isolated=True)
        self._running.load(request)
        self._table.add(
            VmRow(
                vm=self._running.name,
                hypervisor=self._manifest.hypervisor,
                options=self._options,
                disks=rows_of(request.disks),
                state="stopped",
                kind="duplicate",
                duplicate_of=self._manifest.vm,
            )
        )
        self._retrieval.remove_images()

    def _destroy(self) -> None:
        self._running.destroy()
        self._table.remove(self._running.name)

    def _release(self) -> None:
        self._destroy()
        self._retrieval.remove_images()
