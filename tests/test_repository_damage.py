"""Damage is found, named with what it touches, and costs no more than it must; nothing that was read can mislead."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable

import pytest
from backports import zstd
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import (
    AlreadyExists,
    DamageFound,
    NotARepository,
    RepositoryError,
    UnknownBackup,
    UsageError,
    VmsnapError,
    WrongPassphrase,
)
from vmsnap.repository import (
    BackupStats,
    BytesReader,
    DiskImage,
    ImageRecord,
    Manifest,
    MemoryImage,
    Repository,
)
from vmsnap.repository.config import decode_config, decode_text, encode_text
from vmsnap.repository.format import BlobKind, Codec, chunk_count, pack_key, tree_depth
from vmsnap.repository.index import IndexedPack, open_index, seal_index
from vmsnap.repository.keys import PassphraseKey, decode_key
from vmsnap.repository.manifest import open_manifest, seal_manifest
from vmsnap.repository.packs import ENTRY, PackBuilder, check_blobs, open_pack
from vmsnap.repository.seal import Vault


def make(passphrase: str | None) -> tuple[Memory, Repository, list[bytes], list[Manifest]]:
    storage = Memory()
    repository = Repository.create(storage, passphrase, chunks=SMALL, key_cost=CHEAP)
    shared = os.urandom(6000)
    contents = [shared + os.urandom(9000), shared + bytes(5000) + b"text" * 4000]
    manifests = [back_up(repository, BytesReader(content), vm=f"vm{n}") for n, content in enumerate(contents)]
    return storage, repository, contents, manifests


@pytest.fixture(params=[None, "pass"], ids=["plain", "encrypted"])
def passphrase(request: pytest.FixtureRequest) -> str | None:
    return request.param  # type: ignore[no-any-return]


def only(storage: Memory, prefix: str) -> str:
    (key,) = [key for key in storage.raw if key.startswith(prefix)]
    return key


def test_every_flipped_bit_is_found_and_named(passphrase: str | None) -> None:
    storage, _, _, manifests = make(passphrase)
    kinds = set()
    for key, data in list(storage.raw.items()):
        kinds.add(key.split("/")[0])
        # Every byte of what has a structure; of a pack's blobs, a sample.
        positions = [
            *range(min(len(data), 600)),
            *range(600, len(data), 101),
            *range(max(0, len(data) - 40), len(data)),
        ]
        for position in positions:
            broken = bytearray(data)
            broken[position] ^= 1 << position % 8
            storage.raw[key] = bytes(broken)
            try:
                report = Repository.open(storage, passphrase).check(read_data=True)
            except (DamageFound, RepositoryError) as e:
                assert key in ("config", only(storage, "keys/") if passphrase else ""), key
                assert "config" in str(e) or "keys/" in str(e)
                continue
            assert report.damaged, (key, position)
            assert key in {finding.object for finding in report.findings}, (key, position)
            touched = {touch.backup for finding in report.findings for touch in finding.touches}
            if key.startswith("index/"):
                assert not touched
            if key.startswith("manifests/"):
                assert touched == {key.removeprefix("manifests/")}
            assert touched <= {name for m in manifests for name in (m.backup, m.backup.lower())}
        storage.raw[key] = data
    assert kinds == {"config", "packs", "index", "manifests"} | ({"keys"} if passphrase else set())
    assert not Repository.open(storage, passphrase).check(read_data=True).findings


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
    assert back_up(again, BytesReader(contents[0])).stats.stored_bytes == 0


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
    for one, other in (packs, keys, indexes):
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
        (struct.pack("<BBI", 2, 1, 1) + bytes(32), RepositoryError),
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


# -- opening


def test_places_that_are_no_repository() -> None:
    with pytest.raises(NotARepository):
        Repository.open(Memory())
    storage = Memory()
    storage.raw["Holiday.JPG"] = b"x"
    with pytest.raises(AlreadyExists, match="Holiday"):
        Repository.create(storage)
    assert storage.raw == {"Holiday.JPG": b"x"}


def test_a_repository_is_never_made_over_another(passphrase: str | None) -> None:
    storage, _, _, _ = make(passphrase)
    before = dict(storage.raw)
    for word in (None, "pass"):
        with pytest.raises(AlreadyExists, match="repository"):
            Repository.create(storage, word, key_cost=CHEAP)
    assert storage.raw == before


def test_passphrases() -> None:
    storage, repository, _, manifests = make("pass")
    asked: list[str] = []

    def ask() -> str:
        asked.append("asked")
        return "pass"

    assert [manifest.backup for manifest in Repository.open(storage, ask).list()] == [
        m.backup for m in repository.list()
    ]
    assert asked == ["asked"]
    for wrong in ("Pass", "", "pass "):
        with pytest.raises(WrongPassphrase):
            Repository.open(storage, wrong)
    with pytest.raises(WrongPassphrase):
        Repository.open(storage)
    assert Repository.create(Memory(), encryption="none").encryption == "none"
    assert Repository.create(Memory(), "x", encryption="none").encryption == "none"
    assert Repository.open(storage, "pass").encryption == "aes256-gcm"
    for bad in (
        {"encryption": "aes256-gcm"},
        {"passphrase": "x", "encryption": "rot13"},
        {"passphrase": "", "encryption": "aes256-gcm"},
    ):
        with pytest.raises(UsageError):
            Repository.create(Memory(), **bad)
    plain, asked[:] = Memory(), []
    Repository.create(plain)
    Repository.open(plain, ask)
    assert asked == []
    assert manifests


def test_no_secret_stands_in_the_objects_or_reprs() -> None:
    storage, repository, contents, _ = make("pass phrase words")
    everything = b"".join(storage.raw.values()) + repr([repository.config, repository.vault]).encode()
    assert b"pass phrase words" not in everything
    assert contents[1][-100:] not in everything
    assert b"vm1" not in b"".join(data for key, data in storage.raw.items())
    plain = Repository.create(Memory())
    assert str(plain.config.secret) not in repr(plain.config)


def test_an_encrypted_repository_cannot_be_turned_into_a_plain_one() -> None:
    storage, _, _, _ = make("pass")
    plain = Memory()
    Repository.create(plain, chunks=SMALL)
    storage.raw["config"] = plain.raw["config"]
    with pytest.raises(DamageFound, match="not encrypted"):
        Repository.open(storage, "pass")


def test_a_changed_config_opens_with_no_passphrase() -> None:
    storage, _, _, _ = make("pass")
    line = storage.raw["config"].split(b"\n")[0].replace(b'"fanout":4', b'"fanout":8')
    storage.raw["config"] = line + b"\n" + blake3(line).hexdigest().encode() + b"\n"
    with pytest.raises(WrongPassphrase):
        Repository.open(storage, "pass")


def test_lost_keys_are_damage() -> None:
    storage, _, _, _ = make("pass")
    del storage.raw[only(storage, "keys/")]
    with pytest.raises(DamageFound, match="keys"):
        Repository.open(storage, "pass")


@pytest.mark.parametrize("check_sum", [True, False])
def test_a_newer_repository_says_so(passphrase: str | None, check_sum: bool) -> None:
    storage, _, _, _ = make(passphrase)
    config = json.loads(storage.raw["config"].split(b"\n")[0]) | {"version": 7, "news": 1}
    storage.raw["config"] = encode_text(config) if check_sum else json.dumps(config).encode()
    with pytest.raises(RepositoryError, match="format 7") as caught:
        Repository.open(storage, passphrase)
    assert "install" in caught.value.cure


@pytest.mark.parametrize("change", [{"encryption": "rot13"}, {"chunker": "wavy"}])
def test_a_config_with_unknown_parts_says_so(change: dict[str, str]) -> None:
    storage, _, _, _ = make(None)
    config = json.loads(storage.raw["config"].split(b"\n")[0])
    storage.raw["config"] = encode_text(config | change)
    with pytest.raises(RepositoryError):
        Repository.open(storage)
    storage.raw["config"] = encode_text(config | {"something": "new"})
    assert len(Repository.open(storage).list()) == 2


# -- manifests


def manifest_with(**changes: object) -> Manifest:
    image = ImageRecord(5, 4096, 4, 1, "00" * 32)
    fields: dict[str, object] = {
        "vm": "vm1",
        "hypervisor": "qemu",
        "mode": "live",
        "backup": "vm1-20261123T021530Z-a1b2c3",
        "time": "2026-11-23T02:15:30Z",
        "stats": BackupStats(1, 2, 3.0),
        "vmsnap": "0",
        "disks": (DiskImage("disk0", 5, "raw", "/x", "file", image),),
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def image_with(**changes: object) -> ImageRecord:
    return ImageRecord(**({"size_bytes": 5, "chunk_bytes": 4096, "fanout": 4, "depth": 1, "root": "00" * 32} | changes))  # type: ignore[arg-type]


EVIL: list[dict[str, object]] = [
    {"vm": "../vm1", "backup": "../vm1-20261123T021530Z-a1b2c3"},
    {"backup": "../../etc/passwd"},
    {"backup": "vm1-20261123T021530Z-zzzzzz"},
    {"backup": "vm2-20261123T021530Z-a1b2c3"},
    {"tags": ("line\nbreak",)},
    {"memory": (MemoryImage("a\0b", 4096, image_with()),)},
    {"memory": (MemoryImage("", 4096, image_with()),)},
    {"memory": (MemoryImage("r", 4096, image_with()), MemoryImage("r", 4096, image_with()))},
    *(
        {"disks": (DiskImage(name, 5, "raw", "/x", "file", image_with()),)}
        for name in ("../x", "/etc/x", "a/b", "", "..", ".x", "-x", "a\nb", "x" * 201)
    ),
    *(
        {"device_state": image_with(**change)}
        for change in (
            {"size_bytes": -1},
            {"size_bytes": 1 << 63},
            {"chunk_bytes": 0},
            {"chunk_bytes": 1 << 30},
            {"chunk_bytes": 5000},
            {"fanout": 0},
            {"fanout": 1},
            {"fanout": 1 << 20},
            {"depth": 0},
            {"depth": 1000},
            {"root": "00"},
            {"root": "xx" * 32},
        )
    ),
    {"disks": (DiskImage("disk0", 6, "raw", "/x", "file", image_with()),)},
]  # fmt: skip


@pytest.mark.parametrize("change", EVIL, ids=str)
def test_a_manifest_that_wants_out_is_refused(change: dict[str, object]) -> None:
    storage, repository, _, _ = make(None)
    manifest = manifest_with(**change)
    sealed = repository.vault.seal_object("manifests/vm1-20261123t021530z-a1b2c3", seal_plain(manifest))
    storage.raw["manifests/vm1-20261123t021530z-a1b2c3"] = sealed
    with pytest.raises(DamageFound):
        repository.manifest("vm1-20261123T021530Z-a1b2c3")
    found: list[DamageFound] = []
    assert len(repository.list(found.append)) == 2
    assert len(found) == 1
    assert "\n" not in str(found[0])


def seal_plain(manifest: Manifest) -> bytes:
    from vmsnap.model import to_json

    return to_json(manifest).encode()


def test_a_good_manifest_passes_and_unknown_fields_are_passed_over() -> None:
    storage, repository, _, _ = make("x")
    manifest = manifest_with()
    key, data = seal_manifest(repository.vault, manifest)
    assert open_manifest(repository.vault, key, data) == manifest
    newer = json.loads(seal_plain(manifest)) | {"colour": "blue"}
    storage.raw[key] = repository.vault.seal_object(key, json.dumps(newer).encode())
    assert repository.manifest(manifest.backup) == manifest
    storage.raw[key] = repository.vault.seal_object(key, json.dumps(newer | {"version": 2}).encode())
    with pytest.raises(RepositoryError, match="format 2"):
        repository.manifest(manifest.backup)


@pytest.mark.parametrize(
    "region", ["pc.ram", "/rom@etc/acpi/tables", "../../x", "..", ".", "-rf", "0000:00:02.0/vga.vram", "ü %"]
)
def test_regions_give_file_names_that_stay_in_their_folder(region: str) -> None:
    name = MemoryImage(region, 4096, image_with()).file_name
    assert "/" not in name
    assert name[0] not in ".-"
    assert len({MemoryImage(other, 1, image_with()).file_name for other in (region, region + "x", "%2E.")}) == 3


def test_backups_are_found_by_the_beginning_of_their_id() -> None:
    _, repository, _, manifests = make(None)
    assert repository.manifest("vm0").backup == manifests[0].backup
    assert repository.manifest(manifests[1].backup[:-1]) == manifests[1]
    for name in ("vm", "", "vm2", "nothing", "../vm0", "vm0/", "VM0", "v" * 300):
        with pytest.raises(UnknownBackup):
            repository.manifest(name)


def test_a_forgotten_backup_is_gone_and_the_others_stay(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    repository.forget(manifests[0].backup)
    assert repository.list() == [manifests[1]]
    for name in (manifests[0].backup, "vm1", "../x", ""):
        with pytest.raises(UnknownBackup):
            repository.forget(name)
    again = Repository.open(storage, passphrase)
    assert content_of(again, manifests[1].disks[0].image) == contents[1]
    assert not again.check(read_data=True).findings


# -- parsers


VAULT = Vault(bytes(32), bytes(16), encrypted=False)
GOOD_KEY = encode_text(PassphraseKey(1, "ab", "", "00" * 16, "00" * 48))


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    cut = st.integers(0, len(data)).map(lambda at: data[:at])
    flip = st.tuples(st.integers(0, max(0, len(data) - 1)), st.binary(min_size=1, max_size=8)).map(
        lambda change: data[: change[0]] + change[1] + data[change[0] + len(change[1]) :]
    )
    return st.one_of(st.binary(max_size=300), cut, flip)


def rehash(line: bytes) -> bytes:
    line = line.split(b"\n")[0]
    return line + b"\n" + blake3(line).hexdigest().encode() + b"\n"


def survives(parse: Callable[[], object]) -> None:
    with contextlib.suppress(DamageFound, RepositoryError):
        parse()


@settings(max_examples=300, deadline=None)
@given(data=mutations(GOOD_KEY), honest=st.booleans())
@example(data=b"[" * 100_000, honest=True)
@example(data=b'{"version":' + b"9" * 5000 + b"}", honest=True)
def test_no_config_or_key_is_a_traceback(data: bytes, honest: bool) -> None:
    data = rehash(data) if honest else data
    survives(lambda: decode_config(data))
    survives(lambda: decode_key("keys/ab", data))
    survives(lambda: decode_text(data, ImageRecord, "x"))


@pytest.mark.parametrize("cost", [{"memory_kib": 1 << 40}, {"time_cost": 10**9}, {"lanes": 0}, {"memory_kib": 1}])
def test_a_key_cannot_ask_for_all_memory_or_time(cost: dict[str, int]) -> None:
    key = json.loads(GOOD_KEY.split(b"\n")[0])
    key["cost"] |= cost
    with pytest.raises(DamageFound, match="impossible"):
        decode_key("keys/ab", encode_text(key))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_index_manifest_or_pack_is_a_traceback(data: st.DataObject) -> None:
    _, index = seal_index(VAULT, [IndexedPack(b"p" * 32, 100, ENTRY.pack(b"c" * 32, 8, 40, 24, 1))])
    content = data.draw(mutations(index[40:-16]))
    survives(lambda: open_index(VAULT, "index/x", VAULT.seal_object("index/x", content)))
    survives(lambda: open_index(VAULT, "index/x", content))
    content = data.draw(mutations(seal_plain(manifest_with())))
    survives(lambda: open_manifest(VAULT, "manifests/x", VAULT.seal_object("manifests/x", content)))
    builder = PackBuilder(VAULT, bytearray(1000))
    builder.append(b"c" * 32, BlobKind.DATA, Codec.RAW, 24, b"x" * 24)
    pack = data.draw(mutations(bytes(builder.finish()[0])))
    survives(lambda: list(check_blobs(VAULT, builder.id, pack, open_pack(VAULT, builder.id, pack))))


def test_geometry() -> None:
    assert [chunk_count(size, 4096) for size in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
    assert [tree_depth(chunks, 4) for chunks in (0, 1, 4, 5, 16, 17, 64, 65)] == [1, 1, 1, 2, 2, 3, 3, 4]
