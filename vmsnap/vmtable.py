"""The VM management table: VM id, state, resume flag, virtual disk identifiers and physical disk addresses.

Working VMs and their duplicates have rows alike, so that one look shows who owns which disk.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmsnap.database import Database
from vmsnap.errors import AlreadyExists, UnknownVm


@dataclass(frozen=True)
class DiskRow:
    """One disk in the table: its device, its address, and the mechanism that snapshots it (None: it is not backed
    up).
    """

    device: str
    address: str
    mechanism: str | None = None


@dataclass(frozen=True)
class VmRow:
    """One VM in the table. `kind` is ``working`` or ``duplicate``, `duplicate_of` the VM a duplicate was made of."""

    vm: str
    hypervisor: str
    options: Mapping[str, str]
    disks: tuple[DiskRow, ...]
    state: str = "unknown"
    resume_flag: bool = False
    kind: str = "working"
    duplicate_of: str | None = None


class VmTable:
    """The table, in the host's database. Each change is one durable transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def database(self) -> Database:
        """Where it lies."""
        return self._database

    def add(self, row: VmRow) -> None:
        """Enter a VM.

        :raises AlreadyExists: the name is taken
        """
        with self._database.transaction() as db:
            insert_row(db, row)

    def get(self, vm: str) -> VmRow:
        """The row of `vm`.

        :raises UnknownVm: it is not registered
        """
        found = self._select("WHERE vm = ?", vm)
        if not found:
            raise UnknownVm(f"no VM named {vm!r} is registered", cure="see: vmsnap vm list")
        return found[0]

    def rows(self) -> list[VmRow]:
        """All rows, by name."""
        return self._select("")

    def remove(self, vm: str) -> None:
        """Strike out the row of `vm` and its disks; nothing but the row. Idempotent."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM vm WHERE vm = ?", (vm,))

    def set_state(self, vm: str, state: str, *, resume_flag: bool | None = None) -> None:
        """Enter what is known of the VM now; does nothing for a VM that is not registered."""
        with self._database.transaction() as db:
            db.execute("UPDATE vm SET state = ?, changed_ns = ? WHERE vm = ?", (state, time.time_ns(), vm))
            if resume_flag is not None:
                db.execute("UPDATE vm SET resume_flag = ? WHERE vm = ?", (int(resume_flag), vm))

    def set_disks(self, vm: str, disks: Sequence[DiskRow]) -> None:
        """Replace the disks of a VM."""
        with self._database.transaction() as db:
            replace_disks(db, vm, disks)

    def _select(self, where: str, *values: object) -> list[VmRow]:
        disks: dict[str, list[DiskRow]] = {}
        for row in self._database.rows("SELECT * FROM disk ORDER BY vm, position"):
            disks.setdefault(row["vm"], []).append(DiskRow(row["device"], row["address"], row["mechanism"]))
        return [
            VmRow(
                vm=row["vm"],
                hypervisor=row["hypervisor"],
                options=json.loads(row["options"]),
                disks=tuple(disks.get(row["vm"], ())),
                state=row["state"],
                resume_flag=bool(row["resume_flag"]),
                kind=row["kind"],
                duplicate_of=row["duplicate_of"],
            )
            for row in self._database.rows(f"SELECT * FROM vm {where} ORDER BY vm", *values)
        ]


def _disk_values(vm: str, disks: Sequence[DiskRow]) -> list[tuple[str, int, str, str, str | None]]:
    return [(vm, position, disk.device, disk.address, disk.mechanism) for position, disk in enumerate(disks)]


def replace_disks(db: sqlite3.Connection, vm: str, disks: Sequence[DiskRow]) -> None:
    """Replace the disks of a VM inside a transaction."""
    db.execute("DELETE FROM disk WHERE vm = ?", (vm,))
    db.executemany("INSERT INTO disk VALUES (?, ?, ?, ?, ?)", _disk_values(vm, disks))


def insert_row(db: sqlite3.Connection, row: VmRow) -> None:
    """Enter a VM inside a transaction.

    :raises AlreadyExists: the name is taken
    """
    if db.execute("SELECT 1 FROM vm WHERE vm = ?", (row.vm,)).fetchone():
        raise AlreadyExists(
            f"a VM named {row.vm!r} is already registered", cure="choose another name, or: vmsnap vm remove"
        )
    options = json.dumps(dict(row.options), sort_keys=True)
    db.execute(
        "INSERT INTO vm VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.vm,
            row.kind,
            row.hypervisor,
            options,
            row.state,
            int(row.resume_flag),
            row.duplicate_of,
            time.time_ns(),
        ),
    )
    db.executemany("INSERT INTO disk VALUES (?, ?, ?, ?, ?)", _disk_values(row.vm, row.disks))
