"""Backup, mode consistent: the duplicate is run on disks of its own, out of everybody's reach, and shut down in order;
its disks are the backup.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmsnap.controller.backup import BackupOrder, LiveBackup
from vmsnap.controller.clones import Clones
from vmsnap.controller.execution import Action
from vmsnap.controller.previous import Previous
from vmsnap.controller.reach import rows_of
from vmsnap.controller.running import RunningDuplicate
from vmsnap.controller.storing import Storing
from vmsnap.errors import HypervisorError, ProtocolError
from vmsnap.model import Moment
from vmsnap.protocol import BACKUP_CONSISTENT, BACKUP_CONSISTENT_FROZEN, Compensation, Condition, Instruction
from vmsnap.roles import LoadRequest


@dataclass(frozen=True)
class ConsistentOrder(BackupOrder):
    """`timeout_seconds`: how long the guest may take to shut down. `keep_live`: store what was captured live where it
    does not, instead of failing.
    """

    timeout_seconds: float = 300.0
    keep_live: bool = False


class ConsistentBackup(LiveBackup):
    """One backup in mode consistent: the actions and compensations of the protocol `BACKUP_CONSISTENT`, or
    `BACKUP_CONSISTENT_FROZEN`.

    It begins as a live one. The working VM is not asked for anything once it runs again, but which disks it has.
    """

    protocols = (BACKUP_CONSISTENT, BACKUP_CONSISTENT_FROZEN)
    _order: ConsistentOrder
    _clones: Clones | None = None
    _running: RunningDuplicate | None = None
    _ended: Moment | None = None
    _remark = ""

    def _actions(self) -> dict[Instruction, Action]:
        return {
            **super()._actions(),
            Instruction.LOAD: self._load,
            Instruction.SWITCH_DISKS: lambda: self._duplicate().switch_disks(),
            Instruction.CUT_NETWORK: lambda: self._duplicate().cut_network(),
            Instruction.RESUME_DUPLICATE: lambda: self._duplicate().resume(),
            Instruction.AWAIT_EXECUTING: lambda: self._duplicate().await_executing(),
            Instruction.SHUT_DOWN: self._shut_down,
            Instruction.AWAIT_STOPPED: self._await_stopped,
        }

    def _compensations(self) -> dict[Compensation, Action]:
        return {**super()._compensations(), Compensation.DESTROY_LOADED: self._destroy}

    def _holds(self, condition: Condition) -> bool:
        if condition is Condition.ENDED:
            return not self._remark
        return super()._holds(condition)

    def _needs_clones(self) -> bool:
        return True

    def _close(self) -> None:
        if self._running is not None:
            self._running.close()
        super()._close()

    def _duplicate(self) -> RunningDuplicate:
        if self._running is None:
            raise ProtocolError("the duplicate was not loaded")
        return self._running

    # -- instructions

    def _load(self) -> None:
        duplicate, capture = self._finish_copy(), self._capture
        # A name of their own: the lasting ones of a duplicate that is held afterwards have the duplicate's.
        name = f"run-{capture.duplicate_name.removeprefix('bk-')}"
        folder = self._drivers.context.folder_of_duplicate(name)
        clones = self._clones = Clones(name, folder, self._operation, capture.mechanisms)
        clones.make(capture.snapshots, lasting=False)
        self._running = RunningDuplicate(
            capture.duplicate_name,
            capture.row.hypervisor,
            capture.hypervisor.duplicate_options(),
            self._operation,
            self._drivers,
            self._table,
            {capture.row.vm: capture.hypervisor},
        )
        self._bars.show("the duplicate runs", 0, None)
        self._running.load(
            LoadRequest(
                definition=capture.description.definition,
                images=duplicate.images,
                device_state=duplicate.device_state,
                disks=clones.disks,
                isolated=True,
                details=duplicate.details,
            )
        )
        self._enter_duplicate(rows_of(clones.disks), "stopped")

    def _shut_down(self) -> None:
        self._bars.show("the duplicate shuts down", 0, None)
        try:
            self._duplicate().shut_down(self._order.timeout_seconds)
        except HypervisorError as e:
            if not self._order.keep_live:
                raise
            self._remark = f"not consistent but live: {e.message}"
            self._warnings.append(self._remark)

    def _await_stopped(self) -> None:
        self._duplicate().await_stopped()
        self._ended = Moment.now("duplicate ended")

    def _store(self) -> str:
        # Nobody may have the disks open while they are read.
        self._duplicate().destroy()
        if self._remark:
            self._store_live(self._remark)
        else:
            self._store_disks()
        return self._told_of_store()

    def _store_disks(self) -> None:
        capture, clones = self._capture, self._clones
        if clones is None or self._ended is None:
            raise ProtocolError("the duplicate did not end")
        self._bars.begin("storing", sum(disk.size_bytes for disk in clones.disks))
        with self._repository.writer(purpose=f"backup of {capture.row.vm}") as writer:
            storing = Storing(writer, Previous(self._repository.latest(capture.row.vm)), self._bars)
            disks = tuple(
                storing.disk(
                    snapshot.disk,
                    snapshot.plan.mechanism,
                    clones.reader(made),
                    storing.previous.disk_content(snapshot.disk.device),
                )
                for snapshot, made in clones.made
            )
            fields = self._fields("consistent", disks)
            fields = replace(fields, moments=(*fields.moments, self._ended))
            self._manifest = writer.commit(
                fields, seconds=time.monotonic() - self._begun, instant_ns=capture.duplicate.instant.wall_ns
            )
            self._warnings += writer.warnings

    def _to_release(self) -> Sequence[Action]:
        return (self._destroy, self._remove_clones, *super()._to_release())

    # -- compensations

    def _destroy(self) -> None:
        if self._running is not None:
            self._running.destroy()

    def _remove_clones(self) -> None:
        if self._clones is not None:
            self._clones.delete()

    def _remove_disks(self) -> None:
        self._remove_clones()
        super()._remove_disks()
