"""Repair beside others: backups, restores, and garbage collections that are at work at the same time."""

from __future__ import annotations

import os

import pytest

from tests.damage import flip, lost, make, only, pack_of
from tests.test_repository_roundtrip import back_up, content_of
from vmsnap.errors import Busy, DamageFound, RepositoryError
from vmsnap.repository import BackupFields, BytesReader, DiskImage, ImageKind, Manifest, Repository
from vmsnap.repository.format import BlobKind


def test_a_repair_beside_another_one_or_garbage_collection_does_not_begin() -> None:
    storage, repository, contents, _ = make(None)
    key, offset = pack_of(repository, contents[0][:4096])
    flip(storage, key, offset)
    with repository.session("gc", "garbage collection"):
        before = dict(storage.raw)
        with pytest.raises(Busy, match="garbage collection"):
            repository.repair()
        assert storage.raw == before
        assert repository.repair(dry_run=True).changed
    assert repository.repair().changed


@pytest.mark.parametrize("kind", ["read", "write"])
def test_damaged_packs_stay_until_nobody_can_be_using_them(kind: str) -> None:
    storage, repository, contents, manifests = make(None)
    key, offset = pack_of(repository, contents[0][8192:12288])
    flip(storage, key, offset)
    with repository.session(kind, "somebody"):  # type: ignore[arg-type]
        report = repository.repair()
        assert key in storage.raw
        assert len(report.waits_for) == 1
        assert "somebody" in report.waits_for[0]
        repository.gc()
        assert key in storage.raw
    repository.gc()
    assert key not in storage.raw
    assert not [name for name in storage.raw if name.startswith("garbage/")]
    assert lost(repository.repair()) == [(manifests[0].backup, "disk disk0", ((8192, 4096),))]


def test_a_backup_that_runs_during_a_repair_is_whole() -> None:
    storage, repository, contents, _ = make(None)
    key, _ = pack_of(repository, contents[0][8192:12288])
    with repository.writer() as writer:
        image = writer.add_image("disk", BytesReader(contents[0] + b"more"), ImageKind.DISK)
        flip(storage, key, len(storage.raw[key]) - 20)  # its trailer: the blobs on which the backup relies are intact
        again = Repository.open(storage)
        assert again.repair().changed
        disk = DiskImage("disk0", image.size_bytes, "raw", "/x", "file", image)
        manifest = writer.commit(BackupFields(vm="vm9", hypervisor="simulated", mode="live", disks=(disk,)))
    again.gc()
    assert key not in storage.raw
    last = Repository.open(storage)
    assert last.check(read_data=True).findings == ()
    assert content_of(last, manifest.disks[0].image) == contents[0] + b"more"


def test_a_damaged_condemnation_stops_nobody_after_a_repair() -> None:
    storage, repository, contents, _ = make(None)
    key, offset = pack_of(repository, contents[0][8192:12288])
    flip(storage, key, offset)
    with repository.session("read", "somebody"):
        repository.repair()
        flip(storage, only(storage, "garbage/"), 45)
        with pytest.raises(DamageFound, match="garbage/"):
            repository.writer()
        assert repository.repair().changed
        with repository.writer():
            pass


def test_a_backup_that_is_made_in_the_middle_of_a_repair_is_left_alone() -> None:
    storage, repository, contents, manifests = make(None)
    key, offset = pack_of(repository, contents[0][8192:12288])
    flip(storage, key, offset)
    other = os.urandom(9000)
    made: list[Manifest] = []
    get = storage.get

    def get_while_others_work(name: str, start: int = 0, length: int | None = None) -> bytes:
        if name.startswith("packs/") and not made:
            storage.get = get  # type: ignore[method-assign]
            made.append(back_up(Repository.open(storage), BytesReader(contents[1] + other)))
        return get(name, start, length)

    storage.get = get_while_others_work  # type: ignore[method-assign]
    assert lost(Repository.open(storage).repair()) == [(manifests[0].backup, "disk disk0", ((8192, 4096),))]
    again = Repository.open(storage)
    assert content_of(again, made[0].disks[0].image) == contents[1] + other
    assert [finding.severity for finding in again.check(read_data=True).findings] == ["lost"]


def test_what_a_repair_has_listed_stays_when_the_backup_that_stored_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vmsnap.repository.upload.PACK_BYTES_OF", dict.fromkeys(BlobKind, 8 << 10))
    storage, repository, contents, _ = make(None)
    for key in {pack_of(repository, contents[0][at : at + 4096])[0] for at in range(0, len(contents[0]), 4096)}:
        del storage.raw[key]
    truth = Repository.open(storage).repair(dry_run=True).lost
    put = storage.put
    with Repository.open(storage).writer() as writer:
        writer.add_image("disk", BytesReader(contents[0]), ImageKind.DISK)  # stores anew what was lost, listed nowhere

        def give_up_and_put(name: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
            if name.startswith("index/"):
                writer.abort()
            put(name, data, if_absent=if_absent)

        storage.put = give_up_and_put  # type: ignore[method-assign]
        report = Repository.open(storage).repair()
    assert report.lost != truth, "some of what the backup had stored was found"
    Repository.open(storage).gc()
    after = Repository.open(storage).repair()
    assert (after.lost, after.changed) == (report.lost, False), "what the first one noted is all that is lost"


def test_a_repair_that_was_taken_for_dead_deletes_nothing() -> None:
    storage, repository, contents, _ = make(None)
    key, offset = pack_of(repository, contents[0][8192:12288])
    flip(storage, key, offset)
    before = set(storage.raw)
    put = storage.put

    def put_and_be_taken_for_dead(name: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        put(name, data, if_absent=if_absent)
        if name.startswith("index/"):
            storage.raw = {key: value for key, value in storage.raw.items() if not key.startswith("sessions/")}

    storage.put = put_and_be_taken_for_dead  # type: ignore[method-assign]
    with pytest.raises(RepositoryError, match="for dead"):
        repository.repair()
    assert before <= set(storage.raw)
