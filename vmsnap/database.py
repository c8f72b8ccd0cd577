"""The SQLite database of a host: the VM table, the journal, the known repositories and what the agent keeps, in one
file, in WAL mode, shared by all vmsnap processes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsnap import counters
from vmsnap.errors import VmsnapError

FILE_NAME = "vmsnap.db"
"""What it is called in the state folder."""
SCHEMA_VERSION = 7

_SCHEMA = """
CREATE TABLE vm (
    vm            TEXT PRIMARY KEY,           -- VM id
    kind          TEXT NOT NULL,              -- 'working' or 'duplicate'
    hypervisor    TEXT NOT NULL,
    options       TEXT NOT NULL,              -- JSON
    state         TEXT NOT NULL,
    resume_flag   INTEGER NOT NULL DEFAULT 0,
    duplicate_of  TEXT,
    changed_ns    INTEGER NOT NULL
) STRICT;
CREATE TABLE disk (
    vm            TEXT NOT NULL REFERENCES vm ON DELETE CASCADE ON UPDATE CASCADE,
    position      INTEGER NOT NULL,
    device        TEXT NOT NULL,              -- virtual disk identifier
    address       TEXT NOT NULL,              -- physical disk address
    mechanism     TEXT,
    PRIMARY KEY (vm, position)
) STRICT;
CREATE TABLE operation (
    operation     TEXT PRIMARY KEY,
    protocol      TEXT NOT NULL,
    vm            TEXT NOT NULL,
    hypervisor    TEXT NOT NULL,
    options       TEXT NOT NULL,              -- JSON
    executing     INTEGER NOT NULL DEFAULT 0, -- the VM was executing: it must execute again
    boot_id       TEXT NOT NULL,
    pid           INTEGER NOT NULL,
    process_start INTEGER NOT NULL,
    begun_ns      INTEGER NOT NULL,
    ended_ns      INTEGER,
    outcome       TEXT                        -- 'done', 'failed', 'recovered'
) STRICT;
CREATE TABLE entry (
    operation     TEXT NOT NULL REFERENCES operation ON DELETE CASCADE,
    position      INTEGER NOT NULL,
    instruction   TEXT NOT NULL,
    status        TEXT NOT NULL,              -- 'begun', 'done', 'passed over', 'failed', 'not reached'
    begun_ns      INTEGER NOT NULL,
    ended_ns      INTEGER,
    message       TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (operation, position)
) STRICT;
CREATE TABLE resource (
    operation     TEXT NOT NULL REFERENCES operation ON DELETE CASCADE,
    position      INTEGER NOT NULL,
    kind          TEXT NOT NULL,              -- 'snapshot', 'freeze', 'duplicate', 'clone', 'loaded', 'takeover',
                                              -- 'file'
    driver        TEXT NOT NULL,
    data          TEXT NOT NULL,              -- JSON: all that is needed to remove it
    gone          INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (operation, position)
) STRICT;
"""
_SINCE_VERSION_2 = """
CREATE TABLE repository (
    url           TEXT PRIMARY KEY,
    id            TEXT NOT NULL,
    encryption    TEXT NOT NULL               -- when this host last stored a backup there
) STRICT
"""
_SINCE_VERSION_3 = """
CREATE TABLE held (
    duplicate     TEXT PRIMARY KEY REFERENCES vm ON DELETE CASCADE ON UPDATE CASCADE,
    vm            TEXT NOT NULL,
    data          TEXT NOT NULL               -- JSON: a HeldDuplicate
) STRICT
"""
_SINCE_VERSION_4 = """
CREATE TABLE schedule (
    schedule      TEXT PRIMARY KEY,
    data          TEXT NOT NULL               -- JSON: a Schedule
) STRICT;
CREATE TABLE schedule_state (
    schedule      TEXT PRIMARY KEY,           -- those of the configuration file have one too
    decided_ns    INTEGER NOT NULL,           -- slots up to here have been looked at
    paused        INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE job (
    job           INTEGER PRIMARY KEY AUTOINCREMENT,
    verb          TEXT NOT NULL,
    arguments     TEXT NOT NULL,              -- JSON: the command line's
    vm            TEXT NOT NULL,
    repository    TEXT NOT NULL,
    schedule      TEXT NOT NULL,
    slot_ns       INTEGER,
    attempt       INTEGER NOT NULL,
    not_before_ns INTEGER NOT NULL,
    requester     TEXT NOT NULL,
    key           TEXT UNIQUE,                -- a request asked twice
    state         TEXT NOT NULL,
    created_ns    INTEGER NOT NULL,
    begun_ns      INTEGER,
    ended_ns      INTEGER,
    exit_code     INTEGER,
    message       TEXT NOT NULL DEFAULT '',
    result        TEXT NOT NULL DEFAULT '',   -- JSON: what the command reported
    pid           INTEGER,
    process_start INTEGER,
    boot_id       TEXT NOT NULL DEFAULT '',
    settled       INTEGER NOT NULL DEFAULT 0  -- what follows from its end has been entered
) STRICT;
CREATE INDEX job_by_state ON job (state, job);
CREATE INDEX job_by_vm ON job (vm, job);
CREATE INDEX job_by_verb ON job (verb, state, vm, ended_ns);
CREATE INDEX job_by_end ON job (ended_ns);
CREATE INDEX job_unsettled ON job (job) WHERE settled = 0;
CREATE TABLE notice (
    notice        INTEGER PRIMARY KEY AUTOINCREMENT,
    target        TEXT NOT NULL,              -- whom the configuration names so
    body          TEXT NOT NULL,              -- JSON
    attempts      INTEGER NOT NULL,
    next_ns       INTEGER NOT NULL,
    created_ns    INTEGER NOT NULL
) STRICT;
CREATE TABLE token (
    name          TEXT PRIMARY KEY,
    role          TEXT NOT NULL,
    digest        TEXT NOT NULL UNIQUE,       -- SHA-256 of the token
    created_ns    INTEGER NOT NULL,
    expires_ns    INTEGER
) STRICT;
CREATE TABLE catalogue (
    repository    TEXT NOT NULL,
    backup        TEXT NOT NULL,
    vm            TEXT NOT NULL,
    time          TEXT NOT NULL,              -- UTC, RFC 3339
    data          TEXT NOT NULL,              -- JSON: as vmsnap list shows it
    PRIMARY KEY (repository, backup)
) STRICT;
CREATE INDEX catalogue_by_time ON catalogue (time, backup);
CREATE INDEX catalogue_by_vm ON catalogue (vm, time, backup);
"""
_SINCE_VERSION_5 = (
    *counters.SCHEMA,
    """
CREATE TABLE vm_tag (
    vm            TEXT NOT NULL REFERENCES vm ON DELETE CASCADE ON UPDATE CASCADE,
    tag           TEXT NOT NULL,              -- as its hypervisor last said
    PRIMARY KEY (vm, tag)
) STRICT, WITHOUT ROWID
""",
    "CREATE INDEX operation_by_vm ON operation (vm, begun_ns)",
    "CREATE INDEX catalogue_by_backup ON catalogue (backup)",
)
# The backup that an operation has stored or uses, as soon as there is one.
_SINCE_VERSION_6 = "ALTER TABLE operation ADD COLUMN backup TEXT NOT NULL DEFAULT ''"
_SINCE_VERSION_7 = """
CREATE TABLE own_disk (
    address       TEXT PRIMARY KEY,           -- that of a disk of the VM table, while the VM has it
    data          TEXT NOT NULL               -- JSON: the ClonePlan of a duplicate that has taken its VM's place
) STRICT
"""


class Database:
    """One connection to the host's database. Not shared between threads.

    Every write is a transaction of its own, durable on return (``synchronous=FULL``) unless the caller can do without
    that, and waits up to 10 s for another writer.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the database at `path` (0600).

        :raises VmsnapError: it cannot be opened, is damaged, or was written by a newer vmsnap
        """
        self.path = path
        try:
            path.touch(mode=0o600)
            self._connection = sqlite3.connect(path, timeout=10, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._sync("FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._make_schema()
        except (sqlite3.Error, OSError) as e:
            raise VmsnapError(
                f"the state database {path} cannot be used: {e}",
                cure="if it is damaged, move it away and register the VMs again; backups are not touched by that",
            ) from e

    def _make_schema(self) -> None:
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
            if version in (0, 1):
                connection.execute(_SINCE_VERSION_2)
            if version in (0, 1, 2):
                connection.execute(_SINCE_VERSION_3)
            if version in (0, 1, 2, 3):
                for statement in _SINCE_VERSION_4.split(";\n"):
                    connection.execute(statement)
            if version in (0, 1, 2, 3, 4):
                for statement in _SINCE_VERSION_5:
                    connection.execute(statement)
            if version in (0, 1, 2, 3, 4, 5):
                connection.execute(_SINCE_VERSION_6)
            if version < SCHEMA_VERSION:
                connection.execute(_SINCE_VERSION_7)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise VmsnapError(
                    f"the state database {self.path} has version {version}, this vmsnap knows {SCHEMA_VERSION}",
                    cure="use the newer vmsnap",
                )

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All statements inside, or none; durable when it ends.

        :param durable: if not, a power cut can take it until the next one that is; a kill cannot. It does not wait for
            the disk, which can be busy for half a second with what else is written there
        :raises VmsnapError: the database is locked for too long, or the disk is full
        """
        try:
            if durable:
                with self._whole() as connection:
                    yield connection
                return
            self._sync("NORMAL")
            try:
                with self._whole() as connection:
                    yield connection
            finally:
                self._sync("FULL")
        except sqlite3.Error as e:
            raise VmsnapError(f"the state database {self.path} cannot be written: {e}") from e

    @contextmanager
    def _whole(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:  # the caller's too: nothing of its transaction stays
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _sync(self, how: str) -> None:
        """How far a commit in WAL mode goes (sqlite.org/pragma.html): ``FULL`` to the disk, ``NORMAL`` not so far."""
        self._connection.execute(f"PRAGMA synchronous = {how}")

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """All rows of a query.

        :raises VmsnapError: the database cannot be read
        """
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as e:
            raise VmsnapError(f"the state database {self.path} cannot be read: {e}") from e

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._connection.close()
