"""The controller: carries the protocols out with drivers. The verbs of command line and library are its methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsnap.controller.capture import GuardianStart
from vmsnap.controller.choosing import choose_mechanisms
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.freezing import NO_FREEZE, is_frozen
from vmsnap.controller.interruption import Interruption
from vmsnap.controller.progress import Progress, ProgressCallback, silent
from vmsnap.controller.recovery import Recovery
from vmsnap.controller.results import (
    BackupDisk,
    BackupResult,
    BootResult,
    ConsolidateResult,
    DuplicateInfo,
    FailoverResult,
    RecoveryResult,
    RestoreResult,
)
from vmsnap.database import FILE_NAME, Database
from vmsnap.errors import AlreadyExists, Busy, UnknownDuplicate, UsageError
from vmsnap.guardian import start_for
from vmsnap.host import HostFolders
from vmsnap.journal import Journal
from vmsnap.knownrepositories import KnownRepositories
from vmsnap.locks import vm_lock
from vmsnap.model import Finding, OwnedResource, check_name
from vmsnap.vmtable import DiskRow, VmRow, VmTable

if TYPE_CHECKING:
    from vmsnap.controller.holding import Holding
    from vmsnap.controller.strays import Strays
    from vmsnap.repository import Repository

__all__ = [
    "BackupDisk",
    "BackupResult",
    "BootResult",
    "ConsolidateResult",
    "Controller",
    "Drivers",
    "DuplicateInfo",
    "FailoverResult",
    "Progress",
    "ProgressCallback",
    "RecoveryResult",
    "RestoreResult",
]

DEFAULT_MAX_PAUSE_SECONDS = 5.0
DEFAULT_TIMEOUT_SECONDS = 300.0
"""How long a guest may take to shut down: services of a Linux guest are given 90 s each, one after the other."""
DEFAULT_LIFE_SECONDS = 10.0
"""How long a sign of life is waited for."""


def silently(_: str) -> None:
    """For those who do not want to be told."""


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
        self._database = Database(self.folders.state_dir / FILE_NAME)
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
        """One row, its state asked of the hypervisor now and entered; that of a duplicate as it stands in the table.

        :raises UnknownVm: not registered
        """
        row = self.table.get(name)
        if row.kind == "duplicate":
            return row
        driver = self.drivers.hypervisor(row.hypervisor, row.vm, row.options)
        try:
            self.table.set_state(name, driver.state().value)
        finally:
            driver.close()
        return self.table.get(name)

    def remove_vm(self, name: str) -> VmRow:
        """Strike a VM out of the table; the VM itself and its backups stay as they are, a duplicate of it that is held
        in memory is discarded.

        :raises UnknownVm: not registered
        :raises UsageError: it is a duplicate
        :raises Busy: an operation works on it
        """
        row = self.table.get(name)
        if row.kind == "duplicate":
            raise UsageError(
                f"{name!r} is a duplicate of VM {row.duplicate_of!r}", cure="see: vmsnap duplicate discard"
            )
        with vm_lock(self.folders.state_dir, name, "vm remove"):
            holding = self._holding()
            for held in holding.held.all(name):
                holding.discard(held)
            for mechanism in {disk.mechanism for disk in row.disks if disk.mechanism}:
                driver = self.drivers.mechanism(mechanism)
                try:
                    driver.forget_marks(name)
                finally:
                    driver.close()
            self.table.remove(name)
        return row

    # -- the protocols

    def backup(
        self,
        vm: str,
        repository: Repository,
        *,
        mode: str = "live",
        max_pause_seconds: float = DEFAULT_MAX_PAUSE_SECONDS,
        tags: Sequence[str] = (),
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        on_timeout: str = "fail",
        keep_duplicate: bool = False,
        keep_seconds: float | None = None,
        freeze: str = NO_FREEZE,
        accept_unencrypted: bool = False,
        progress: ProgressCallback = silent,
        notify: Sequence[Callable[[BackupResult], None]] = (),
    ) -> BackupResult:
        """Back a VM up: memory and disks of one instant, the guest standing still for milliseconds.

        Blocks until the backup is committed. Whatever fails, the VM runs again if it ran.

        :param mode: ``live``, or ``consistent``: the captured machine is run on writable clones of its disks, its
            network cut, and shut down in order; the disks as they are then are the backup, without memory
        :param timeout_seconds: how long the guest may take for that
        :param on_timeout: ``fail``, or ``keep-live``: store the live backup where the guest does not shut down
        :param keep_duplicate: hold the captured machine in memory, on disks of its own, for `failover`; one that was
            held before is discarded then. With `keep_seconds` its time is over after so long.
        :param freeze: ``overlay``: slow snapshots are taken after the pause, the guest running on overlays meanwhile
        :param accept_unencrypted: go on where an unencrypted repository has taken the place of an encrypted one
        :raises RepositoryError: that is so, and was not accepted
        :raises UnknownVm: not registered
        :raises Busy: another operation works on this VM, or its monitor serves somebody else
        :raises CannotCapture: refused before anything was paused
        :raises StorageFull: no room for the duplicate in memory, beside those that are held
        :raises VmsnapError: it failed; nothing is left behind, or it stands in the journal for `recover`
        """
        from vmsnap.controller.backup import BackupOrder, LiveBackup
        from vmsnap.controller.consistent import ConsistentBackup, ConsistentOrder
        from vmsnap.repository.manifest import check_tag

        if mode not in ("live", "consistent") or on_timeout not in ("fail", "keep-live"):
            raise UsageError(f"there is no mode {mode!r} with on_timeout {on_timeout!r}")
        _check_times(pause=max_pause_seconds, shutdown=timeout_seconds, duplicate=keep_seconds)
        if keep_seconds is not None and not keep_duplicate:
            raise UsageError("a duplicate that is not held needs no time limit", cure="add --keep-duplicate")
        for tag in tags:
            check_tag(tag)
        self.see_the_place(repository, accept_unencrypted=accept_unencrypted)
        begin: type[LiveBackup] = LiveBackup
        order = BackupOrder(vm, max_pause_seconds, tuple(tags), keep_duplicate, keep_seconds, is_frozen(freeze))
        if mode == "consistent":
            begin = ConsistentBackup
            order = ConsistentOrder(**vars(order), timeout_seconds=timeout_seconds, keep_live=on_timeout == "keep-live")
        with self.interruption.handled():
            self._holding().discard_ended(silently)
            return begin(
                order,
                repository,
                self.drivers,
                self.journal,
                self.table,
                start_guardian=self._start_guardian,
                interruption=self.interruption,
                progress=progress,
                notify=notify,
            ).run()

    def consolidate(
        self,
        repository: Repository,
        backup: str,
        target: Path,
        *,
        store: bool = False,
        tags: Sequence[str] = (),
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        options: Mapping[str, str] | None = None,
        accept_loss: bool = False,
        progress: ProgressCallback = silent,
    ) -> ConsolidateResult:
        """Bring a live backup up out of everybody's reach, shut it down in order, and leave its disks, clean, in the
        folder `target`; `store` them as a backup of mode consistent too. Blocks.

        :raises UnknownBackup: there is none of that id
        :raises UsageError: it holds disks alone
        :raises AlreadyExists: a file where a disk is to be exists
        :raises HypervisorError: the guest did not shut down in order; nothing is left
        """
        from vmsnap.controller.consolidate import Consolidate
        from vmsnap.repository.manifest import check_tag
        from vmsnap.repository.reading import reading

        _check_times(shutdown=timeout_seconds)
        for tag in tags:
            check_tag(tag)
        with self.interruption.handled(), reading(repository, backup, f"consolidation of {backup}"):
            return Consolidate(
                repository,
                backup,
                self.drivers,
                self.journal,
                self.table,
                self.interruption,
                progress,
                target=target,
                store=store,
                tags=tags,
                timeout_seconds=timeout_seconds,
                options=options,
                accept_loss=accept_loss,
            ).run()

    def verify_boot(
        self,
        repository: Repository,
        backup: str,
        *,
        life_seconds: float = DEFAULT_LIFE_SECONDS,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        options: Mapping[str, str] | None = None,
        progress: ProgressCallback = silent,
    ) -> BootResult:
        """Bring a backup up out of everybody's reach, wait `life_seconds` at most for a sign of life, shut it down in
        order within `timeout_seconds`, and remove it again. Blocks.

        :raises UnknownBackup: there is none of that id
        :raises UsageError: it holds disks alone
        :raises DamageFound: it is damaged
        :raises HypervisorError: it did not come up, showed no life, or did not shut down; nothing is left
        """
        from vmsnap.controller.bootverify import BootVerification
        from vmsnap.repository.reading import reading

        _check_times(life=life_seconds, shutdown=timeout_seconds)
        with self.interruption.handled(), reading(repository, backup, f"verification of {backup}"):
            return BootVerification(
                repository,
                backup,
                self.drivers,
                self.journal,
                self.table,
                self.interruption,
                progress,
                life_seconds=life_seconds,
                timeout_seconds=timeout_seconds,
                options=options,
            ).run()

    def failover(self, vm: str, *, fence: bool = False) -> FailoverResult:
        """Let the duplicate of a VM that is held in memory go on in its place: under its name, on the duplicate's
        disks, its network connected. Blocks until the guest runs.

        :param fence: kill the VM first if it lives
        :raises UnknownVm: not registered
        :raises UnknownDuplicate: none is held
        :raises Busy: the VM lives, or another one has its network address
        :raises VmsnapError: it failed; no failure removes the duplicate
        """
        from vmsnap.controller.failover import Failover, FailoverOrder

        with self.interruption.handled():
            return Failover(FailoverOrder(vm, fence), self.drivers, self.journal, self.table, self.interruption).run()

    # -- duplicates in memory

    def duplicates(self, tell: Callable[[str], None] = silently) -> list[DuplicateInfo]:
        """The duplicates that are held in memory, the oldest first. Those whose time is over are discarded before, and
        what is left of those from before a restart of the host; `tell` is given one line for each.
        """
        with self.interruption.handled():
            self._holding().discard_ended(tell)
        return self._holding().list()

    def discard_duplicate(self, name: str) -> DuplicateInfo:
        """Remove a duplicate that is held in memory, and its disks.

        :raises UnknownDuplicate: there is none of that name
        :raises Busy: an operation works on its VM
        :raises VmsnapError: not all of it could be removed; it stands in the journal
        """
        holding = self._holding()
        held = holding.held.get(name)
        with self.interruption.handled(), vm_lock(self.folders.state_dir, held.vm, "discard of a duplicate"):
            found = [each for each in holding.list() if each.duplicate == name]
            if not found:
                raise UnknownDuplicate(f"duplicate {name!r} is gone meanwhile")
            with self.interruption.deferred():
                holding.discard(held)
            return found[0]

    def _holding(self) -> Holding:
        from vmsnap.controller.holding import Holding

        return Holding(self.drivers, self.journal, self.table)

    def see_the_place(self, repository: Repository, *, accept_unencrypted: bool = False) -> None:
        """See that backups may go into a repository, and remember it.

        :raises RepositoryError: an unencrypted one has taken the place of an encrypted one, and that was not accepted
        """
        known, place = KnownRepositories(self._database), (repository.storage.url, repository.id, repository.encryption)
        if not accept_unencrypted:
            known.expect(*place)
        known.note(*place)

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
        onto: Mapping[str, str] | None = None,
        progress: ProgressCallback = silent,
    ) -> RestoreResult:
        """Make a new VM `name` from a backup, on disks of its own in the folder `target`; stopped unless `run`.

        Blocks. `onto` has addresses of LUNs (``iscsi://PORTAL/IQN/LUN``) by the devices that are written onto them; the
        device "" means the only disk. They exist, nobody uses them, and what they hold is lost. `isolated` cuts its
        network before it runs. `options` are the hypervisor driver's. `accept_loss`: what repair noted as lost is zeros
        in the new VM.

        :raises UnknownBackup: there is none of that id
        :raises AlreadyExists: the name, or a file where a disk is to be, exists
        :raises DamageFound: the backup is damaged, or has lost something and `accept_loss` is not set
        :raises Busy: somebody uses a disk of `onto`; it is unchanged
        """
        from vmsnap.controller.restore import Restore, RestoreOrder
        from vmsnap.repository.reading import reading

        # The session before the manifest is read: what it names is kept from then on.
        with self.interruption.handled(), reading(repository, backup, f"restore of {backup}"):
            return Restore(
                RestoreOrder(backup, name, run, isolated, target, options, accept_loss, onto or {}),
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
            recovered = Recovery(self.drivers, self.journal, self.table).run(vm)
            ended: list[str] = []
            self._holding().discard_ended(ended.append)
            return replace(recovered, removed=(*recovered.removed, *ended))

    def strays(self, tell: Callable[[str], None] = silently) -> list[OwnedResource]:
        """What carries our tag on this host and what its database does not know: it was lost, or put back. Changes
        nothing. `tell` is called with a line for each driver that cannot look now."""
        return self._strays().find(tell)

    def remove_strays(self, names: Sequence[str]) -> list[OwnedResource]:
        """Remove strays, named as `strays` names them; returns those that are gone.

        :raises NotFound: one of them is none; nothing was removed
        :raises VmsnapError: one could not be removed; those before it are gone
        """
        with self.interruption.handled(), self.interruption.deferred():
            return self._strays().remove(names)

    def _strays(self) -> Strays:
        from vmsnap.controller.kept_snapshots import KeptSnapshots
        from vmsnap.controller.strays import Strays

        kept = KeptSnapshots(self.drivers, self.folders.state_dir / KeptSnapshots.FOLDER)
        return Strays(self.drivers, self._database, kept)

    # -- asking

    def doctor(self, vm: str | None = None) -> list[tuple[str, Finding]]:
        """What every installed driver, or those of one VM, say of this host: pairs of driver name and finding."""
        from vmsnap.controller.examination import examine_host, examine_vm

        if vm is None:
            return examine_host(self.folders, self.drivers, self.journal, self.strays())
        return examine_vm(self.table.get(vm), self.drivers)


def _check_times(**seconds: float | None) -> None:
    """:raises UsageError: something is allowed no time, or no end"""
    for what, given in seconds.items():
        if given is not None and not 0 < given < math.inf:
            raise UsageError(f"the {what} must be allowed more than 0 seconds, and an end")
