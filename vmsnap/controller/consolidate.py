"""Consolidate: from a live backup to disks as they are after an orderly shutdown, and to a consistent backup."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vmsnap.controller.cleanrun import CleanRun
from vmsnap.controller.execution import Action
from vmsnap.controller.previous import Previous
from vmsnap.controller.reach import rows_of
from vmsnap.controller.results import ConsolidateResult
from vmsnap.controller.retrieval import disk_paths
from vmsnap.controller.storing import Storing, stored_text
from vmsnap.errors import AlreadyExists
from vmsnap.model import SCHEDULE_TAG, Disk, Moment
from vmsnap.protocol import CONSOLIDATE, Condition, Instruction
from vmsnap.repository import BackupFields, Manifest, SparseFileReader


class Consolidate(CleanRun):
    """One consolidation into the folder `target`: the actions and compensations of the protocol `CONSOLIDATE`."""

    protocol = CONSOLIDATE

    def __init__(self, *arguments: Any, target: Path, store: bool, tags: Sequence[str] = (), **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._target = target
        self._store_them = store
        self._tags = tuple(tags)
        self._disks: tuple[Disk, ...] = ()
        self._ended: Moment | None = None
        self._made: Manifest | None = None

    def run(self) -> ConsolidateResult:
        """Carry it out. Blocks until the guest has shut down, and the disks are stored if that was asked for.

        :raises AlreadyExists: a file where a disk is to be exists
        :raises VmsnapError: it failed; nothing of it is left
        """
        begun = time.monotonic()
        for path in disk_paths(self._manifest, self._target).values():
            if path.exists() or path.is_symlink():
                raise AlreadyExists(f"{path} exists and is not overwritten", cure="choose another --target")
        try:
            self._carry_out("cs", self._target)
        except BaseException as error:
            if self._made is not None:
                error.add_note(f"the backup {self._made.backup} is stored all the same")
            raise
        return ConsolidateResult(
            disks=rows_of(self._disks),
            seconds=time.monotonic() - begun,
            source=self._manifest.backup,
            backup=self._made.backup if self._made else "",
            stored_bytes=self._made.stats.stored_bytes if self._made else 0,
            warnings=tuple(self._warnings),
        )

    def _actions(self) -> dict[Instruction, Action]:
        stop: Callable[[], object] = self._running.await_stopped

        def await_stopped() -> None:
            stop()
            self._ended = Moment.now("duplicate ended")
            # Nobody may have the disks open while they are read.
            self._running.destroy()

        return {
            **super()._actions(),
            Instruction.AWAIT_STOPPED: await_stopped,
            Instruction.STORE: self._store,
            Instruction.NOTIFY: self._hand_over,
        }

    def _holds(self, condition: Condition) -> bool:
        return self._store_them if condition is Condition.STORE else super()._holds(condition)

    def _store(self) -> str:
        manifest, begun = self._manifest, time.monotonic()
        self._bars.begin("storing", sum(disk.size_bytes for disk in manifest.disks))
        paths = disk_paths(manifest, self._target)
        with self._repository.writer(purpose=f"consolidation of {manifest.backup}") as writer:
            storing = Storing(writer, Previous(manifest), self._bars)
            disks = tuple(
                storing.disk(
                    Disk(old.device, old.address, old.size_bytes, old.format),
                    old.mechanism,
                    SparseFileReader(paths[old.device], old.size_bytes),
                    storing.previous.disk_content(old.device),
                )
                for old in manifest.disks
            )
            fields = BackupFields(
                vm=manifest.vm,
                hypervisor=manifest.hypervisor,
                hypervisor_version=manifest.hypervisor_version,
                mode="consistent",
                capture=manifest.capture,
                pause_seconds=manifest.pause_seconds,
                moments=(*manifest.moments, *([self._ended] if self._ended else [])),
                resume_flag=manifest.resume_flag,
                definition=manifest.definition,
                disks=disks,
                read_only_disks=manifest.read_only_disks,
                # A schedule counts, and removes, what bears its tag: this is none of its backups.
                tags=self._tags or tuple(tag for tag in manifest.tags if not tag.startswith(SCHEDULE_TAG)),
                remarks=self._remarks(),
            )
            instant_ns = int(datetime.fromisoformat(manifest.time).timestamp()) * 10**9
            self._made = writer.commit(fields, seconds=time.monotonic() - begun, instant_ns=instant_ns)
            self._warnings += writer.warnings
        return stored_text(self._made)

    def _remarks(self) -> tuple[str, ...]:
        lost = [
            f"{lost.length} bytes of {lost.part} at {lost.offset} were lost, zeros in their place"
            for lost in self._manifest.lost
        ]
        return (f"consolidated from {self._manifest.backup}", *lost)

    def _hand_over(self) -> None:
        """From here on the disks are the user's."""
        self._disks = self._running.disks
        self._retrieval.keep_disks()
