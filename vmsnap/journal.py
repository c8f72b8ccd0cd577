"""The write-ahead journal: what vmsnap is about to do stands here before it does it.

An operation is one run of a protocol. Its entries say which instructions were begun and how they ended, its resources
name everything that it makes outside of vmsnap, with all that is needed to remove it. Every write is durable before the
call returns, but for the pause window: there nothing is written, since an fsync can take longer than the whole
pause. Its instructions are entered as begun before it opens, and their ends after it has closed
(`Operation.open_window`).
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vmsnap.database import Database
from vmsnap.host import boot_id, process_start
from vmsnap.vmtable import VmRow, insert_row

_OPERATION_PREFIX = "vmsnap-"
_DUPLICATE_PREFIX = "bk-"


@dataclass(frozen=True)
class Entry:
    """One instruction of an operation. `status`: ``begun``, ``done``, ``passed over``, ``failed`` or ``not
    reached``.
    """

    instruction: str
    status: str
    begun_ns: int
    ended_ns: int | None
    message: str


@dataclass(frozen=True)
class Deed:
    """What was done for an operation beside its instructions, to set it right: by its own process after a failure, by a
    guardian, by a recovery. Entered when it is over, since the guest comes before the journal.
    """

    name: str
    status: str
    message: str
    begun_ns: int
    ended_ns: int

    @classmethod
    def now(cls, name: str, message: str, status: str = "done") -> Deed:
        """One that took no time worth telling."""
        now = time.time_ns()
        return cls(name, status, message, now, now)


@dataclass(frozen=True)
class Resource:
    """Something an operation makes outside of vmsnap. `data` (JSON text) is enough to remove it."""

    position: int
    kind: str
    driver: str
    data: str
    gone: bool


@dataclass(frozen=True)
class OperationRow:
    """One run of a protocol as the journal has it."""

    operation: str
    protocol: str
    vm: str
    hypervisor: str
    options: Mapping[str, str]
    executing: bool
    boot_id: str
    pid: int
    process_start: int
    begun_ns: int
    ended_ns: int | None
    outcome: str | None
    backup: str
    """That it has stored or uses; empty where there is none, or none yet."""

    def worker_alive(self) -> bool:
        """Whether the process that ran it still does."""
        return self.boot_id == boot_id() and process_start(self.pid) == self.process_start


_NEW_ENTRY = "INSERT INTO entry SELECT ?, coalesce(max(position) + 1, 0), ?, ?, ?, ?, ? FROM entry WHERE operation = ?"

KEPT_SECONDS = 90 * 86400
"""How long an operation that ended and left nothing stays in the journal."""


class Journal:
    """All operations of this host; those that ended long ago are forgotten when a new one begins."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(
        self, protocol: str, vm: str, hypervisor: str, options: Mapping[str, str], *, backup: str = ""
    ) -> Operation:
        """Enter a new operation of this process, and return it; `backup` is the one that it uses."""
        with self._database.transaction() as db:
            db.execute(
                "DELETE FROM operation WHERE ended_ns < ? AND NOT EXISTS"
                " (SELECT 1 FROM resource WHERE resource.operation = operation.operation AND gone = 0)",
                (time.time_ns() - KEPT_SECONDS * 10**9,),
            )
            name = insert_operation(db, protocol, vm, hypervisor, options, backup)
        return Operation(self._database, name)

    def open_operation(self, operation: str) -> Operation:
        """An operation that stands in the journal, to be recovered."""
        return Operation(self._database, operation)

    def unfinished(self, vm: str | None = None) -> list[OperationRow]:
        """The operations that have not ended, or ended with something left or a VM that must execute again, oldest
        first; of one VM or of all."""
        return [
            row
            for row in self._select(
                "WHERE outcome IS NULL OR executing = 1 OR EXISTS"
                " (SELECT 1 FROM resource WHERE resource.operation = operation.operation AND gone = 0)"
            )
            if vm is None or row.vm == vm
        ]

    def operations(self, vm: str | None = None, *, since_ns: int = 0) -> list[OperationRow]:
        """All operations that began at `since_ns` (nanoseconds since 1970) or later, oldest first; of one VM or of
        all."""
        return [row for row in self._select("") if row.begun_ns >= since_ns and vm in (None, row.vm)]

    def _select(self, where: str) -> list[OperationRow]:
        return [
            OperationRow(
                operation=row["operation"],
                protocol=row["protocol"],
                vm=row["vm"],
                hypervisor=row["hypervisor"],
                options=json.loads(row["options"]),
                executing=bool(row["executing"]),
                boot_id=row["boot_id"],
                pid=row["pid"],
                process_start=row["process_start"],
                begun_ns=row["begun_ns"],
                ended_ns=row["ended_ns"],
                outcome=row["outcome"],
                backup=row["backup"],
            )
            for row in self._database.rows(f"SELECT * FROM operation {where} ORDER BY begun_ns, operation")
        ]


class Operation:
    """One operation, by the process that carries it out or recovers it."""

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self.name = name
        self._buffered: list[tuple[str, int, str, int, str]] | None = None
        self._begun_ns = 0
        self._backup = ""

    # -- instructions

    def begun(self, instruction: str) -> None:
        """Enter that `instruction` is about to be carried out; inside an open window it stands there already."""
        self._begun_ns = time.time_ns()
        if self._buffered is None:
            with self._database.transaction() as db:
                db.execute(_NEW_ENTRY, (self.name, instruction, "begun", self._begun_ns, None, "", self.name))

    def ended(self, instruction: str, status: str, message: str = "") -> None:
        """Enter how `instruction` ended: ``done``, ``passed over`` or ``failed``."""
        change = (status, time.time_ns(), message, self._begun_ns, instruction)
        if self._buffered is None:
            self._write_ends([change])
        else:
            self._buffered.append(change)

    def has_stored(self, backup: str) -> None:
        """Remember which backup it has made; entered with the next end of an instruction."""
        self._backup = backup

    def open_window(self, instructions: Iterable[str], vm: str, *, executing: bool) -> None:
        """Enter, in one transaction, that the guest may stand still from now on: all `instructions` as begun and, where
        the VM was `executing`, its state := stopped and resume_flag := 1. Until `close_window` nothing is written."""
        now = time.time_ns()
        with self._database.transaction() as db:
            for instruction in instructions:
                db.execute(_NEW_ENTRY, (self.name, instruction, "begun", now, None, "", self.name))
            if executing:
                db.execute("UPDATE vm SET state = 'stopped', resume_flag = 1, changed_ns = ? WHERE vm = ?", (now, vm))
        self._buffered = []

    def close_window(self) -> None:
        """Write what ended inside the window, and which of its instructions were not reached. Does nothing where
        none is open.
        """
        ends, self._buffered = self._buffered, None
        if ends is not None:
            self._write_ends(ends)
            with self._database.transaction() as db:
                db.execute(
                    "UPDATE entry SET status = 'not reached' WHERE status = 'begun' AND operation = ?", (self.name,)
                )

    def _write_ends(self, ends: Iterable[tuple[str, int, str, int, str]]) -> None:
        # An end that a power cut has taken is as one that was not reached: recovery looks at what is there.
        with self._database.transaction(durable=False) as db:
            db.executemany(
                "UPDATE entry SET status = ?, ended_ns = ?, message = ?, begun_ns = ?"
                " WHERE instruction = ? AND status = 'begun' AND operation = ?",
                [(*end, self.name) for end in ends],
            )
            if self._backup:
                db.execute("UPDATE operation SET backup = ? WHERE operation = ?", (self._backup, self.name))

    def did(self, *deeds: Deed) -> None:
        """Enter what was done to set it right, behind its instructions."""
        if deeds:
            with self._database.transaction() as db:
                for deed in deeds:
                    values = (deed.name, deed.status, deed.begun_ns, deed.ended_ns, deed.message)
                    db.execute(_NEW_ENTRY, (self.name, *values, self.name))

    def entries(self) -> list[Entry]:
        """The instructions in order, and then what was done to set things right."""
        return [
            Entry(row["instruction"], row["status"], row["begun_ns"], row["ended_ns"], row["message"])
            for row in self._database.rows("SELECT * FROM entry WHERE operation = ? ORDER BY position", self.name)
        ]

    # -- what it makes

    def will_make(self, kind: str, driver: str, data: str) -> int:
        """Enter something that is about to be made; returns its position for `is_gone`."""
        with self._database.transaction() as db:
            return insert_resource(db, self.name, kind, driver, data)

    def owns(self, position: int) -> bool:
        """Whether a resource is still ours to remove, as far as the journal knows."""
        query = "SELECT gone FROM resource WHERE operation = ? AND position = ?"
        return any(not row["gone"] for row in self._database.rows(query, self.name, position))

    def is_gone(self, position: int) -> None:
        """Enter that a resource is no longer there, or no longer ours to remove. Idempotent."""
        with self._database.transaction() as db:
            db.execute("UPDATE resource SET gone = 1 WHERE operation = ? AND position = ?", (self.name, position))

    def are_gone(self, positions: Iterable[int]) -> None:
        """The same for several, all or none."""
        with self._database.transaction() as db:
            db.executemany(
                "UPDATE resource SET gone = 1 WHERE operation = ? AND position = ?",
                [(self.name, position) for position in positions],
            )

    def hand_to_user(self, row: VmRow) -> None:
        """Enter the VM that was made into the VM table, and that nothing of it is ours to remove any more: in one
        transaction, since a recovery in between would remove a VM that the user was given.

        :raises AlreadyExists: the name is taken
        """
        with self._database.transaction() as db:
            insert_row(db, row)
            db.execute("UPDATE resource SET gone = 1 WHERE operation = ?", (self.name,))

    def resources(self) -> list[Resource]:
        """What has not been removed yet, in the order in which it was made."""
        return [
            Resource(row["position"], row["kind"], row["driver"], row["data"], bool(row["gone"]))
            for row in self._database.rows(
                "SELECT * FROM resource WHERE operation = ? AND gone = 0 ORDER BY position", self.name
            )
        ]

    # -- the whole

    def must_execute(self, executing: bool) -> None:
        """Enter whether it is for this operation to see to it that the VM executes, whatever happens."""
        with self._database.transaction() as db:
            db.execute("UPDATE operation SET executing = ? WHERE operation = ?", (int(executing), self.name))

    def end(self, outcome: str) -> None:
        """Enter how the operation ended: ``done``, ``failed`` or ``recovered``."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE operation SET outcome = ?, ended_ns = ? WHERE operation = ?",
                (outcome, time.time_ns(), self.name),
            )


def duplicate_name_of(operation: str) -> str:
    """What the duplicate is called that an operation captures."""
    return _DUPLICATE_PREFIX + operation.removeprefix(_OPERATION_PREFIX)


def is_duplicate_name(vm: str) -> bool:
    """Whether `duplicate_name_of` may have given that name."""
    return vm.startswith(_DUPLICATE_PREFIX)


def insert_operation(
    db: sqlite3.Connection, protocol: str, vm: str, hypervisor: str, options: Mapping[str, str], backup: str = ""
) -> str:
    """Enter a new operation of this process inside a transaction; returns its name."""
    name = _OPERATION_PREFIX + secrets.token_hex(5)
    pid = os.getpid()
    db.execute(
        "INSERT INTO operation VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?, NULL, NULL, ?)",
        (
            name,
            protocol,
            vm,
            hypervisor,
            json.dumps(dict(options), sort_keys=True),
            boot_id(),
            pid,
            process_start(pid) or 0,
            time.time_ns(),
            backup,
        ),
    )
    return name


def insert_resource(db: sqlite3.Connection, operation: str, kind: str, driver: str, data: str) -> int:
    """Enter something that is about to be made, or to be removed, inside a transaction; returns its position."""
    row = db.execute(
        "INSERT INTO resource SELECT ?, coalesce(max(position) + 1, 0), ?, ?, ?, 0"
        " FROM resource WHERE operation = ? RETURNING position",
        (operation, kind, driver, data, operation),
    ).fetchone()
    return int(row[0])
