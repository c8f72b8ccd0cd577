"""Garbage collection frees what no backup needs and nothing else, and waits for those who may rely on it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import Busy, DamageFound, ObjectRetained, RepositoryError
from vmsnap.repository import BackupFields, BaseImage, BytesReader, DiskImage, ImageKind, Manifest, Repository
from vmsnap.repository.format import BlobKind, pack_key
from vmsnap.repository.garbage import list_garbage
from vmsnap.repository.manifest import LostRange, with_lost
from vmsnap.repository.writer import BackupWriter
from vmsnap.testing.rigs import same

PACK = 128 << 10


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.repository.upload.PACK_BYTES_OF", dict.fromkeys(BlobKind, PACK))


@pytest.fixture(params=[None, "x"], ids=["plain", "encrypted"])
def repository(request: pytest.FixtureRequest) -> Repository:
    return Repository.create(Memory(), request.param, chunks=SMALL, key_cost=CHEAP)


def test_the_small_index_objects_of_many_backups_are_put_together(repository: Repository) -> None:
    contents = {}
    for number in range(20):
        content = random.Random(number).randbytes(10_000)
        contents[back_up(repository, BytesReader(content)).backup] = content
    assert len(keys(repository, "index/")) == 20
    repository.gc()
    assert len(keys(repository, "index/")) == 1
    assert repository.gc().index_objects_rewritten == 0
    assert_whole(repository, contents)


def raw(repository: Repository) -> dict[str, bytes]:
    assert isinstance(repository.storage, Memory)
    return repository.storage.raw


def keys(repository: Repository, prefix: str) -> list[str]:
    return sorted(key for key in raw(repository) if key.startswith(prefix))


def stored_bytes(repository: Repository) -> int:
    return sum(len(raw(repository)[key]) for key in keys(repository, "packs/"))


def commit(writer: BackupWriter, content: bytes, vm: str = "vm001") -> Manifest:
    image = writer.add_image("disk", BytesReader(content), ImageKind.DISK)
    disk = DiskImage("disk0", image.size_bytes, "raw", "/x", "file", image)
    return writer.commit(BackupFields(vm=vm, hypervisor="simulated", mode="live", disks=(disk,)))


def assert_whole(repository: Repository, contents: dict[str, bytes]) -> None:
    """These backups are there and no others, whole, and nothing is left that they do not need."""
    again = Repository.open(repository.storage, "x")
    assert not again.check(read_data=True).findings
    assert {manifest.backup for manifest in again.list()} == contents.keys()
    for manifest in again.list():
        assert same(content_of(again, manifest.disks[0].image), contents[manifest.backup])


def assert_nothing_is_left(repository: Repository, contents: dict[str, bytes]) -> None:
    """One collection more finds nothing to do, and all that is stored is needed, but for a fifth at most."""
    report = repository.gc()
    assert (report.packs_deleted, report.packs_waiting, report.packs_repacked) == (0, 0, 0)
    assert keys(repository, "garbage/") == keys(repository, "sessions/") == []
    assert_whole(repository, contents)
    assert stored_bytes(repository) <= report.live_bytes / 0.8 + 3000 * len(keys(repository, "packs/"))


@pytest.mark.parametrize("seed", range(6))
def test_nothing_that_a_backup_needs_is_lost_and_the_rest_goes(repository: Repository, seed: int) -> None:
    chance = random.Random(seed)
    pieces = [chance.randbytes(20 * 4096) for _ in range(12)]
    contents: dict[str, bytes] = {}
    for _ in range(12):
        content = b"".join(chance.sample(pieces, 4)) + chance.randbytes(chance.randrange(9000))
        contents[back_up(repository, BytesReader(content)).backup] = content
        if len(contents) > 3:
            backup = chance.choice(sorted(contents))
            repository.forget(backup)
            del contents[backup]
        if chance.random() < 0.5:
            repository.gc()
            assert_whole(repository, contents)
    repository.gc()
    assert_nothing_is_left(repository, contents)


def test_a_repository_without_garbage_is_left_as_it_is(repository: Repository) -> None:
    back_up(repository, BytesReader(os.urandom(300_000)))
    before = dict(raw(repository))
    report = repository.gc()
    assert raw(repository) == before
    assert report.backups == 1
    assert 300_000 < report.live_bytes < 330_000


def test_all_goes_with_the_last_backup(repository: Repository) -> None:
    for _ in range(3):
        repository.forget(back_up(repository, BytesReader(os.urandom(200_000))).backup)
    size = stored_bytes(repository)
    report = repository.gc()
    assert report.deleted_bytes == size
    assert {key.split("/")[0] for key in raw(repository)} <= {"config", "keys"}


def test_packs_that_are_garbage_by_a_part_are_written_anew(repository: Repository) -> None:
    old = os.urandom(400 * 4096)
    new = b"".join(old[at : at + 4096] for at in range(0, len(old), 2 * 4096))  # every other chunk
    first, second = back_up(repository, BytesReader(old)), back_up(repository, BytesReader(new))
    repository.forget(first.backup)
    before = stored_bytes(repository)
    report = repository.gc()
    assert report.packs_repacked > 10
    assert len(new) < report.repacked_bytes < report.live_bytes < len(new) * 1.1
    assert before * 0.98 < report.deleted_bytes < before
    assert stored_bytes(repository) < before * 0.6
    assert_nothing_is_left(repository, {second.backup: new})


def test_many_small_packs_become_few(repository: Repository) -> None:
    contents = {}
    for _ in range(10):
        content = os.urandom(2 * 4096)
        contents[back_up(repository, BytesReader(content)).backup] = content
    assert len(keys(repository, "packs/")) == 20
    assert repository.gc().packs_repacked == 20
    assert len(keys(repository, "packs/")) == 2
    assert len(keys(repository, "index/")) == 1
    assert_nothing_is_left(repository, contents)


def test_what_two_writers_stored_at_once_is_kept_once(repository: Repository) -> None:
    content = os.urandom(300_000)
    with repository.writer() as one, repository.writer() as other:
        image = one.add_image("disk", BytesReader(content), ImageKind.DISK)
        second = commit(other, content)
        disk = DiskImage("disk0", image.size_bytes, "raw", "/x", "file", image)
        first = one.commit(BackupFields(vm="vm001", hypervisor="simulated", mode="live", disks=(disk,)))
    assert stored_bytes(repository) > 600_000
    repository.gc()
    assert stored_bytes(repository) < 330_000
    assert_nothing_is_left(repository, {first.backup: content, second.backup: content})


def test_older_nodes_from_which_newer_ones_differ_stay(repository: Repository) -> None:
    content = bytearray(os.urandom(900 * 4096))
    image = None
    manifests = []
    for number in range(12):
        content[number * 4096 * 70 : number * 4096 * 70 + 10] = os.urandom(10)
        with repository.writer() as writer:
            base = BaseImage(image) if image else None
            image = writer.add_image("disk", BytesReader(bytes(content)), ImageKind.DISK, base=base)
            disk = DiskImage("disk0", image.size_bytes, "raw", "/x", "file", image)
            manifests.append(
                writer.commit(BackupFields(vm="vm001", hypervisor="simulated", mode="live", disks=(disk,)))
            )
    for manifest in manifests[:-1]:
        repository.forget(manifest.backup)
    assert repository.gc().packs_deleted
    assert_nothing_is_left(repository, {manifests[-1].backup: bytes(content)})


# -- beside writers


def test_what_a_living_writer_has_stored_stays(repository: Repository) -> None:
    content = os.urandom(500_000)
    with repository.writer() as writer:
        image = writer.add_image("disk", BytesReader(content), ImageKind.DISK)
        writer._store._uploader.flush()
        packs = keys(repository, "packs/")
        for _ in range(3):
            report = repository.gc()
            assert report.packs_deleted == 0
            assert len(report.waiting_for) == 1
            assert "a backup" in report.waiting_for[0]
        assert keys(repository, "packs/") == packs
        disk = DiskImage("disk0", image.size_bytes, "raw", "/x", "file", image)
        manifest = writer.commit(BackupFields(vm="vm001", hypervisor="simulated", mode="live", disks=(disk,)))
    repository.gc()
    assert_nothing_is_left(repository, {manifest.backup: content})


def test_what_somebody_stores_while_gc_runs_is_known_to_the_next_backup(repository: Repository) -> None:
    content = os.urandom(200_000)
    with repository.writer() as writer:
        writer.add_image("disk", BytesReader(content), ImageKind.DISK)
        writer._store._uploader.flush()
        repository.gc()
        first = commit(writer, content)
    second = back_up(repository, BytesReader(content))
    assert second.stats.stored_bytes == 0
    repository.gc()
    assert_nothing_is_left(repository, {first.backup: content, second.backup: content})


def test_leftovers_of_one_writer_go_although_another_one_lives(repository: Repository) -> None:
    dead = repository.writer()
    dead.add_image("disk", BytesReader(os.urandom(60_000)), ImageKind.DISK)
    dead._store._uploader.flush()
    del raw(repository)[dead._session.key]  # as if it had been taken for dead
    left = keys(repository, "packs/")
    living = repository.writer()
    assert len(left) > 0
    assert repository.gc().packs_waiting == len(left)
    living.abort()
    living = repository.writer()
    # Whoever could have listed them has ended; now they are condemned.
    assert repository.gc().packs_waiting == len(left)
    living.abort()
    living = repository.writer()
    assert repository.gc().packs_deleted == len(left)
    living.abort()
    assert keys(repository, "packs/") == []
    dead.abort()


def test_what_a_writer_relied_on_before_it_was_condemned_survives(repository: Repository) -> None:
    content = os.urandom(400_000)
    old = back_up(repository, BytesReader(content))
    with repository.writer() as writer:
        repository.forget(old.backup)
        report = repository.gc()
        assert (report.packs_deleted, report.waiting_bytes) == (0, stored_bytes(repository))
        manifest = commit(writer, content)
    assert manifest.stats.stored_bytes == 0
    report = repository.gc()
    assert (report.packs_deleted, report.packs_waiting) == (0, 0)
    assert_nothing_is_left(repository, {manifest.backup: content})


def test_a_writer_relies_on_nothing_that_was_condemned_before_it_began(repository: Repository) -> None:
    content = os.urandom(400_000)
    old = back_up(repository, BytesReader(content))
    with repository.session("read", "somebody reads"):
        repository.forget(old.backup)
        assert repository.gc().packs_waiting
        manifest = back_up(repository, BytesReader(content))
    assert manifest.stats.stored_bytes > 400_000
    assert repository.gc().deleted_bytes > 400_000
    assert_nothing_is_left(repository, {manifest.backup: content})


def test_a_writer_that_was_taken_for_dead_makes_no_backup(repository: Repository) -> None:
    content = os.urandom(100_000)
    old = back_up(repository, BytesReader(content))
    with repository.writer() as writer:
        repository.forget(old.backup)
        report = repository.gc(dead_after_seconds=-1)
        assert report.packs_deleted
        assert len(report.dead_sessions) == 1
        with pytest.raises(RepositoryError, match="for dead"):
            commit(writer, content)
    assert keys(repository, "manifests/") == []
    assert_whole(repository, {})


def test_a_writer_that_is_taken_for_dead_while_it_commits_takes_its_manifest_back(repository: Repository) -> None:
    content = os.urandom(100_000)
    old = back_up(repository, BytesReader(content))
    storage = repository.storage
    put = storage.put

    def put_late(key: str, data: bytes, *, if_absent: bool = False) -> None:
        if key.startswith("manifests/"):
            storage.put = put  # type: ignore[method-assign]
            repository.gc(dead_after_seconds=-1)
        put(key, data, if_absent=if_absent)

    with repository.writer() as writer:
        repository.forget(old.backup)
        storage.put = put_late  # type: ignore[method-assign, assignment]
        with pytest.raises(RepositoryError, match="for dead"):
            commit(writer, content)
    assert keys(repository, "manifests/") == []
    assert_whole(repository, {})


def test_a_commit_that_gc_sees_counts(repository: Repository) -> None:
    """The session is found dead after the manifest is there: gc walks it, and the backup is whole."""
    content = os.urandom(100_000)
    old = back_up(repository, BytesReader(content))
    with repository.writer() as writer:
        repository.forget(old.backup)
        manifest = commit(writer, content)
        assert repository.gc(dead_after_seconds=-1).packs_deleted == 0
    assert_nothing_is_left(repository, {manifest.backup: content})


# -- beside others


def test_two_collections_at_once_are_one_too_many(repository: Repository) -> None:
    repository.forget(back_up(repository, BytesReader(os.urandom(50_000))).backup)
    before = dict(raw(repository))
    with repository.session("gc", "the other one"):
        for dry_run in (False, True):
            with pytest.raises(Busy, match="the other one"):
                repository.gc(dry_run=dry_run)
    assert raw(repository) == before
    repository.session("gc", "dead").begin()
    assert repository.gc(dead_after_seconds=-1).packs_deleted


def test_a_dry_run_changes_nothing_and_says_what_would_be(repository: Repository) -> None:
    old = os.urandom(100 * 4096)
    first, _ = back_up(repository, BytesReader(old)), back_up(repository, BytesReader(old[: len(old) // 2]))
    repository.forget(first.backup)
    with repository.session("write", "busy"):
        before = dict(raw(repository))
        report = repository.gc(dry_run=True)
        assert (report.packs_deleted, bool(report.packs_waiting), len(report.waiting_for)) == (0, True, 1)
        assert raw(repository) == before
    before = dict(raw(repository))
    expected = repository.gc(dry_run=True)
    assert raw(repository) == before
    report = repository.gc()
    fields = ("packs_deleted", "deleted_bytes", "packs_repacked", "repacked_bytes", "live_bytes", "backups")
    assert [getattr(report, name) for name in fields] == [getattr(expected, name) for name in fields]
    assert report.packs_deleted > 0


def test_a_reader_is_waited_for(repository: Repository) -> None:
    content = os.urandom(300_000)
    manifest = back_up(repository, BytesReader(content))
    with repository.session("read", "restore of something"):
        reader = repository.reader(manifest.disks[0].image)
        repository.forget(manifest.backup)
        report = repository.gc()
        assert "restore of something (read)" in report.waiting_for[0]
        buffer = bytearray(len(content))
        reader.read_into(0, memoryview(buffer))
        assert same(buffer, content)
    assert repository.gc().packs_deleted


def test_a_reader_without_a_session_finds_what_was_moved(repository: Repository) -> None:
    contents = [os.urandom(400 * 4096)]
    for _ in range(2):  # every other chunk of the one before
        contents.append(b"".join(contents[-1][at : at + 4096] for at in range(0, len(contents[-1]), 2 * 4096)))
    manifests = [back_up(repository, BytesReader(content)) for content in contents]
    reader = repository.reader(manifests[-1].disks[0].image)
    buffer = bytearray(len(contents[-1]))
    reader.read_into(0, memoryview(buffer)[:5000])
    for manifest in manifests[:-1]:  # from packs to packs, and on
        repository.forget(manifest.backup)
        assert Repository.open(repository.storage, "x").gc().packs_repacked
        reader.read_into(5000, memoryview(buffer)[5000:200_000])
    reader.read_into(200_000, memoryview(buffer)[200_000:])
    assert same(buffer, contents[-1])


# -- damage


def _lose_a_pack(repository: Repository, manifest: Manifest) -> None:
    place = repository.index(refresh=True).find(bytes.fromhex(manifest.disks[0].image.root))
    assert place
    del raw(repository)[pack_key(place.pack)]


def _flip(prefix: str) -> Callable[[Repository, Manifest], None]:
    def flip(repository: Repository, manifest: Manifest) -> None:
        key = keys(repository, prefix)[0]
        raw(repository)[key] = raw(repository)[key][:-1] + bytes([raw(repository)[key][-1] ^ 1])

    return flip


def _flip_the_root(repository: Repository, manifest: Manifest) -> None:
    place = repository.index(refresh=True).find(bytes.fromhex(manifest.disks[0].image.root))
    assert place
    data = bytearray(raw(repository)[pack_key(place.pack)])
    data[place.offset] ^= 1
    raw(repository)[pack_key(place.pack)] = bytes(data)


@pytest.mark.parametrize("damage", [_lose_a_pack, _flip("index/"), _flip("manifests/"), _flip_the_root])
def test_nothing_is_deleted_while_something_is_damaged(repository: Repository, damage: Any) -> None:
    repository.forget(back_up(repository, BytesReader(os.urandom(200_000))).backup)
    damage(repository, back_up(repository, BytesReader(os.urandom(200_000))))
    before = dict(raw(repository))
    with pytest.raises(DamageFound) as caught:
        repository.gc()
    assert "vmsnap repair" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert raw(repository) == before


def test_a_pack_that_the_storage_keeps_for_a_time_does_not_stop_a_collection(repository: Repository) -> None:
    """A backup has locked it and failed then."""
    kept = back_up(repository, BytesReader(os.urandom(200_000)))
    for _ in range(2):
        repository.forget(back_up(repository, BytesReader(os.urandom(200_000))).backup)
    storage = repository.storage
    locked, delete, packs = set[str](), storage.delete, list[str]()

    def refuse(key: str) -> None:
        if key.startswith("packs/"):
            packs.append(key)
            locked.update(packs[:1] if len(packs) == 1 else [])
        if key in locked:
            raise ObjectRetained(f"{key} is locked", until=datetime(2030, 1, 1, tzinfo=UTC))
        delete(key)

    storage.delete = refuse  # type: ignore[method-assign]
    repository.gc()
    assert locked & raw(repository).keys() and len(keys(repository, "garbage/")) == 1
    repository.gc()
    assert locked & raw(repository).keys()
    locked.clear()
    repository.gc()
    assert not keys(repository, "garbage/")
    assert not repository.check(read_data=True).findings
    assert {manifest.backup for manifest in repository.list()} == {kept.backup}


def note(repository: Repository, key: str, lost: LostRange) -> None:
    raw(repository)[key] = with_lost(repository.vault, key, raw(repository)[key], (lost,))


def test_what_a_backup_notes_as_lost_may_be_missing(repository: Repository) -> None:
    content = os.urandom(300 * 4096)
    manifest = back_up(repository, BytesReader(content))
    repository.forget(back_up(repository, BytesReader(os.urandom(200_000))).backup)
    index = repository.index(refresh=True)
    chunk = index.find(repository.vault.chunk_id(BlobKind.DATA, content[:4096]))
    assert chunk
    del raw(repository)[pack_key(chunk.pack)]
    with pytest.raises(DamageFound):
        repository.gc()
    (key,) = keys(repository, "manifests/")
    note(repository, key, LostRange("disk disk0", 0, 4096))
    with pytest.raises(DamageFound):  # the pack held more than that
        repository.gc()
    note(repository, key, LostRange("disk disk0", 0, 100 * 4096))
    assert repository.gc().packs_deleted > 0
    buffer = bytearray(4096)
    repository.reader(manifest.disks[0].image).read_into(299 * 4096, memoryview(buffer))
    assert same(buffer, content[299 * 4096 :])


def test_a_damaged_condemnation_stops_writers_until_gc_has_removed_it(repository: Repository) -> None:
    content = os.urandom(50_000)
    manifest = back_up(repository, BytesReader(content))
    with repository.session("read", "x"):
        repository.forget(back_up(repository, BytesReader(os.urandom(200_000))).backup)
        assert repository.gc().packs_waiting
    _flip("garbage/")(repository, manifest)
    with pytest.raises(DamageFound, match="vmsnap gc"):
        repository.writer()
    assert repository.gc().packs_deleted
    assert list_garbage(repository.storage, repository.vault) == {}
    assert_nothing_is_left(repository, {manifest.backup: content})


def test_a_pack_that_is_missing_and_not_needed_is_taken_out_of_the_index(repository: Repository) -> None:
    gone = back_up(repository, BytesReader(os.urandom(50_000)))
    content = os.urandom(50_000)
    manifest = back_up(repository, BytesReader(content))
    _lose_a_pack(repository, gone)
    repository.forget(gone.backup)
    repository.gc()
    assert_nothing_is_left(repository, {manifest.backup: content})
