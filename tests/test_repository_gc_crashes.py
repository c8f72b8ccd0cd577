"""Garbage collection that dies at any change of the storage leaves a whole repository, and the next one finishes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.test_repository_gc import assert_nothing_is_left, assert_whole, commit, keys, small_packs  # noqa: F401
from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import StorageError, VmsnapError
from vmsnap.repository import BytesReader, ImageKind, Repository
from vmsnap.roles import ObjectInfo
from vmsnap.testing.rigs import same
from vmsnap_storage_backends.local import LocalStorage


class Death(BaseException):
    """The process is gone: nothing handles it."""


class Dying(Memory):
    """Fails its change number `at` (a put or a delete): before it is done or, if `late`, after that. By a `Death`,
    which nothing outlives; any other `failure` strikes once. What only reads changes nothing: to die there is as if
    before the next change.
    """

    def __init__(self, raw: dict[str, bytes]) -> None:
        super().__init__()
        self.raw = dict(raw)
        self.at, self.late = -1, False
        self.failure: type[BaseException] = Death
        self.changes = 0
        self.dead = False

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        with self._change():
            super().put(key, data, if_absent=if_absent)

    def delete(self, key: str) -> None:
        with self._change():
            super().delete(key)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self._live()
        return super().get(key, offset, length)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._live()
        return super().list(prefix)

    def _live(self) -> None:
        if self.dead:
            raise Death("nothing is called any more")

    @contextmanager
    def _change(self) -> Iterator[None]:
        self._live()
        with self.lock:
            number, self.changes = self.changes, self.changes + 1
        strikes = number == self.at
        self.dead = self.dead or (strikes and self.failure is Death and not self.late)
        if strikes and not self.late:
            raise self.failure("it was not done")
        yield
        self.dead = self.dead or (strikes and self.failure is Death)
        if strikes:
            raise self.failure("it was done")


def mess(repository: Repository) -> dict[str, bytes]:
    """Make garbage of every kind; returns the contents of the backups that are left."""
    chance = random.Random(5)
    old = chance.randbytes(120 * 4096)
    contents = {}
    with repository.session("read", "keeps the first collection from finishing"):
        repository.forget(back_up(repository, BytesReader(chance.randbytes(150_000))).backup)
        repository.gc()
    assert keys(repository, "garbage/")
    dead = repository.writer()
    dead.add_image("disk", BytesReader(chance.randbytes(150_000)), ImageKind.DISK)
    dead._store._uploader.flush()
    dead._store._unlisted.clear()  # what was stored stays, as if it had been killed
    dead.abort()
    first = back_up(repository, BytesReader(old))
    half = b"".join(old[at : at + 4096] for at in range(0, len(old), 2 * 4096))
    contents[back_up(repository, BytesReader(half)).backup] = half
    gone = back_up(repository, BytesReader(chance.randbytes(200_000)))
    for _ in range(9):
        small = chance.randbytes(5000)
        contents[back_up(repository, BytesReader(small)).backup] = small
    repository.forget(first.backup)
    repository.forget(gone.backup)
    return contents


@pytest.mark.parametrize(
    ("late", "failure", "passphrase"),
    [(False, Death, None), (False, StorageError, "x"), (True, StorageError, None)],
    ids=["killed", "failing", "answer lost"],
)
def test_a_collection_that_ends_at_any_change(late: bool, failure: type[BaseException], passphrase: str | None) -> None:
    first = Memory()
    contents = mess(Repository.create(first, passphrase, chunks=SMALL, key_cost=CHEAP))
    threads = threading.active_count()
    for at in itertools.count(0, 1 if failure is Death else 3):
        storage = Dying(first.raw)
        repository = Repository.open(storage, passphrase)
        storage.at, storage.late, storage.failure = at, late, failure
        try:
            repository.gc()
        except (Death, VmsnapError):
            ended = False
        else:
            ended = storage.changes <= at  # a failure of cleaning up behind itself is none
        storage.at, storage.dead = -1, False
        assert threading.active_count() == threads

        again = Repository.open(storage, passphrase)
        if at % 4 == 0:
            report = again.check(read_data=True)
            assert not report.damaged, report.findings
            for manifest in again.list():
                assert same(content_of(again, manifest.disks[0].image), contents[manifest.backup])
        now = dict(contents)
        new = random.Random(5).randbytes(120 * 4096)  # what the forgotten backup held
        with again.writer() as writer:
            if at % 2:
                now[commit(writer, new).backup] = new
                again.gc(dead_after_seconds=-1)
            else:  # the next collection while somebody writes, and has begun after the killed one
                _end_dead_ones(again, writer._session.key)
                again.gc()
                now[commit(writer, new).backup] = new
        again.gc()
        again.gc()
        assert_nothing_is_left(again, now)
        if ended:
            break
    assert at > 30


def _end_dead_ones(repository: Repository, living: str) -> None:
    for session in repository.sessions():
        if session.key != living:
            repository.storage.delete(session.key)


_COLLECT = """
import itertools, os, signal, sys
from vmsnap_storage_backends.local import LocalStorage
from vmsnap.repository import Repository
import vmsnap.repository.upload
vmsnap.repository.upload.PACK_BYTES_OF = dict.fromkeys(vmsnap.repository.upload.BlobKind, 128 << 10)
class Dies(LocalStorage):
    numbers = itertools.count(1)
    def _count(self):
        if next(self.numbers) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    def put(self, key, data, *, if_absent=False):
        super().put(key, data, if_absent=if_absent)
        self._count()
    def delete(self, key):
        super().delete(key)
        self._count()
Repository.open(Dies(sys.argv[1]), "x").gc()
"""


def test_killed_processes_leave_no_session_that_anybody_waits_for(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "r"))
    memory = Memory()
    contents = mess(Repository.create(memory, "x", chunks=SMALL, key_cost=CHEAP))
    storage.create()
    for key, data in memory.raw.items():
        storage.put(key, data)
    outcomes = []
    for number in itertools.count(2, 3):
        command = [sys.executable, "-c", _COLLECT, str(tmp_path / "r"), str(number)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        outcomes.append(done.returncode)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        repository = Repository.open(storage, "x")
        assert not repository.check(read_data=True).damaged
        assert [session.dead for session in repository.sessions()] != [""]
    # Each one removes the session of the one before, and gets further.
    assert len(outcomes) > 3
    again = Repository.open(storage, "x")
    report = again.gc()
    assert (report.packs_deleted, report.packs_waiting, report.packs_repacked, report.dead_sessions) == (0, 0, 0, ())
    assert [info.key for info in storage.list() if info.key.startswith(("sessions/", "garbage/"))] == []
    assert_whole(again, contents)
