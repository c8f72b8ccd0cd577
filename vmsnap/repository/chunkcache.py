"""Keeps chunks of a repository that is far away in a local file, so that what is read again is not fetched again.

Only ever a cache. Chunks lie there as they lie in the storage: sealed, and opened with what the index says of them, so
that what is not the true one does not open and is fetched. The file is an SQLite database: several processes may use it
at once, a process that is killed leaves it whole, and one that is damaged is thrown away. Nothing that fails here fails
anything else. Delete it at any time.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

from vmsnap.repository.index import Location
from vmsnap.roles.storage import StorageBackend

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (place BLOB PRIMARY KEY, sealed BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON chunk (used);
"""
_PAGE_BYTES = 4096
_BUSY_SECONDS = 0.2
# What is used again within this time is not noted again.
_USE_SECONDS = 60
_MOST_FAILURES = 5
# Somebody else is at it, it is full, or nobody may write to it: no reason to throw it away.
_PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
_EVICTED_AT_ONCE = 16
_ASKED_AT_ONCE = 500
_SMALLEST_BYTES = 1 << 20


class ChunkCache:
    """The cached chunks of one repository. Used by several threads at once."""

    def __init__(self, file: Path, limit_bytes: int) -> None:
        """No I/O.

        :param file: for this repository alone; it, and missing folders above it, are made when they are needed
        :param limit_bytes: what the file may have, besides its journal; the chunks that were not used for the longest
            time go first
        """
        self._file = file
        self._limit_bytes = limit_bytes
        self._lock = Lock()
        self._database: sqlite3.Connection | None = None
        self._failures = 0

    @classmethod
    def beside(
        cls, storage: StorageBackend, cache_dir: Path | None, repository: str, limit_bytes: int
    ) -> ChunkCache | None:
        """The cache of a repository below `cache_dir`; None where it is not worth while: for storage on this host,
        without a folder, or without room.

        :param repository: the repository's id
        """
        if not cache_dir or not storage.remote or limit_bytes < _SMALLEST_BYTES:
            return None
        return cls(cache_dir / repository / "chunks.sqlite", limit_bytes)

    def get(self, places: Sequence[Location]) -> dict[Location, bytes]:
        """What is kept of these; not authenticated yet."""
        keys = {_key(place): place for place in places}
        found: dict[Location, bytes] = {}
        self._do(lambda database: found.update((keys[key], sealed) for key, sealed in _look_up(database, list(keys))))
        return found

    def put(self, chunks: Sequence[tuple[Location, bytes]]) -> None:
        """Keep chunks; others go where there is no room."""
        now = int(time.time())
        rows = [(_key(place), sealed, now) for place, sealed in chunks]
        wanted_bytes = sum(len(sealed) + _PAGE_BYTES for _, sealed, _ in rows)
        if 2 * wanted_bytes > self._limit_bytes:
            return

        def insert(database: sqlite3.Connection) -> None:
            self._make_room(database, wanted_bytes)
            database.executemany("INSERT OR REPLACE INTO chunk VALUES (?, ?, ?)", rows)

        self._do(insert)

    def forget(self, place: Location) -> None:
        """Remove what is kept of a place, since it does not open."""
        self._do(lambda database: database.execute("DELETE FROM chunk WHERE place = ?", (_key(place),)))

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            self._close()

    # -- inside

    def _do(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Do something with the database, in one transaction. What fails is as if it had never been begun."""
        with self._lock:
            if self._failures > _MOST_FAILURES:
                return  # it costs more time than it saves
            try:
                if self._database is None:
                    self._database = self._open()
                work(self._database)
                self._database.commit()
            except sqlite3.DatabaseError as e:
                self._failures += 1
                if e.sqlite_errorcode & 0xFF not in _PASSING:
                    self._throw_away()
                elif self._database is not None:
                    with suppress(sqlite3.Error):
                        self._database.rollback()
            except OSError:
                self._failures += 1

    def _throw_away(self) -> None:
        self._close()
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                self._file.with_name(self._file.name + suffix).unlink()

    def _open(self) -> sqlite3.Connection:
        for folder in (*reversed(self._file.parent.parents), self._file.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        above = self._file.parent.lstat()
        # An unencrypted repository has nothing else to tell what somebody put here from what was in the storage.
        if not stat.S_ISDIR(above.st_mode) or above.st_uid != os.geteuid() or above.st_mode & 0o077:
            raise PermissionError(f"{self._file.parent} is not this user's alone")
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(self._file, timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            # After a power cut it may be damaged, and is made anew then.
            database.execute("PRAGMA synchronous = OFF")
            database.execute(f"PRAGMA max_page_count = {self._limit_bytes // _PAGE_BYTES}")
            database.executescript(_SCHEMA)
        except BaseException:
            database.close()
            raise
        return database

    def _close(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _make_room(self, database: sqlite3.Connection, wanted_bytes: int) -> None:
        """Remove what was not used for the longest time, until so much more fits."""
        while True:
            pages, free = (
                database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
            )
            if (pages - free) * _PAGE_BYTES + wanted_bytes <= self._limit_bytes:
                return
            oldest = "SELECT place FROM chunk ORDER BY used LIMIT ?"
            if not database.execute(f"DELETE FROM chunk WHERE place IN ({oldest})", (_EVICTED_AT_ONCE,)).rowcount:
                return


def _look_up(database: sqlite3.Connection, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    now = int(time.time())
    for at in range(0, len(keys), _ASKED_AT_ONCE):
        some = keys[at : at + _ASKED_AT_ONCE]
        marks = ",".join("?" * len(some))
        rows = database.execute(f"SELECT place, sealed, used FROM chunk WHERE place IN ({marks})", some).fetchall()
        yield from ((key, sealed) for key, sealed, _ in rows)
        if old := [(now, key) for key, _, used in rows if now - used > _USE_SECONDS]:
            database.executemany("UPDATE chunk SET used = ? WHERE place = ?", old)


def _key(place: Location) -> bytes:
    return place.pack + place.offset.to_bytes(4, "big")
