"""Repair saves all that can be saved, names the rest, and leaves nothing worse, wherever it is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from tests.damage import flip, lost, make, pack_of
from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import DamageFound, StorageError
from vmsnap.model import to_json
from vmsnap.repository import (
    BackupFields,
    BytesReader,
    DiskImage,
    ImageKind,
    ImageRecord,
    Manifest,
    Repository,
)
from vmsnap.repository.format import ID_BYTES, BlobKind, manifest_key, pack_key
from vmsnap.repository.garbage import put_awaited, put_garbage
from vmsnap.repository.index import open_index, seal_index
from vmsnap.repository.packs import ENTRY, Entry


class Killed(BaseException):
    """The process ended here."""


class Mortal(Memory):
    """Ends the process at a change: before it is made, or right after it. `changes` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.after, self.changes = -1, False, 0

    def _change(self, make: Callable[[], None]) -> None:
        number, self.changes = self.changes, self.changes + 1
        if number != self.at or self.after:
            make()
        if number == self.at:
            raise Killed

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        self._change(lambda: super(Mortal, self).put(key, data, if_absent=if_absent))

    def delete(self, key: str) -> None:
        self._change(lambda: super(Mortal, self).delete(key))


@pytest.fixture(params=[None, "pass"], ids=["plain", "encrypted"])
def passphrase(request: pytest.FixtureRequest) -> str | None:
    return request.param  # type: ignore[no-any-return]


def test_a_whole_repository_stays_as_it_is(passphrase: str | None) -> None:
    storage, repository, _, _ = make(passphrase)
    before = dict(storage.raw)
    report = repository.repair()
    assert storage.raw == before
    assert not report.changed
    assert (report.findings, report.lost, report.unreadable) == ((), (), ())
    assert report.read_bytes == sum(len(data) for key, data in before.items() if key.startswith("packs/"))
    report.raise_if_lost()


@pytest.mark.parametrize("how", ["gone", "damaged", "one gone", "one damaged"])
def test_the_index_is_rebuilt_from_the_packs(passphrase: str | None, how: str) -> None:
    storage, _, contents, manifests = make(passphrase)
    indexes = [key for key in storage.raw if key.startswith("index/")]
    for key in indexes[:1] if how.startswith("one") else indexes:
        if how.endswith("gone"):
            del storage.raw[key]
        else:
            flip(storage, key, 50)
    report = Repository.open(storage, passphrase).repair()
    assert report.changed
    assert not report.lost
    again = Repository.open(storage, passphrase)
    assert again.check(read_data=True).findings == ()
    for content, manifest in zip(contents, manifests, strict=True):
        assert content_of(again, manifest.disks[0].image) == content
        assert back_up(again, BytesReader(content)).stats.stored_bytes == 0
    assert not again.repair().changed


def test_packs_that_no_backup_needs_are_not_listed_again(passphrase: str | None) -> None:
    storage, repository, _, manifests = make(passphrase)
    for key in [key for key in storage.raw if key.startswith("index/")]:
        del storage.raw[key]
    repository.forget(manifests[0].backup)
    repository.forget(manifests[1].backup)
    assert not repository.repair().changed
    assert not [key for key in storage.raw if key.startswith("index/")]


def test_a_lost_pack_costs_what_it_held_until_somebody_stores_it_again(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    chunk = contents[0][8192:12288]
    key, _ = pack_of(repository, chunk)
    del storage.raw[key]
    again = Repository.open(storage, passphrase)
    report = again.repair()
    assert lost(report) == [
        (manifests[0].backup, "disk disk0", ((0, 15000),)),
        (manifests[1].backup, "disk disk0", ((0, 4096),)),
    ]
    with pytest.raises(DamageFound, match=manifests[0].backup):
        report.raise_if_lost()
    checked = again.check(read_data=True)
    assert [finding.severity for finding in checked.findings] == ["lost", "lost"]
    assert checked.damaged
    assert again.verify(manifests[1].backup).damaged
    assert lost(again.repair()) == lost(report)
    assert not again.repair().changed
    assert again.manifest(manifests[0].backup).lost_bytes == 15000
    # The next backup of the same content makes the old one whole.
    back_up(again, BytesReader(contents[0]))
    checked = again.check(read_data=True)
    assert not checked.damaged
    assert [finding.severity for finding in checked.findings] == ["note", "note"]
    assert not again.verify(manifests[0].backup).damaged
    assert content_of(again, manifests[0].disks[0].image) == contents[0]
    healed = again.repair()
    assert set(healed.whole_again) == {manifest.backup for manifest in manifests}
    assert not healed.lost
    assert again.list()[0] == manifests[0]
    assert again.check(read_data=True).findings == ()


def test_garbage_collection_and_backups_go_on_after_a_loss(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    key, offset = pack_of(repository, contents[0][8192:12288])
    flip(storage, key, offset)
    again = Repository.open(storage, passphrase)
    assert lost(again.repair()) == [(manifests[0].backup, "disk disk0", ((8192, 4096),))]
    assert key not in storage.raw
    other = os.urandom(9000)
    third = back_up(again, BytesReader(other))
    again.forget(manifests[1].backup)
    again.gc()
    assert content_of(again, third.disks[0].image) == other
    (finding,) = again.check(read_data=True).findings
    assert finding.severity == "lost"
    assert not again.repair().changed


def wrong_entries(entries: bytes) -> bytes:
    """The entries with the ids of one another, and the last one forgotten."""
    found = [Entry(*fields) for fields in ENTRY.iter_unpack(entries)]
    ids = [entry.id for entry in found]
    wrong = [entry._replace(id=other) for entry, other in zip(found, ids[1:] + ids[:1], strict=True)]
    return b"".join(ENTRY.pack(*entry) for entry in wrong[:-1])


@pytest.mark.parametrize("what", ["entries", "size"])
def test_an_index_that_says_something_else_than_the_packs_is_put_right(passphrase: str | None, what: str) -> None:
    storage, repository, contents, manifests = make(passphrase)
    key = next(key for key in storage.raw if key.startswith("index/"))
    packs = open_index(repository.vault, key, storage.raw.pop(key))
    if what == "entries":
        packs = [pack._replace(entries=wrong_entries(pack.entries)) for pack in packs]
    else:
        packs = [pack._replace(size_bytes=pack.size_bytes + 1) for pack in packs]
    storage.put(*seal_index(repository.vault, packs))
    again = Repository.open(storage, passphrase)
    assert again.check(read_data=True).damaged
    assert not again.repair().lost
    last = Repository.open(storage, passphrase)
    assert last.check(read_data=True).findings == ()
    for content, manifest in zip(contents, manifests, strict=True):
        assert content_of(last, manifest.disks[0].image) == content


def test_what_is_not_ours_stays_where_it_is(passphrase: str | None) -> None:
    storage, repository, _, _ = make(passphrase)
    strays = ["packs/readme", "packs/00/" + "0" * 63, "index/readme", "readme.txt"]
    for key in strays:
        storage.raw[key] = b"not ours"
    unlisted = pack_key(os.urandom(ID_BYTES))
    storage.raw[unlisted] = b"torn"
    report = repository.repair()
    assert not report.changed
    assert {finding.severity for finding in report.findings} == {"note"}
    assert {"index/readme", "readme.txt", unlisted} <= {finding.object for finding in report.findings}
    assert {*strays, unlisted} <= storage.raw.keys()
    checked = Repository.open(storage, passphrase).check(read_data=True)
    assert not checked.damaged
    assert {*strays, unlisted} == {finding.object for finding in checked.findings}


def test_a_damaged_manifest_is_named_and_goes_only_when_told(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    key = manifest_key(manifests[0].backup)
    flip(storage, key, 60)
    report = repository.repair()
    assert not report.changed
    assert report.unreadable == (manifests[0].backup.lower(),)
    assert key in storage.raw
    with pytest.raises(DamageFound, match=manifests[0].backup.lower()):
        report.raise_if_lost()
    with pytest.raises(DamageFound):
        repository.gc()
    assert repository.repair(forget_damaged=True).changed
    assert key not in storage.raw
    repository.gc()
    assert repository.check(read_data=True).findings == ()
    assert content_of(repository, manifests[1].disks[0].image) == contents[1]


def test_a_backup_of_a_newer_format_is_left_alone_and_loses_nothing(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    key = manifest_key(manifests[0].backup)
    newer = json.loads(to_json(manifests[0])) | {"version": 2}
    storage.raw[key] = repository.vault.seal_object(key, json.dumps(newer).encode())
    for index in [name for name in storage.raw if name.startswith("index/")]:
        del storage.raw[index]
    before = storage.raw[key]
    checked = repository.check()
    assert [f.severity for f in checked.findings if f.object == key] == ["note"]
    report = repository.repair()
    assert storage.raw[key] == before
    assert [f.severity for f in report.findings if f.object == key] == ["note"]
    assert not report.unreadable
    assert content_of(Repository.open(storage, passphrase), manifests[0].disks[0].image) == contents[0]
    newest = json.loads(to_json(manifests[1])) | {"colour": "blue"}
    key = manifest_key(manifests[1].backup)
    storage.raw[key] = repository.vault.seal_object(key, json.dumps(newest).encode())
    lost_pack, _ = pack_of(repository, contents[1][-4096:])
    del storage.raw[lost_pack]
    repository.repair()
    noted = json.loads(repository.vault.open_object(key, storage.raw[key]))
    assert noted["lost"]
    assert noted["colour"] == "blue"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(passphrase: str | None) -> None:
    storage, repository, contents, _ = make(passphrase)
    key, offset = pack_of(repository, contents[0][:4096])
    flip(storage, key, offset)
    before = dict(storage.raw)
    would = repository.repair(dry_run=True)
    assert storage.raw == before
    assert would.changed
    done = repository.repair()
    assert done.actions == would.actions
    assert lost(done) == lost(would)


def damaged_in_every_way() -> tuple[Mortal, Repository, list[bytes], list[Manifest]]:
    """A repository with a damaged chunk, a damaged trailer, a damaged index object, and one that is gone."""
    storage = Mortal()
    repository = Repository.create(storage, chunks=SMALL, key_cost=CHEAP)
    contents = [os.urandom(9000) for _ in range(4)]
    manifests = [back_up(repository, BytesReader(content), vm=f"vm{n}") for n, content in enumerate(contents)]
    key, offset = pack_of(repository, contents[0][:4096])
    flip(storage, key, offset)
    key, _ = pack_of(repository, contents[1][:4096])
    flip(storage, key, len(storage.raw[key]) - 20)
    lists = {
        key: open_index(repository.vault, key, storage.raw[key]) for key in storage.raw if key.startswith("index/")
    }
    for number, damage in ((2, lambda key: flip(storage, key, 45)), (3, storage.raw.pop)):
        pack, _ = pack_of(repository, contents[number][:4096])
        damage(next(key for key, packs in lists.items() if pack in {pack_key(each.id) for each in packs}))
    return storage, Repository.open(storage), contents, manifests


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_repair_that_is_killed_anywhere_can_be_run_again(after: bool) -> None:
    start, _, contents, manifests = damaged_in_every_way()
    at = 0
    while True:
        storage = Mortal()
        storage.raw = dict(start.raw)
        repository = Repository.open(storage)
        storage.at, storage.after = at, after
        try:
            repository.repair()
        except Killed:
            killed = True
        else:
            killed = False
        storage.at = -1
        # No worse than before: every chunk but the damaged one can be read where an index is found for it.
        survivor = Repository.open(storage)
        for content, manifest in list(zip(contents, manifests, strict=True))[1:3]:
            assert content_of(survivor, manifest.disks[0].image) == content
        report = again_as_another_process(storage).repair()
        assert lost(report) == [(manifests[0].backup, "disk disk0", ((0, 4096),))]
        last = Repository.open(storage)
        assert {finding.severity for finding in last.check(read_data=True).findings} <= {"lost", "note"}
        for content, manifest in list(zip(contents, manifests, strict=True))[1:]:
            assert content_of(last, manifest.disks[0].image) == content
        assert not last.repair().changed
        last.gc()
        assert [finding.severity for finding in last.check(read_data=True).findings] == ["lost"]
        assert not [key for key in storage.raw if key.startswith(("garbage/", "sessions/"))]
        if not killed:
            assert at > 10
            break
        at += 1


def again_as_another_process(storage: Memory) -> Repository:
    """What a process that was killed leaves of its session is dead at once; here the process lives on."""
    for key in [key for key in storage.raw if key.startswith("sessions/")]:
        del storage.raw[key]
    return Repository.open(storage)


def stored_twice(repository: Repository) -> tuple[bytes, ImageRecord, list[bytes]]:
    """A chunk, an image of it, and the two packs that hold it, since two backups stored it at the same time."""
    fresh = os.urandom(4096)
    with repository.writer() as one, repository.writer() as other:
        images = [writer.add_image("disk", BytesReader(fresh), ImageKind.DISK) for writer in (one, other)]
        disk = DiskImage("disk0", 4096, "raw", "/x", "file", images[0])
        for writer in (one, other):
            writer.commit(BackupFields(vm="vm9", hypervisor="simulated", mode="live", disks=(disk,)))
    copies = repository.index(refresh=True).copies(repository.vault.chunk_id(BlobKind.DATA, fresh))
    packs = [copy.pack for copy in copies]
    assert len(set(packs)) == 2
    return fresh, images[0], packs


def test_a_damaged_copy_is_passed_over_for_a_whole_one(passphrase: str | None) -> None:
    storage, repository, _, _ = make(passphrase)
    fresh, image, packs = stored_twice(repository)
    for pack in packs:
        before = dict(storage.raw)
        flip(storage, pack_key(pack), 20)
        again = Repository.open(storage, passphrase)
        assert content_of(again, image) == fresh
        (finding,) = again.check(read_data=True).findings
        assert finding.object == pack_key(pack)
        assert not finding.touches
        assert not again.repair().lost
        assert again.check(read_data=True).findings == ()
        storage.raw = before


def test_a_copy_that_is_going_to_be_deleted_counts_for_nothing() -> None:
    storage, repository, _, _ = make(None)
    fresh, _, packs = stored_twice(repository)
    with repository.session("read", "somebody") as session:
        garbage = put_garbage(storage, repository.vault, packs[:1])
        put_awaited(storage, repository.vault, garbage, [session.key])
        flip(storage, pack_key(packs[1]), len(storage.raw[pack_key(packs[1])]) - 20)
        repository.repair()
        index = repository.index(refresh=True).without(set(packs))
        assert index.find(repository.vault.chunk_id(BlobKind.DATA, fresh))


def test_a_storage_that_fails_is_told_and_repair_can_be_run_again() -> None:
    storage, repository, contents, manifests = make(None)
    key, offset = pack_of(repository, contents[0][8192:12288])
    flip(storage, key, offset)
    put = storage.put
    fail = iter([False, True])

    def refuse(key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        if not key.startswith("sessions/") and next(fail, False):
            raise StorageError("no room")
        put(key, data, if_absent=if_absent)

    next(fail)
    storage.put = refuse  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="no room"):
        repository.repair()
    assert lost(repository.repair()) == [(manifests[0].backup, "disk disk0", ((8192, 4096),))]
