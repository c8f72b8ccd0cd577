"""Damage costs no more than it must, is named with what it touches, and nothing that was read can mislead."""

from __future__ import annotations

import os
import struct

import pytest
from backports import zstd

from tests.damage import make
from tests.test_repository_roundtrip import SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import DamageFound, RepositoryError, VmsnapError
from vmsnap.repository import BytesReader, ImageRecord, Repository
from vmsnap.repository.format import BlobKind, Codec, pack_key
from vmsnap.repository.index import IndexedPack, seal_index
from vmsnap.repository.packs import ENTRY, PackBuilder, open_pack


@pytest.fixture(params=[None, "pass"], ids=["plain", "encrypted"])
def passphrase(request: pytest.FixtureRequest) -> str | None:
    return request.param  # type: ignore[no-any-return]


def test_a_damaged_chunk_touches_only_what_holds_it(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    chunk = contents[0][8192:12288]
    place = repository.index().find(repository.vault.chunk_id(BlobKind.DATA, chunk))
    assert place
    key = pack_key(place.pack)
    broken = bytearray(storage.raw[key])
    broken[place.offset + 100] ^= 4
    storage.raw[key] = bytes(broken)
    again = Repository.open(storage, passphrase)
    (finding,) = again.check(read_data=True).findings
    (touch,) = finding.touches
    assert (touch.backup, touch.part, touch.offset, touch.lost_bytes) == (manifests[0].backup, "disk disk0", 8192, 4096)
    (finding,) = again.verify(manifests[0].backup).findings
    assert finding.touches == (touch,)
    assert finding.object == key
    assert not again.verify(manifests[1].backup).findings
    assert content_of(again, manifests[1].disks[0].image) == contents[1]
    with pytest.raises(DamageFound, match="from 8192 to 12288"):
        content_of(again, manifests[0].disks[0].image)
    buffer = bytearray(8192)
    again.reader(manifests[0].disks[0].image).read_into(0, memoryview(buffer))
    assert buffer == contents[0][:8192]
    with pytest.raises(DamageFound, match=manifests[0].backup):
        again.check(read_data=True).raise_if_damaged()
    # One after the other, as those read who know nothing of chunks.
    reader, block = again.reader(manifests[0].disks[0].image), bytearray(1024)
    for offset in range(0, 8192, 1024):
        reader.read_into(offset, memoryview(block))
        assert block == contents[0][offset : offset + 1024]
    with pytest.raises(DamageFound, match="from 8192 to 12288"):
        reader.read_into(8192, memoryview(block))
    reader.read_into(12288, memoryview(block))
    assert block == contents[0][12288:13312]


def test_damage_in_what_is_shared_names_all_that_share_it(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    place = repository.index().find(repository.vault.chunk_id(BlobKind.DATA, contents[0][:4096]))
    assert place
    broken = bytearray(storage.raw[pack_key(place.pack)])
    broken[place.offset] ^= 1
    storage.raw[pack_key(place.pack)] = bytes(broken)
    report = Repository.open(storage, passphrase).check(read_data=True)
    touched = {touch.backup for finding in report.findings for touch in finding.touches}
    assert touched == {manifest.backup for manifest in manifests}


@pytest.mark.parametrize("what", ["missing", "cut"])
def test_a_missing_or_shortened_pack_is_found_without_reading(passphrase: str | None, what: str) -> None:
    storage, repository, _, manifests = make(passphrase)
    place = repository.index().find(bytes.fromhex(manifests[0].disks[0].image.root))
    assert place
    key = pack_key(place.pack)
    if what == "missing":
        del storage.raw[key]
    else:
        storage.raw[key] = storage.raw[key][: place.offset + 10]
    again = Repository.open(storage, passphrase)
    report = again.check()
    assert report.damaged
    assert {finding.object for finding in report.findings} == {key}
    assert manifests[0].backup in {touch.backup for finding in report.findings for touch in finding.touches}
    assert again.check(read_data=True).damaged
    assert again.verify(manifests[0].backup).damaged
    with pytest.raises(DamageFound):
        content_of(again, manifests[0].disks[0].image)


def test_a_damaged_index_loses_nothing(passphrase: str | None) -> None:
    storage, _, contents, manifests = make(passphrase)
    for key in [key for key in storage.raw if key.startswith("index/")]:
        storage.raw[key] = b"nothing"
    again = Repository.open(storage, passphrase)
    for content, manifest in zip(contents, manifests, strict=True):
        assert content_of(again, manifest.disks[0].image) == content
    report = again.check(read_data=True)
    assert [finding.object[:6] for finding in report.findings] == ["index/"] * 2
    # What only the packs themselves list may belong to a backup that is given up: nothing new relies on it.
    assert back_up(again, BytesReader(contents[0])).stats.stored_bytes > len(contents[0])


def test_a_damaged_manifest_hides_no_other(passphrase: str | None) -> None:
    storage, repository, _, manifests = make(passphrase)
    storage.raw["manifests/" + manifests[0].backup.lower()] = b"{}"
    found: list[DamageFound] = []
    assert repository.list(found.append) == [manifests[1]]
    assert manifests[0].backup.lower() in found[0].message
    with pytest.raises(DamageFound):
        repository.list()
    with pytest.raises(DamageFound):
        repository.manifest(manifests[0].backup)


def test_what_is_in_anothers_place_is_damage(passphrase: str | None) -> None:
    storage, repository, _, manifests = make(passphrase)
    before = dict(storage.raw)
    packs = [key for key in storage.raw if key.startswith("packs/")]
    keys = ["manifests/" + manifest.backup.lower() for manifest in manifests]
    indexes = [key for key in storage.raw if key.startswith("index/")]
    for one, other, *_ in (packs, keys, indexes):
        storage.raw[one], storage.raw[other] = before[other], before[one]
        report = Repository.open(storage, passphrase).check(read_data=True)
        assert {one, other} <= {finding.object for finding in report.findings}
        storage.raw.update(before)
    # A blob in another blob's place, in the same pack.
    index = repository.index()
    key = packs[0]
    entries = [
        ENTRY.unpack_from(open_pack(repository.vault, bytes.fromhex(key[-64:]), before[key]), at * ENTRY.size)
        for at in range(3)
    ]
    same = [entry for entry in entries if entry[2] == entries[0][2]][:2]
    assert len(same) == 2
    pack = bytearray(before[key])
    for at, source in ((same[0], same[1]), (same[1], same[0])):
        pack[at[1] : at[1] + at[2]] = before[key][source[1] : source[1] + source[2]]
    storage.raw[key] = bytes(pack)
    report = Repository.open(storage, passphrase).check(read_data=True)
    assert len([finding for finding in report.findings if finding.object == key]) == 2
    assert index.find(same[0][0])


def test_an_old_object_of_another_repository_is_damage(passphrase: str | None) -> None:
    storage, _, _, _ = make(passphrase)
    other, _, _, _ = make(passphrase)
    for prefix in ("manifests/", "index/", "packs/"):
        foreign = next(key for key in other.raw if key.startswith(prefix))
        storage.raw[foreign] = other.raw[foreign]
        report = Repository.open(storage, passphrase).check(read_data=True)
        assert foreign in {finding.object for finding in report.findings}
        del storage.raw[foreign]


def seal_pack(
    repository: Repository, kind: BlobKind, content: bytes, codec: Codec, raw_bytes: int
) -> tuple[bytes, str]:
    """A pack, indexed, with one blob that says of itself whatever it likes."""
    builder = PackBuilder(repository.vault, bytearray(8 << 20))
    chunk_id = os.urandom(32)
    builder.append(chunk_id, kind, codec, raw_bytes, content)
    data, entries = builder.finish()
    repository.storage.put(pack_key(builder.id), bytes(data))
    repository.storage.put(*seal_index(repository.vault, [IndexedPack(builder.id, len(data), entries)]))
    return chunk_id, pack_key(builder.id)


def test_a_bomb_is_not_unpacked(passphrase: str | None) -> None:
    _, repository, _, _ = make(passphrase)
    bomb = zstd.compress(bytes(1 << 30), 1)
    chunk_id, _ = seal_pack(repository, BlobKind.TREE, bomb, Codec.ZSTD, 6 + 32)
    with pytest.raises(DamageFound, match="more than it should"):
        content_of(repository, ImageRecord(4096, 4096, 4, 1, chunk_id.hex()))


@pytest.mark.parametrize("content", [b"", b"not zstd", zstd.compress(b"short"), zstd.compress(b"x" * 38) + b"tail"])
def test_blobs_that_are_sealed_but_wrong(content: bytes) -> None:
    _, repository, _, _ = make(None)
    for codec in Codec:
        chunk_id, _ = seal_pack(repository, BlobKind.TREE, content, codec, 38)
        with pytest.raises(DamageFound):
            content_of(repository, ImageRecord(4096, 4096, 4, 1, chunk_id.hex()))


def test_a_guest_cannot_pass_a_tree_node_off_as_data() -> None:
    _, repository, _, _ = make(None)
    node = struct.pack("<BBI", 1, 1, 1) + bytes(32)
    manifest = back_up(repository, BytesReader(node))
    data_id = repository.vault.chunk_id(BlobKind.DATA, node)
    assert repository.index(refresh=True).find(data_id)
    assert data_id != repository.vault.chunk_id(BlobKind.TREE, node)
    with pytest.raises(DamageFound, match="listed as something else"):
        content_of(repository, ImageRecord(4096, 4096, 4, 1, data_id.hex()))
    assert content_of(repository, manifest.disks[0].image) == node


@pytest.mark.parametrize(
    ("node", "error"),
    [
        (struct.pack("<BBI", 3, 1, 1) + bytes(32), RepositoryError),
        (struct.pack("<BBI", 1, 2, 1) + bytes(32), DamageFound),
        (struct.pack("<BBI", 1, 1, 2) + bytes(32), DamageFound),
    ],
)
def test_a_node_that_cannot_stand_there(node: bytes, error: type[VmsnapError]) -> None:
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    builder = PackBuilder(repository.vault, bytearray(1 << 20))
    node_id = repository.vault.chunk_id(BlobKind.TREE, node)
    builder.append(node_id, BlobKind.TREE, Codec.RAW, len(node), node)
    data, entries = builder.finish()
    storage.put(pack_key(builder.id), bytes(data))
    storage.put(*seal_index(repository.vault, [IndexedPack(builder.id, len(data), entries)]))
    with pytest.raises(error):
        content_of(repository, ImageRecord(4096, 4096, 4, 1, node_id.hex()))
