"""Check and verify: how much they read, how exactly they tell what is lost, and what they do not take for damage."""

from __future__ import annotations

import os
import struct

import pytest

from tests.damage import flip, make, pack_of
from tests.test_repository_roundtrip import SMALL, back_up
from tests.test_storage_contract import Memory
from vmsnap.errors import UsageError
from vmsnap.repository import BytesReader, Repository, Subset
from vmsnap.repository.format import BlobKind, manifest_key, pack_of_key
from vmsnap.repository.nodes import encode_list


def many_packs() -> tuple[Memory, Repository]:
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    for number in range(10):
        back_up(repository, BytesReader(os.urandom(5000)), vm=f"vm{number}")
    return storage, repository


def test_shares_by_number_read_every_pack_once() -> None:
    storage, repository = many_packs()
    packs = {pack_of_key(key): len(data) for key, data in storage.raw.items() if key.startswith("packs/")}
    reports = [repository.check(read_data=True, subset=Subset.parse(f"{part}/3")) for part in (1, 2, 3)]
    for number, report in enumerate(reports):
        chosen = [pack for pack in packs if pack and int.from_bytes(pack[:8], "big") % 3 == number]
        assert report.read_packs == len(chosen)
        assert report.read_bytes == sum(packs[pack] for pack in chosen)
        assert report.packs == len(packs)
        assert report.subset == f"{number + 1}/3"
    assert sum(report.read_packs for report in reports) == len(packs)


def test_a_share_by_percentage_is_read_at_random() -> None:
    _, repository = many_packs()
    seen = set()
    for _ in range(20):
        report = repository.check(read_data=True, subset=Subset.parse("25%"))
        assert report.read_packs == 5
        assert report.subset == "25%"
        seen.add(report.read_bytes)
    assert len(seen) > 1
    assert repository.check(read_data=True, subset=Subset.parse("0.1%")).read_packs == 1
    assert repository.check(read_data=True, subset=Subset.parse("100%")).read_packs == 20


def test_damage_is_found_by_the_share_that_has_it_and_structure_by_all() -> None:
    storage, repository = many_packs()
    key = next(key for key in storage.raw if key.startswith("packs/"))
    pack = pack_of_key(key)
    assert pack
    flip(storage, key, len(storage.raw[key]) - 20)
    mine = int.from_bytes(pack[:8], "big") % 4 + 1
    for part in range(1, 5):
        assert repository.check(read_data=True, subset=Subset(part, 4)).damaged == (part == mine)
    assert not repository.check().damaged
    del storage.raw[key]
    for part in range(1, 5):
        assert repository.check(read_data=True, subset=Subset(part, 4)).damaged


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "1/0", "a/b", "1/3/5", "0%", "101%", "-1%", "5", "1e2%", "nan%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Subset.parse(text)


def test_a_share_without_reading_is_refused() -> None:
    _, repository, _, _ = make(None)
    with pytest.raises(UsageError, match="read"):
        repository.check(subset=Subset(1, 2))


def test_verify_goes_on_behind_a_damaged_tree_node() -> None:
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    content = os.urandom(100_000)
    manifest = back_up(repository, BytesReader(content))
    ids = [repository.vault.chunk_id(BlobKind.DATA, content[at : at + 4096]) for at in range(16384, 32768, 4096)]
    node = pack_of(repository, encode_list(1, b"".join(ids)), BlobKind.TREE)
    chunk = pack_of(repository, content[81920:86016])
    for key, offset in (node, chunk):
        flip(storage, key, offset)
    again = Repository.open(storage)
    for report in (again.verify(manifest.backup), again.check(read_data=True)):
        touched = {f.object: [t.ranges for t in f.touches] for f in report.findings}
        assert touched == {node[0]: [((16384, 16384),)], chunk[0]: [((81920, 4096),)]}
    assert [t.ranges for f in again.check().findings for t in f.touches] == [((16384, 16384),)]


def test_a_loss_deep_in_a_tree_is_told_of_every_backup_that_has_the_tree() -> None:
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    content = os.urandom(100_000)
    manifests = [back_up(repository, BytesReader(content), vm=f"vm{number}") for number in range(3)]
    assert len({manifest.disks[0].image.root for manifest in manifests}) == 1
    flip(storage, *pack_of(repository, content[40960:45056]))
    (finding,) = repository.check(read_data=True).findings
    expected = {(manifest.backup, ((40960, 4096),)) for manifest in manifests}
    assert {(touch.backup, touch.ranges) for touch in finding.touches} == expected
    assert {(touch.backup, touch.ranges) for touch in repository.repair().lost} == expected


def test_a_chunk_that_is_nowhere_is_nobodys_fault() -> None:
    storage, repository, contents, manifests = make(None)
    key, _ = pack_of(repository, contents[0][8192:12288])
    for index in [name for name in storage.raw if name.startswith("index/")]:
        del storage.raw[index]
    del storage.raw[key]
    for report in (repository.check(), repository.verify(manifests[0].backup)):
        assert report.damaged
        assert {finding.object for finding in report.findings if finding.severity == "damage"} == {""}


def test_a_node_of_a_newer_vmsnap_is_no_damage() -> None:
    storage, repository, _, manifests = make(None)
    image = manifests[0].disks[0].image
    with repository.writer() as writer:
        node = struct.pack("<BBI", 9, image.depth, 4)
        chunk_id = writer._store.store(node)
        writer._store.flush()
    key = manifest_key(manifests[0].backup)
    data = repository.vault.open_object(key, storage.raw[key]).replace(image.root.encode(), chunk_id.hex().encode())
    storage.raw[key] = repository.vault.seal_object(key, data)
    report = repository.check()
    assert not report.damaged
    (message,) = [finding.message for finding in report.findings if finding.object == key]
    assert "install a newer vmsnap" in message
    assert not repository.repair().lost


def test_a_backup_that_is_removed_during_a_check_lacks_nothing() -> None:
    storage, repository, contents, manifests = make(None)
    key, _ = pack_of(repository, contents[0][8192:12288])
    del storage.raw[key]
    stat = storage.stat

    def forgotten(name: str):  # type: ignore[no-untyped-def]
        storage.raw.pop(manifest_key(manifests[0].backup), None)
        return stat(name)

    storage.stat = forgotten  # type: ignore[method-assign]
    touched = {touch.backup for finding in repository.check().findings for touch in finding.touches}
    assert touched == {manifests[1].backup}
