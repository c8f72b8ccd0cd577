"""The controller: carries the protocols out with drivers. The verbs of command line and library are its methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmsnap.controller.capture import GuardianStart, choose_mechanisms
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.progress import Progress, ProgressCallback, silent
from vmsnap.controller.recovery import Recovery
from vmsnap.controller.results import BackupDisk, BackupResult, RecoveryResult, RestoreResult
from vmsnap.database import Database
from vmsnap.errors import AlreadyExists, Busy, UsageError
from vmsnap.guardian import start_for
from vmsnap.host import HostFolders
from vmsnap.journal import Journal
from vmsnap.knownrepositories import KnownRepositories
from vmsnap.locks import vm_lock
from vmsnap.model import Finding, check_name
from vmsnap.vmtable import DiskRow, VmRow, VmTable

if TYPE_CHECKING:
    from vmsnap.repository import Repository

__all__ = [
    "BackupDisk",
    "BackupResult",
    "Controller",
    "Drivers",
    "Progress",
    "ProgressCallback",
    "RecoveryResult",
    "RestoreResult",
]

DEFAULT_MAX_PAUSE_SECONDS = 5.0


class Controller:
    """One host's VMs, its journal, and the protocols over them.

    Not to be shared between threads; several controllers and processes may work on one state folder at once.
    """

    def __init__(
        self,
        folders: HostFolders | None = None,
        *,
        drivers: Drivers | None = None,
        start_guardian: GuardianStart = start_for,
    ) -> None:
        """Open (or make) the state under `folders`, by default those of this user.

        `start_guardian` makes the guardian of a capture; tests that are not about it leave it out.

        :raises VmsnapError: the state cannot be opened
        """
        self.folders = folders or HostFolders.find()
        self.drivers = drivers or Drivers(self.folders.context())
        self.interruption = Interruption()
        self._database = Database(self.folders.state_dir / "vmsnap.db")
        self.table = VmTable(self._database)
        self.journal = Journal(self._database)
        self._start_guardian = start_guardian

    def close(self) -> None:
        """Close the state; idempotent."""
        self._database.close()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the VM table

    def add_vm(
        self,
        name: str,
        hypervisor: str,
        options: Mapping[str, str] | None = None,
        mechanisms: Mapping[str, str] | None = None,
    ) -> VmRow:
        """Register a VM: asks its hypervisor what it is and chooses a snapshot mechanism for each disk.

        `mechanisms` chooses one for the disk of a device id.

        :raises AlreadyExists: the name is registered
        :raises UsageError: a name, an option or a device is wrong
        :raises DriverUnavailable: there is no such driver
        :raises UnknownVm: the hypervisor does not know the VM
        """
        check_name(name, "VM name")
        if self.journal.unfinished(name):
            raise Busy(
                f"an earlier operation on a VM named {name!r} is going on or left something",
                cure=f"vmsnap recover {name}",
            )
        if name in {row.vm for row in self.table.rows()}:
            raise AlreadyExists(f"a VM named {name!r} is already registered", cure="choose another name")
        driver = self.drivers.hypervisor(hypervisor, name, options or {})
        try:
            description = driver.describe()
        finally:
            driver.close()
        wanted = dict(mechanisms or {})
        unknown = set(wanted) - {disk.device for disk in description.disks}
        if unknown:
            raise UsageError(
                f"VM {name!r} has no disk {sorted(unknown)[0]!r}",
                cure=f"its disks: {', '.join(disk.device for disk in description.disks) or 'none'}",
            )
        disks = choose_mechanisms(
            self.drivers,
            description.disks,
            tuple(DiskRow(device, "", mechanism) for device, mechanism in wanted.items()),
        )
        row = VmRow(name, hypervisor, dict(options or {}), disks, description.state.value)
        self.table.add(row)
        return row

    def vms(self) -> list[VmRow]:
        """The VM table as it stands; nobody is asked."""
        return self.table.rows()

    def vm(self, name: str) -> VmRow:
        """One row, its state asked of the hypervisor now and entered.

        :raises UnknownVm: not registered
        """
        row = self.table.get(name)
        driver = self.drivers.hypervisor(row.hypervisor, row.vm, row.options)
        try:
            self.table.set_state(name, driver.state().value)
        finally:
            driver.close()
        return self.table.get(name)

    def remove_vm(self, name: str) -> VmRow:
        """Strike a VM out of the table; the VM itself and its backups stay as they are.

        :raises UnknownVm: not registered
        :raises Busy: an operation works on it
        """
        row = self.table.get(name)
        with vm_lock(self.folders.state_dir, name, "vm remove"):
            self.table.remove(name)
        return row

    # -- the protocols

    def backup(
        self,
        vm: str,
        repository: Repository,
        *,
        max_pause_seconds: float = DEFAULT_MAX_PAUSE_SECONDS,
        tags: Sequence[str] = (),
        accept_unencrypted: bool = False,
        progress: ProgressCallback = silent,
        notify: Sequence[Callable[[BackupResult], None]] = (),
    ) -> BackupResult:
        """Back a VM up, mode live: memory and disks of one instant, the guest standing still for milliseconds.

        Blocks until the backup is committed. Whatever fails, the VM runs again if it ran.

        :param accept_unencrypted: go on where an unencrypted repository has taken the place of an encrypted one
        :raises RepositoryError: that is so, and was not accepted
        :raises UnknownVm: not registered
        :raises Busy: another operation works on this VM, or its monitor serves somebody else
        :raises CannotCapture: refused before anything was paused
        :raises VmsnapError: it failed; nothing is left behind, or it stands in the journal for `recover`
        """
        from vmsnap.controller.backup import BackupOrder, LiveBackup
        from vmsnap.repository.manifest import check_tag

        if not 0 < max_pause_seconds < math.inf:
            raise UsageError("the pause must be allowed more than 0 seconds, and an end")
        for tag in tags:
            check_tag(tag)
        known, place = KnownRepositories(self._database), (repository.storage.url, repository.id, repository.encryption)
        if not accept_unencrypted:
            known.expect(*place)
        known.note(*place)
        with self.interruption.handled():
            return LiveBackup(
                BackupOrder(vm, max_pause_seconds, tuple(tags)),
                repository,
                self.drivers,
                self.journal,
                self.table,
                start_guardian=self._start_guardian,
                interruption=self.interruption,
                progress=progress,
                notify=notify,
            ).run()

    def restore(
        self,
        repository: Repository,
        backup: str,
        name: str,
        *,
        run: bool = False,
        isolated: bool = False,
        target: Path | None = None,
        options: Mapping[str, str] | None = None,
        accept_loss: bool = False,
        progress: ProgressCallback = silent,
    ) -> RestoreResult:
        """Make a new VM `name` from a backup, on disks of its own in the folder `target`; stopped unless `run`.

        Blocks. `isolated` cuts its network before it runs. `options` are the hypervisor driver's. `accept_loss`: what
        repair noted as lost is zeros in the new VM.

        :raises UnknownBackup: there is none of that id
        :raises AlreadyExists: the name, or a file where a disk is to be, exists
        :raises DamageFound: the backup is damaged, or has lost something and `accept_loss` is not set
        """
        from vmsnap.controller.restore import Restore, RestoreOrder

        # The session before the manifest is read: what it names is kept from then on.
        with self.interruption.handled(), repository.session("read", f"restore of {backup}"):
            return Restore(
                RestoreOrder(backup, name, run, isolated, target, options, accept_loss),
                repository,
                self.drivers,
                self.journal,
                self.table,
                self.interruption,
                progress,
            ).run()

    def recover(self, vm: str | None = None) -> RecoveryResult:
        """Finish or undo what crashes left, of one VM or of all. Idempotent.

        :raises UnknownVm: `vm` is neither registered nor in the journal
        """
        if vm is not None and not self.journal.unfinished(vm):
            self.table.get(vm)
        with self.interruption.handled(), self.interruption.deferred():
            return Recovery(self.drivers, self.journal, self.table).run(vm)

    # -- asking

    def doctor(self, vm: str | None = None) -> list[tuple[str, Finding]]:
        """What every installed driver, or those of one VM, say of this host: pairs of driver name and finding."""
        from vmsnap.controller.examination import examine_host, examine_vm

        if vm is None:
            return examine_host(self.folders, self.drivers, self.journal)
        return examine_vm(self.table.get(vm), self.drivers)
