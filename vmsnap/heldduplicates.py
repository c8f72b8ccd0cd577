"""The duplicates that are held in host memory after their backup, ready to take their VM's place.

Each has a row in the VM table, of the kind ``duplicate``, beside that of its VM; what is needed to run it or to remove
it stands in a table of its own. Whatever passes from an operation to the user or back does so in one transaction: at
every moment either the journal or this table knows who removes it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmsnap.database import Database
from vmsnap.errors import UnknownDuplicate
from vmsnap.host import boot_id
from vmsnap.journal import insert_operation, insert_resource
from vmsnap.model import ClonePlan, Disk, Duplicate, Json, from_json, to_json
from vmsnap.vmtable import DiskRow, VmRow, insert_row, replace_disks

HELD = "held"
"""State of a duplicate that can take its VM's place."""
SPENT = "spent"
"""State of one that has run and failed: its disks are no longer of its memory's instant."""
DISCARD = "discard of a duplicate"
"""The protocol's name in the journal."""


@dataclass(frozen=True)
class HeldDisk:
    """One lasting disk of a held duplicate."""

    plan: ClonePlan
    disk: Disk


@dataclass(frozen=True)
class HeldDuplicate:
    """One held duplicate: what is needed to run it, to show it and to remove it.

    `options` are those of its VM, `definition` and `memory_bytes` what its hypervisor said of it at the capture. The
    images in `capture` are in memory: with another `boot` they are gone.
    """

    name: str
    vm: str
    hypervisor: str
    options: Mapping[str, str]
    backup: str
    definition: Json
    capture: Duplicate
    disks: tuple[HeldDisk, ...]
    folder: Path
    memory_bytes: int
    held_ns: int
    boot: str
    expires_ns: int | None = None

    @property
    def in_memory(self) -> bool:
        """Whether this host has not been restarted since."""
        return self.boot == boot_id()

    def expired(self, now_ns: int) -> bool:
        """Whether its time is over."""
        return self.expires_ns is not None and self.expires_ns <= now_ns

    def used_bytes(self) -> int:
        """What its images take in memory now: blocks, not sizes."""
        total = 0
        for path in (self.capture.device_state, *(image.path for image in self.capture.images)):
            try:
                total += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue
        return total


class HeldDuplicates:
    """All of them, in the host's database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self, vm: str | None = None) -> list[HeldDuplicate]:
        """Every held duplicate, or those of one VM, the newest last."""
        found = [from_json(row["data"], HeldDuplicate) for row in self._database.rows("SELECT data FROM held")]
        return sorted((each for each in found if vm in (None, each.vm)), key=lambda each: each.held_ns)

    def get(self, name: str) -> HeldDuplicate:
        """The held duplicate of that name.

        :raises UnknownDuplicate: there is none
        """
        for held in self.all():
            if held.name == name:
                return held
        raise UnknownDuplicate(f"no duplicate named {name!r} is held in memory", cure="see: vmsnap duplicate list")

    def is_held(self, name: str) -> bool:
        """Whether there is one of that name."""
        return bool(self._database.rows("SELECT 1 FROM held WHERE duplicate = ?", name))

    def hold(self, held: HeldDuplicate, operation: str, positions: Sequence[int]) -> None:
        """Enter a duplicate that `operation` made; what stands in its journal at `positions` is no longer its to
        remove. One transaction, since a recovery in between would remove a duplicate that is promised.
        """
        row = VmRow(
            vm=held.name,
            hypervisor=held.hypervisor,
            options={},
            disks=tuple(DiskRow(each.disk.device, each.disk.address) for each in held.disks),
            state=HELD,
            kind="duplicate",
            duplicate_of=held.vm,
        )
        with self._database.transaction() as db:
            db.execute("DELETE FROM vm WHERE vm = ?", (held.name,))
            insert_row(db, row)
            db.execute("INSERT INTO held VALUES (?, ?, ?)", (held.name, held.vm, to_json(held)))
            db.executemany(
                "UPDATE resource SET gone = 1 WHERE operation = ? AND position = ?",
                [(operation, position) for position in positions],
            )

    def give_up(self, held: HeldDuplicate) -> str:
        """Strike a duplicate out, and enter all of it as something to be removed; returns the operation that stands for
        that in the journal."""
        with self._database.transaction() as db:
            operation = insert_operation(db, DISCARD, held.vm, held.hypervisor, held.options, held.backup)
            insert_resource(db, operation, "file", "", to_json(str(held.folder)))
            for each in held.disks:
                insert_resource(db, operation, "clone", each.plan.mechanism, to_json(each.plan))
            insert_resource(db, operation, "duplicate", held.hypervisor, to_json(held.name))
            db.execute("UPDATE operation SET outcome = 'done' WHERE operation = ?", (operation,))
            db.execute("DELETE FROM vm WHERE vm = ?", (held.name,))
        return operation

    def take_place(self, held: HeldDuplicate, disks: Sequence[Disk], state: str, operation: str) -> int:
        """Enter that the duplicate runs in its VM's place, on its own `disks`: they are the VM's now, no strays while
        it has them, and nothing that `operation` made is to be removed but the images, whose position in the journal is
        returned.
        """
        with self._database.transaction() as db:
            db.execute("DELETE FROM vm WHERE vm = ?", (held.name,))
            db.execute(
                "UPDATE vm SET state = ?, resume_flag = 0, changed_ns = ? WHERE vm = ?",
                (state, time.time_ns(), held.vm),
            )
            replace_disks(db, held.vm, [DiskRow(disk.device, disk.address) for disk in disks])
            plans = {each.disk.device: each.plan for each in held.disks}
            db.executemany(
                "INSERT OR REPLACE INTO own_disk VALUES (?, ?)",
                [(disk.address, to_json(plans[disk.device])) for disk in disks if disk.device in plans],
            )
            db.execute("UPDATE resource SET gone = 1 WHERE operation = ?", (operation,))
            return insert_resource(db, operation, "duplicate", held.hypervisor, to_json(held.name))

    def spend(self, held: HeldDuplicate, operation: str) -> None:
        """Enter that the duplicate has run in its VM's place and is dead: it and its disks stay, to be looked at."""
        with self._database.transaction() as db:
            _set_state(db, held.name, SPENT)
            _set_state(db, held.vm, "absent")
            db.execute("UPDATE resource SET gone = 1 WHERE operation = ?", (operation,))

    def spent(self, name: str) -> bool:
        """Whether a duplicate has run and failed."""
        return bool(self._database.rows("SELECT 1 FROM vm WHERE vm = ? AND state = ?", name, SPENT))


def _set_state(db: sqlite3.Connection, vm: str, state: str) -> None:
    db.execute("UPDATE vm SET state = ?, resume_flag = 0, changed_ns = ? WHERE vm = ?", (state, time.time_ns(), vm))
