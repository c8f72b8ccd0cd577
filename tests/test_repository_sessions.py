"""Sessions say who is at work and who is dead; the index is read whole, whatever garbage collection does meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import DamageFound, RepositoryError, StorageError, UsageError
from vmsnap.model import to_json
from vmsnap.repository import BytesReader, ImageKind, Repository
from vmsnap.repository.format import INDEX_PREFIX, PACKS_PREFIX, SESSIONS_PREFIX
from vmsnap.repository.index import open_index, seal_index
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.reading import reading
from vmsnap.repository.sessions import SessionRecord
from vmsnap.roles import ObjectInfo
from vmsnap.testing.rigs import same
from vmsnap_storage_backends.local import LocalStorage


@pytest.fixture
def repository() -> Repository:
    return Repository.create(Memory(), "x", chunks=SMALL, key_cost=CHEAP)


def raw(repository: Repository) -> dict[str, bytes]:
    assert isinstance(repository.storage, Memory)
    return repository.storage.raw


def test_a_session_is_there_while_it_lasts(repository: Repository) -> None:
    threads = threading.active_count()
    with repository.session("read", "restore of X") as session:
        (found,) = repository.sessions()
        assert found.key == session.key
        assert found.record
        assert (found.record.kind, found.record.pid, found.dead) == ("read", os.getpid(), "")
        assert "restore of X (read)" in found.description
        assert b"restore" not in raw(repository)[session.key]
        session.require()
    assert repository.sessions() == []
    assert threading.active_count() <= threads
    session.end()
    with pytest.raises(RepositoryError, match="for dead"):
        session.require()


def test_every_backup_has_a_session_and_ends_it(repository: Repository) -> None:
    with pytest.raises(KeyboardInterrupt), repository.writer(purpose="backup of vm001") as writer:
        assert "backup of vm001 (write)" in repository.sessions()[0].description
        writer.add_image("disk", BytesReader(b"x"), ImageKind.DISK)
        raise KeyboardInterrupt
    assert repository.sessions() == []
    back_up(repository, BytesReader(b"x"))
    assert repository.sessions() == []


class Full(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        if key.startswith(SESSIONS_PREFIX):
            raise StorageError("read-only")
        super().put(key, data, if_absent=if_absent)


def test_only_readers_do_without_a_session_that_cannot_be_put() -> None:
    repository = Repository.create(Full(), chunks=SMALL)
    with repository.session("read", "restore") as session:
        session.end()
    with pytest.raises(StorageError, match="read-only"):
        repository.writer()
    with pytest.raises(StorageError, match="read-only"):
        repository.gc()


def test_a_session_that_cannot_be_deleted_is_no_error(repository: Repository) -> None:
    def refuse(key: str) -> None:
        raise StorageError("append only")

    repository.storage.delete = refuse  # type: ignore[method-assign]
    back_up(repository, BytesReader(b"x"))
    assert len(repository.sessions()) == 1


def put_session(repository: Repository, **changed: object) -> str:
    """A session like one of this process, but for what is changed."""
    with repository.session("write", "x") as session:
        record = repository.sessions()[0].record
        assert record
        key = session.key
    changed_record = replace(record, **changed)  # type: ignore[arg-type]
    raw(repository)[key] = repository.vault.seal_object(key, to_json(changed_record).encode())
    return key


@pytest.mark.parametrize("removed", [True, False])
def test_what_is_missing_is_damage_only_where_the_backup_is_still_there(repository: Repository, removed: bool) -> None:
    backup = back_up(repository, BytesReader(os.urandom(50_000))).backup
    expected = RepositoryError if removed else DamageFound
    message = "was removed from the repository while it was read" if removed else "is missing"
    with pytest.raises(expected, match=message), reading(repository, backup, "restore"):
        image = repository.manifest(backup).disks[0].image
        if removed:
            repository.forget(backup)
        for key in [key for key in raw(repository) if key.startswith(PACKS_PREFIX)]:
            del raw(repository)[key]
        content_of(repository, image)
    assert repository.sessions() == []


OLD = "2020-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("changed", "dead"),
    [
        ({}, ""),
        ({"process_start": 1}, "has ended"),
        ({"pid": 1 << 22}, "has ended"),
        ({"boot": "another", "pid": 1 << 22}, ""),
        ({"pid_namespace": "pid:[1]", "pid": 1 << 22}, ""),
        ({"pid_namespace": "", "pid": 1 << 22}, ""),
        ({"boot": "another", "begun": OLD}, "nothing was heard"),
        ({"begun": OLD}, "nothing was heard"),
        ({"pid": 1}, "has ended"),
    ],
)
def test_who_is_dead(repository: Repository, changed: dict[str, object], dead: str) -> None:
    key = put_session(repository, **changed)
    (found,) = repository.sessions()
    assert found.key == key
    assert dead in found.dead
    assert bool(found.dead) == bool(dead)


def test_a_process_that_was_killed_is_dead_at_once(tmp_path: Path) -> None:
    repository = Repository.create(LocalStorage(str(tmp_path / "r")), "x", chunks=SMALL, key_cost=CHEAP)
    code = """
import os, sys
from vmsnap_storage_backends.local import LocalStorage
from vmsnap.repository import Repository
Repository.open(LocalStorage(sys.argv[1]), "x").session("write", "killed").begin()
os.kill(os.getpid(), 9)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], env=environment, check=False)
    (found,) = repository.sessions()
    assert "has ended" in found.dead
    assert len(repository.gc().dead_sessions) == 1
    assert repository.sessions() == []


def test_a_heartbeat_keeps_a_session_alive(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    beaten = threading.Event()
    put = repository.storage.put

    missed = iter((StorageError("not now"), UsageError("ssh does not say")))

    def watch(key: str, data: bytes, *, if_absent: bool = False) -> None:
        if key.endswith(".heartbeat") and (problem := next(missed, None)):
            raise problem
        put(key, data, if_absent=if_absent)
        if key.endswith(".heartbeat"):
            beaten.set()

    repository.storage.put = watch  # type: ignore[method-assign, assignment]
    monkeypatch.setattr("vmsnap.repository.sessions.HEARTBEAT_SECONDS", 0.01)
    with repository.session("write", "long") as session:
        assert beaten.wait(10)
        record = SessionRecord("write", "long", "elsewhere", "another boot", "", 1, 1, OLD)
        raw(repository)[session.key] = repository.vault.seal_object(session.key, to_json(record).encode())
        (found,) = repository.sessions()
        assert found.dead == ""
        assert found.silent_seconds < 60
        # Taken for dead, it beats on; that brings nothing back.
        assert len(repository.gc(dead_after_seconds=-1).dead_sessions) == 1
        beaten.clear()
        assert beaten.wait(10)
        assert repository.sessions() == []
        with pytest.raises(RepositoryError, match="for dead"):
            session.require()
    repository.gc()
    assert not [key for key in raw(repository) if key.startswith(SESSIONS_PREFIX)]


def test_a_session_that_cannot_be_read_is_waited_for_and_named(repository: Repository) -> None:
    repository.forget(back_up(repository, BytesReader(os.urandom(50_000))).backup)
    key = SESSIONS_PREFIX + "00" * 8
    raw(repository)[key] = b"nothing"
    report = repository.gc(dead_after_seconds=-1)
    assert report.packs_deleted == 0
    assert key in report.waiting_for[0]
    assert "delete this object" in report.waiting_for[0]
    del raw(repository)[key]
    assert repository.gc().packs_deleted


# -- the index while it is rewritten


class Rewritten(Memory):
    """Rewrites the index while it is listed or read, as garbage collection does, so that one look is not enough."""

    def __init__(self, rewrite: object = None) -> None:
        super().__init__()
        self.at = ""
        self.repository: Repository | None = None

    def rewrite(self) -> None:
        self.at = ""
        assert self.repository
        old = sorted(key for key in self.raw if key.startswith(INDEX_PREFIX))
        packs = [pack for key in old for pack in open_index(self.repository.vault, key, self.raw[key])]
        key, data = seal_index(self.repository.vault, packs)
        self.raw[key] = data
        for each in old:
            del self.raw[each]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        torn = self.at == "list" and prefix == INDEX_PREFIX
        infos = list(super().list(prefix))
        if torn:
            # The listing has passed the place of the new object, and comes to those of the old ones too late.
            self.rewrite()
            infos = []
        yield from infos

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if self.at == "get" and key.startswith(INDEX_PREFIX):
            self.rewrite()
        return super().get(key, offset, length)


@pytest.mark.parametrize("at", ["list", "get"])
@pytest.mark.parametrize("loaded", [False, True])
def test_an_index_that_is_rewritten_while_it_is_read(at: str, loaded: bool) -> None:
    storage = Rewritten()
    repository = storage.repository = Repository.create(storage, chunks=SMALL)
    contents = [os.urandom(30_000) for _ in range(3)]
    manifests = [back_up(repository, BytesReader(content)) for content in contents[:2]]
    loader = IndexLoader(storage, repository.vault)
    if loaded:
        loader.load()
    manifests.append(back_up(repository, BytesReader(contents[2])))
    expected = len(Repository.open(storage).index())
    storage.at = at
    assert len(loader.load()) == expected
    assert storage.at == ""
    assert len(loader.listings) == 1
    for manifest, content in zip(manifests, contents, strict=True):
        assert same(content_of(repository, manifest.disks[0].image), content)


def test_packs_that_left_the_index_leave_memory(repository: Repository) -> None:
    kept = back_up(repository, BytesReader(os.urandom(30_000)))
    gone = back_up(repository, BytesReader(os.urandom(30_000)))
    loader = IndexLoader(repository.storage, repository.vault)
    before = len(loader.load())
    repository.forget(gone.backup)
    Repository.open(repository.storage, "x").gc()
    after = loader.load()
    assert len(after) == before // 2
    assert after.find(bytes.fromhex(kept.disks[0].image.root))
    assert not after.find(bytes.fromhex(gone.disks[0].image.root))
    assert set(after.pack_sizes) == frozenset().union(*loader.listings.values())
