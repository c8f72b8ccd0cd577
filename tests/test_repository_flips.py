"""Any bit that flips, and any write that was torn, in any object: it is found, named, and costs exactly what needed it;
and repair saves the rest.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.test_repository_roundtrip import CHEAP
from tests.test_storage_contract import Memory
from vmsnap.errors import DamageFound, RepositoryError
from vmsnap.repository import (
    BackupFields,
    BaseImage,
    BytesReader,
    CheckReport,
    ChunkSizes,
    DiskImage,
    ImageKind,
    ImageRecord,
    Manifest,
    MemoryImage,
    Repository,
    accepted_losses,
)
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.config import decode_config
from vmsnap.repository.format import ZERO_ID, BlobKind, pack_of_key
from vmsnap.repository.garbage import put_awaited, put_garbage
from vmsnap.repository.index import open_index
from vmsnap.repository.keys import decode_key
from vmsnap.repository.manifest import open_manifest
from vmsnap.repository.nodes import load_node
from vmsnap.repository.packs import ENTRY, Entry, open_pack
from vmsnap.repository.packstate import examine_pack
from vmsnap.repository.seal import BrokenSeal
from vmsnap.repository.tree import Node, children, root_node, span_of

CHUNK = 4096
STRIDE = 3
SIZES = ChunkSizes(disk=CHUNK, ram=CHUNK, state=CHUNK, fanout=8)

Touches = frozenset[tuple[str, str, int, int]]
"""Backup, part, offset and length of what is lost, chunk by chunk."""


def text(*letters: str) -> bytes:
    """A chunk for each letter: of different content, and a few bytes long when it is stored."""
    return b"".join(letter.encode() * CHUNK for letter in letters)


class Small:
    """A repository of a few hundred bytes an object, with an object of every kind: two backups that share chunks, one
    of them with a tree node that is a difference from the other's; a session, its heartbeat, and a condemnation.
    """

    def __init__(self, passphrase: str | None) -> None:
        self.passphrase = passphrase
        self.storage = Memory()
        self.repository = Repository.create(self.storage, passphrase, chunks=SIZES, key_cost=CHEAP)
        old = text("a", "b", "c", "d", "e", "f", "g", "h", "a", "i") + b"j" * 100
        new = old[:CHUNK] + text("B") + old[2 * CHUNK : 3 * CHUNK] + bytes(CHUNK) + old[4 * CHUNK :]
        ram = text("a", "x") + bytes(CHUNK)
        self.contents: dict[str, dict[str, bytes]] = {}
        first = self._back_up("vm1", old, ram, None)
        self._back_up("vm2", new[: 3 * CHUNK] + old[3 * CHUNK :], ram, first.disks[0].image)
        self.manifests = self.repository.list()
        vault = self.repository.vault
        self.session = self.repository.session("write", "a backup")
        self.session.begin()
        beat = self.session.key + ".heartbeat"
        self.storage.put(beat, vault.seal_object(beat, b'{"time":"2026-11-23T02:15:30Z"}'))
        put_awaited(self.storage, vault, put_garbage(self.storage, vault, [b"p" * 32]), [self.session.key])
        self.whole = dict(self.storage.raw)
        self.uses = self._uses()

    def _back_up(self, vm: str, disk: bytes, ram: bytes, base: ImageRecord | None) -> Manifest:
        hint = BaseImage(base) if base else None
        with self.repository.writer() as writer:
            image = writer.add_image("disk", BytesReader(disk), ImageKind.DISK, base=hint)
            memory = writer.add_image("memory", BytesReader(ram), ImageKind.RAM)
            state = writer.add_blob("state", vm.encode())
            manifest = writer.commit(
                BackupFields(
                    vm=vm,
                    hypervisor="simulated",
                    mode="live",
                    disks=(DiskImage("vda", len(disk), "raw", "/x", "file", image),),
                    memory=(MemoryImage("ram", CHUNK, memory),),
                    device_state=state,
                )
            )
        parts = {"disk vda": disk, "memory ram": ram, "device state": vm.encode()}
        self.contents[manifest.backup] = parts
        return manifest

    def _uses(self) -> Mapping[bytes, Touches]:
        """Which chunks of which images need each blob, found by walking all trees."""
        blobs = BlobReader(self.storage, self.repository.vault, self.repository.index(refresh=True))
        uses: dict[bytes, set[tuple[str, str, int, int]]] = defaultdict(set)

        def look(backup: str, part: str, image: ImageRecord, node: Node) -> set[tuple[str, str, int, int]]:
            if node.id == ZERO_ID:
                return set()
            below = set()
            needed = [node.id]
            if node.level:
                loaded = load_node(image, node, lambda node, limit: blobs.read(BlobKind.TREE, node, limit))
                needed += loaded.bases
                for child in children(node, image, loaded.ids):
                    look(backup, part, image, child)
                start, length = span_of(image, node)
                for at in range(start, start + length, CHUNK):
                    below.add((backup, part, at, min(CHUNK, start + length - at)))
            else:
                below.add((backup, part, *span_of(image, node)))
            for each in needed:
                uses[each] |= below
            return below

        for manifest in self.manifests:
            for part, image in manifest.images:
                look(manifest.backup, part, image, root_node(image))
        return {blob: frozenset(touches) for blob, touches in uses.items()}

    # -- damage, and what it must cost

    def entries(self, key: str) -> list[Entry]:
        """What lies in a pack."""
        pack = pack_of_key(key)
        assert pack
        entries = open_pack(self.repository.vault, pack, self.whole[key])
        return [Entry(*fields) for fields in ENTRY.iter_unpack(entries)]

    def cost_of_flip(self, key: str, position: int) -> Touches:
        """What is lost with a byte."""
        if not key.startswith("packs/"):
            return frozenset()
        hit = [each for each in self.entries(key) if each.offset <= position < each.offset + each.sealed_bytes]
        return frozenset[tuple[str, str, int, int]]().union(*(self.uses[entry.id] for entry in hit))

    def cost_of_cut(self, key: str, length: int) -> Touches:
        """What is lost when only the first bytes are left."""
        if not key.startswith("packs/"):
            return frozenset()
        gone = [entry for entry in self.entries(key) if entry.offset + entry.sealed_bytes > length]
        return frozenset[tuple[str, str, int, int]]().union(*(self.uses[entry.id] for entry in gone))

    def check(self, key: str) -> CheckReport | None:
        """Check with everything read; None where the repository does not even open, by fault of the object `key`."""
        if not key.startswith(("config", "keys/")):
            return self.repository.check(read_data=True)
        try:
            return Repository.open(self.storage, self.passphrase).check(read_data=True)
        except (DamageFound, RepositoryError) as e:
            assert str(e).startswith(key) or key.startswith("config"), (key, e)
            assert "config" in str(e) or "keys/" in str(e)
            return None

    def see_that_it_costs(self, key: str, cost: Touches) -> None:
        """The damage that was done to `key` is found, is blamed on it alone, and touches nothing but `cost`."""
        report = self.check(key)
        if report is None:
            return
        assert report.damaged
        assert {finding.object for finding in report.findings if finding.severity == "damage"} == {key}
        if key.startswith("manifests/"):
            touched = {(touch.backup, touch.part) for finding in report.findings for touch in finding.touches}
            assert touched == {(key.removeprefix("manifests/"), "all")}
        else:
            assert lost_by(report) == cost

    def see_that_repair_saves_the_rest(self, key: str, cost: Touches) -> None:
        """Nothing but `cost` is lost by a repair, which leaves nothing damaged."""
        repository = Repository.open(self.storage, self.passphrase)
        report = repository.repair(forget_damaged=True)
        assert report.changed
        lost = {(t.backup, t.part, at, n) for t in report.lost for at, n in chunks_of(t.ranges)}
        assert lost == cost
        gone = {key.removeprefix("manifests/")} if key.startswith("manifests/") else set()
        assert set(report.unreadable) == gone
        after = repository.check(read_data=True)
        assert {finding.severity for finding in after.findings if finding.object != key} <= {"lost", "note"}
        assert lost_by(after) == cost
        kept = repository.list()
        assert {m.backup for m in kept} == {m.backup for m in self.manifests if m.backup.lower() not in gone}
        for manifest in kept:
            parts = dict(manifest.images)
            accepted = accepted_losses(repository, manifest, parts.keys(), accept=True)
            for part, image in parts.items():
                expected = bytearray(self.contents[manifest.backup][part])
                for _, _, at, length in (c for c in cost if c[:2] == (manifest.backup, part)):
                    expected[at : at + length] = bytes(length)
                found = bytearray(len(expected))
                repository.reader(image, part, lost=accepted.get(part, ())).read_into(0, memoryview(found))
                assert found == expected
        assert not repository.repair().changed


def chunks_of(ranges: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int]]:
    for offset, length in ranges:
        for at in range(offset, offset + length, CHUNK):
            yield at, min(CHUNK, offset + length - at)


def lost_by(report: CheckReport) -> Touches:
    touches = [touch for finding in report.findings for touch in finding.touches]
    for touch in touches:
        assert sum(length for _, length in touch.ranges) == touch.lost_bytes
    return frozenset((t.backup, t.part, at, n) for t in touches for at, n in chunks_of(t.ranges))


@pytest.fixture(scope="module", params=[None, "pass"], ids=["plain", "encrypted"])
def made(request: pytest.FixtureRequest) -> Iterator[Small]:
    small = Small(request.param)
    yield small
    small.session.end()


@pytest.fixture
def small(made: Small) -> Iterator[Small]:
    yield made
    made.storage.raw = dict(made.whole)


def flipped(data: bytes, position: int, bit: int) -> bytes:
    broken = bytearray(data)
    broken[position] ^= 1 << bit
    return bytes(broken)


def test_the_small_repository_has_an_object_of_every_kind_and_is_whole(small: Small) -> None:
    kinds = {"config", "packs", "index", "manifests", "sessions", "garbage"}
    assert {key.split("/")[0] for key in small.whole} == kinds | ({"keys"} if small.passphrase else set())
    report = Repository.open(small.storage, small.passphrase).check(read_data=True)
    assert report.findings == ()
    differences = [manifest for manifest in small.manifests if manifest.backup.startswith("vm2")]
    (image,) = [disk.image for disk in differences[0].disks]
    blobs = BlobReader(small.storage, small.repository.vault, small.repository.index(refresh=True))
    root = load_node(image, root_node(image), lambda node, limit: blobs.read(BlobKind.TREE, node, limit))
    leaf = next(children(root_node(image), image, root.ids))
    assert load_node(image, leaf, lambda node, limit: blobs.read(BlobKind.TREE, node, limit)).bases
    assert max(len(data) for data in small.whole.values()) < 2000


def test_a_flipped_bit_anywhere_is_found_named_and_costs_what_needs_it(small: Small) -> None:
    chance = random.Random(1)
    for key, data in small.whole.items():
        # The bytes between are looked at in the other kind of repository, and every bit of all in the next two tests.
        for position in range(bool(small.passphrase), len(data), STRIDE):
            small.storage.raw[key] = flipped(data, position, chance.randrange(8))
            small.see_that_it_costs(key, small.cost_of_flip(key, position))
        small.storage.raw[key] = data


def test_every_bit_of_every_small_object_is_authenticated(small: Small) -> None:
    vault = small.repository.vault
    opens: Mapping[str, Callable[[str, bytes], object]] = {
        "config": lambda _, data: decode_config(data),
        "keys": decode_key,
        "index": lambda key, data: open_index(vault, key, data),
        "manifests": lambda key, data: open_manifest(vault, key, data),
        "sessions": vault.open_object,
        "garbage": vault.open_object,
    }
    for key, data in small.whole.items():
        kind = key.split("/")[0]
        for bit in range(8 * len(data)) if kind in opens else ():
            with pytest.raises((DamageFound, RepositoryError, BrokenSeal)):
                opens[kind](key, flipped(data, bit // 8, bit % 8))


def test_every_bit_of_every_pack_is_authenticated(small: Small) -> None:
    vault = small.repository.vault
    for key in [key for key in small.whole if key.startswith("packs/")]:
        pack, data = pack_of_key(key), small.whole[key]
        assert pack
        listed = open_pack(vault, pack, data)
        entries = small.entries(key)
        for bit in range(8 * len(data)):
            small.storage.raw[key] = flipped(data, bit // 8, bit % 8)
            state = examine_pack(small.storage, vault, pack, listed)
            assert not state.healthy
            hit = [e for e in entries if e.offset <= bit // 8 < e.offset + e.sealed_bytes]
            assert list(state.damaged) == hit
            assert bool(state.faults) != bool(hit)
        small.storage.raw[key] = data


def test_a_write_that_was_torn_anywhere_is_found_named_and_costs_what_was_not_written(small: Small) -> None:
    for key, data in small.whole.items():
        for length in sorted({*range(bool(small.passphrase), len(data), 13), len(data) - 1}):
            small.storage.raw[key] = data[:length]
            small.see_that_it_costs(key, small.cost_of_cut(key, length))
        small.storage.raw[key] = data


def test_a_missing_object_is_found_where_anything_needs_it(small: Small) -> None:
    for key in [key for key in small.whole if key.startswith("packs/")]:
        del small.storage.raw[key]
        small.see_that_it_costs(key, small.cost_of_cut(key, 0))
        small.storage.raw[key] = small.whole[key]


def positions_to_repair(small: Small, key: str) -> list[int]:
    """A byte of each part of an object: of every blob the first and the last, and some in between."""
    data = small.whole[key]
    positions = {0, 7, 8, 40, len(data) // 2, len(data) - 1, len(data) - 5, len(data) - 9}
    if key.startswith("packs/"):
        for entry in small.entries(key):
            positions |= {entry.offset, entry.offset + entry.sealed_bytes - 1}
    # Each half in one kind of repository.
    return sorted(positions)[bool(small.passphrase) :: 2]


REPAIRABLE = ("packs/", "index/", "manifests/", "garbage/")


def test_repair_saves_all_but_what_a_flipped_bit_has_hit(small: Small) -> None:
    for key in [key for key in small.whole if key.startswith(REPAIRABLE)]:
        for position in positions_to_repair(small, key):
            small.storage.raw = small.whole | {key: flipped(small.whole[key], position, position % 8)}
            small.see_that_repair_saves_the_rest(key, small.cost_of_flip(key, position))


def test_repair_saves_all_that_was_written_before_a_write_was_torn(small: Small) -> None:
    for key in [key for key in small.whole if key.startswith(REPAIRABLE)]:
        for position in positions_to_repair(small, key):
            small.storage.raw = small.whole | {key: small.whole[key][:position]}
            small.see_that_repair_saves_the_rest(key, small.cost_of_cut(key, position))


def test_repair_leaves_what_it_cannot_mend_and_names_it(small: Small) -> None:
    for key in [key for key in small.whole if key.startswith("sessions/")]:
        small.storage.raw = small.whole | {key: flipped(small.whole[key], 50, 1)}
        before = dict(small.storage.raw)
        report = Repository.open(small.storage, small.passphrase).repair()
        assert not report.changed
        assert small.storage.raw == before
        (finding,) = [finding for finding in report.findings if finding.severity == "damage"]
        assert finding.object == key
        assert "delete it" in finding.message
