"""Older images as a help for newer ones: trees that say how they differ, and changed extents that spare reading."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_repository_roundtrip import SMALL, Extents, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import RepositoryError, SnapshotError
from vmsnap.model import Extent
from vmsnap.repository import (
    BackupFields,
    BaseImage,
    BytesReader,
    ChunkSizes,
    DiskImage,
    ImageKind,
    ImageRecord,
    Manifest,
    Repository,
)
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.format import ID_BYTES
from vmsnap.repository.nodes import MAX_DIFFERENCES, TreeReader
from vmsnap.repository.tree import root_node
from vmsnap.repository.treebuilder import TreeBuilder
from vmsnap.roles import DiskReader
from vmsnap.testing.rigs import same

CHUNK = 4096


class Counting(BytesReader):
    """Bytes that count how many of them were read, and note where."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.read: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read.append((offset, len(buffer)))
        super().read_into(offset, buffer)

    @property
    def read_bytes(self) -> int:
        return sum(length for _, length in self.read)


def store(
    repository: Repository,
    source: DiskReader,
    base: ImageRecord | None = None,
    changed: Iterable[Extent] | None = None,
) -> tuple[Manifest, list[str]]:
    with repository.writer() as writer:
        image = writer.add_image("disk vda", source, ImageKind.DISK, base=BaseImage(base, changed) if base else None)
        disk = DiskImage("vda", image.size_bytes, "raw", "/x", "file", image)
        manifest = writer.commit(BackupFields(vm="vm001", hypervisor="simulated", mode="live", disks=(disk,)))
        return manifest, writer.warnings


def changed_copy(content: bytes, seed: int, chunks: int) -> tuple[bytes, list[Extent]]:
    """`content` with some bytes changed in `chunks` places, and what was changed."""
    rng = random.Random(seed)
    new = bytearray(content)
    extents = []
    for _ in range(chunks):
        at = rng.randrange(len(new) - 16)
        new[at : at + 16] = rng.randbytes(16)
        extents.append(Extent(at, 16))
    return bytes(new), extents


def tree_bytes(repository: Repository) -> int:
    """What the tree nodes of the repository take in its packs."""
    import numpy as np

    from vmsnap.repository.index import _ENTRY_TYPE, open_index

    total = 0
    for info in repository.storage.list("index/"):
        for pack in open_index(repository.vault, info.key, repository.storage.get(info.key)):
            rows = np.frombuffer(pack.entries, _ENTRY_TYPE)
            total += int(rows["sealed"][rows["flags"] & 0xF == 2].sum())
    return total


@pytest.fixture
def repository() -> Repository:
    return Repository.create(Memory(), chunks=SMALL)


def test_only_what_changed_is_read_besides_samples(repository: Repository) -> None:
    old = os.urandom(2000 * CHUNK + 100)
    first, _ = store(repository, BytesReader(old))
    new, changed = changed_copy(old, 1, 5)
    source = Counting(new)
    second, warnings = store(repository, source, first.disks[0].image, changed)
    assert not warnings
    assert same(content_of(repository, second.disks[0].image), new)
    # Five places touch ten chunks at most; of 500 nodes the first 32 and every fourth one is sampled.
    assert source.read_bytes <= (10 + 32 + 117) * CHUNK
    assert second.stats.read_bytes <= 10 * CHUNK


def test_an_image_without_changes_has_the_same_root_and_stores_nothing_but_its_manifest(repository: Repository) -> None:
    old = os.urandom(300 * CHUNK)
    first, _ = store(repository, BytesReader(old))
    packs = set(repository.storage.raw)  # type: ignore[attr-defined]
    second, warnings = store(repository, Counting(old), first.disks[0].image, [])
    assert not warnings
    assert second.disks[0].image == first.disks[0].image
    added = set(repository.storage.raw) - packs  # type: ignore[attr-defined]
    assert {key.split("/")[0] for key in added} == {"manifests"}


def test_a_backup_does_not_need_the_one_that_it_was_helped_by(repository: Repository) -> None:
    old = os.urandom(100 * CHUNK)
    first, _ = store(repository, BytesReader(old))
    new, changed = changed_copy(old, 2, 3)
    second, _ = store(repository, BytesReader(new), first.disks[0].image, changed)
    repository.forget(first.backup)
    again = Repository.open(repository.storage)
    assert not again.verify(second.backup).findings
    assert same(content_of(again, second.disks[0].image), new)


def test_a_hint_that_lies_is_found_out_and_everything_is_read(repository: Repository) -> None:
    old = os.urandom(200 * CHUNK)
    first, _ = store(repository, BytesReader(old))
    other = os.urandom(200 * CHUNK)  # another disk altogether
    source = Counting(other)
    second, warnings = store(repository, source, first.disks[0].image, [])
    assert len(warnings) == 1
    assert warnings[0].startswith("disk vda was read whole")
    assert source.read_bytes >= len(other)
    assert same(content_of(repository, second.disks[0].image), other)


def test_after_a_resize_everything_is_read(repository: Repository) -> None:
    old = os.urandom(50 * CHUNK)
    first, _ = store(repository, BytesReader(old))
    for new in (old + os.urandom(CHUNK), old[: 40 * CHUNK]):
        source = Counting(new)
        second, warnings = store(repository, source, first.disks[0].image, [])
        assert "bytes now" in warnings[0]
        assert source.read_bytes == len(new)
        assert same(content_of(repository, second.disks[0].image), new)


@pytest.mark.parametrize("extent", [Extent(60 * CHUNK, 1), Extent(-5, 10), Extent(0, -1)])
def test_ranges_outside_of_the_disk_are_of_another_one(repository: Repository, extent: Extent) -> None:
    old = os.urandom(60 * CHUNK)
    first, _ = store(repository, BytesReader(old))
    second, warnings = store(repository, Counting(old), first.disks[0].image, [extent])
    assert "leaves the image" in warnings[0]
    assert second.disks[0].image == first.disks[0].image


def test_a_chunk_that_was_lost_is_read_though_it_did_not_change(repository: Repository) -> None:
    old = os.urandom(64 * CHUNK)
    first, _ = store(repository, BytesReader(old))
    for key in [key for key in repository.storage.raw if key.startswith("packs/")]:  # type: ignore[attr-defined]
        repository.storage.delete(key)
    source = Counting(old)
    second, _ = store(repository, source, first.disks[0].image, [])
    assert source.read_bytes == len(old)
    assert not repository.verify(second.backup).findings


def test_a_block_that_became_zero_or_unallocated_restores_as_zeros(repository: Repository) -> None:
    old = os.urandom(64 * CHUNK)
    first, _ = store(repository, BytesReader(old))
    new = bytes(8 * CHUNK) + old[8 * CHUNK : 32 * CHUNK] + bytes(32 * CHUNK)
    source = Extents(new, [(0, 32 * CHUNK)])  # its second half is a hole now, of which the hint says nothing
    second, warnings = store(repository, source, first.disks[0].image, [Extent(0, 8 * CHUNK)])
    assert not warnings
    assert same(content_of(repository, second.disks[0].image), new)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    chunks=st.integers(1, 90),
    tail=st.integers(0, CHUNK - 1),
    rounds=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    hinted=st.booleans(),
    encrypted=st.booleans(),
)
def test_any_chain_of_changes_comes_back(
    seed: int, chunks: int, tail: int, rounds: list[int], hinted: bool, encrypted: bool
) -> None:
    from tests.test_repository_roundtrip import CHEAP

    repository = Repository.create(Memory(), "x" if encrypted else None, chunks=SMALL, key_cost=CHEAP)
    rng = random.Random(seed)
    content = rng.randbytes(chunks * CHUNK + tail)
    manifest, _ = store(repository, BytesReader(content))
    history = [(manifest.disks[0].image, content)]
    for number, places in enumerate(rounds):
        content, changed = changed_copy(content, seed + number, places)
        base = rng.choice(history)[0] if not hinted else history[-1][0]
        manifest, warnings = store(repository, BytesReader(content), base, changed if hinted else None)
        assert not warnings
        history.append((manifest.disks[0].image, content))
    again = Repository.open(repository.storage, "x" if encrypted else None)
    for image, expected in history:
        assert same(content_of(again, image), expected)
    assert not again.check(read_data=True).damaged


class Nodes:
    """A node store in memory, which counts what it is given."""

    def __init__(self, repository: Repository) -> None:
        self.vault = repository.vault
        self.contents: dict[bytes, bytes] = {}
        self.bytes = 0

    def id_of(self, content: bytes) -> bytes:
        from vmsnap.repository.format import BlobKind

        return self.vault.chunk_id(BlobKind.TREE, content)

    def knows(self, node: bytes) -> bool:
        return node in self.contents

    def store(self, content: bytes) -> bytes:
        node = self.id_of(content)
        if node not in self.contents:
            self.contents[node] = content
            self.bytes += len(content)
        return node


class Old:
    """A base tree in a `Nodes`."""

    def __init__(self, nodes: Nodes, image: ImageRecord) -> None:
        class Blobs:
            def read(self, _kind: object, node: bytes, _limit: int) -> bytes:
                return nodes.contents[node]

            def read_many(self, _kind: object, wanted: list[tuple[bytes, int]]) -> Iterable[tuple[int, bytes]]:
                return [(at, nodes.contents[want[0]]) for at, want in enumerate(wanted)]

        self.image = image
        self.tree = TreeReader(Blobs())  # type: ignore[arg-type]

    def node(self, level: int, number: int):  # type: ignore[no-untyped-def]
        return self.tree.find(self.image, level, number)


def test_a_scattered_change_of_a_hundredth_of_a_tebibyte_costs_little(repository: Repository) -> None:
    # A 64th of it here: what it costs is proportional.
    chunk_bytes, fanout = ChunkSizes().disk, ChunkSizes().fanout
    chunks = (1 << 40) // chunk_bytes // 64
    rng = random.Random(3)
    ids = bytearray(rng.randbytes(chunks * ID_BYTES))
    nodes = Nodes(repository)
    first = TreeBuilder(chunks * chunk_bytes, chunk_bytes, fanout, nodes)
    first.append(bytes(ids))
    image = first.finish()
    whole = nodes.bytes
    costs = []
    for _ in range(12):
        for chunk in rng.sample(range(chunks), chunks // 100):
            ids[chunk * ID_BYTES : (chunk + 1) * ID_BYTES] = rng.randbytes(ID_BYTES)
        nodes.bytes = 0
        builder = TreeBuilder(chunks * chunk_bytes, chunk_bytes, fanout, nodes, Old(nodes, image))
        builder.append(bytes(ids))
        image = builder.finish()
        costs.append(nodes.bytes)
    # 2.6 of the 256 chunks of a node change; its difference has 42 bytes, and 34 for each.
    assert costs[0] * 64 < 6 << 20
    assert max(costs) < whole // 4
    read = TreeReader(Old(nodes, image).tree._blobs)
    found = b"".join(
        loaded.ids for number in range(chunks // fanout) if (loaded := read.find(image, 1, number)) is not None
    )
    assert found == bytes(ids)


def test_no_node_stands_on_more_than_so_many_differences(repository: Repository) -> None:
    content = os.urandom(64 * CHUNK)
    big = Repository.create(Memory(), chunks=ChunkSizes(disk=4096, ram=4096, state=4096, fanout=64))
    manifest, _ = store(big, BytesReader(content))
    depths = []
    for number in range(2 * MAX_DIFFERENCES + 3):
        content, _ = changed_copy(content, number, 1)
        manifest, _ = store(big, BytesReader(content), manifest.disks[0].image)
        tree = TreeReader(BlobReader(big.storage, big.vault, big.index(refresh=True)))
        image = manifest.disks[0].image
        depths.append(len(tree.load(image, root_node(image)).bases))
    assert max(depths) == MAX_DIFFERENCES
    assert depths[0] == 1
    assert 1 in depths[1:]
    assert same(content_of(big, manifest.disks[0].image), content)
    assert tree_bytes(big) < len(depths) * 64 * ID_BYTES


def test_the_level_of_compression_can_be_chosen(repository: Repository) -> None:
    text = b"".join(b"%d, %x; " % (number, number * 2654435761) for number in range(40_000))
    stored = []
    for level in (-7, 1, 19):
        fresh = Repository.create(Memory(), chunks=ChunkSizes())
        fresh.compression_level = level
        manifest, _ = store(fresh, BytesReader(text))
        stored.append(manifest.stats.stored_bytes)
        assert same(content_of(fresh, manifest.disks[0].image), text)
    assert stored[0] > stored[1] > stored[2]


def test_nobody_reads_a_source_any_more_when_its_image_has_failed(repository: Repository) -> None:
    class Slow(BytesReader):
        parallel_reads = True
        closed = False
        reads_after_close = 0
        entered = threading.Event()

        def read_into(self, offset: int, buffer: memoryview) -> None:
            self.entered.set()
            time.sleep(0.02)  # as long as a disk takes: the failure comes in the middle of it
            self.reads_after_close += self.closed
            super().read_into(offset, buffer)

        def extents(self) -> Iterator[Extent]:
            yield Extent(0, 12 << 20)
            self.entered.wait(10)
            raise SnapshotError("it is lost")

        def close(self) -> None:
            self.closed = True

    source = Slow(os.urandom(16 << 20))
    with repository.writer() as writer:
        with pytest.raises(SnapshotError), source:
            writer.add_image("disk vda", source, ImageKind.DISK)
        with pytest.raises(RepositoryError, match="cannot be committed"):
            writer.commit(BackupFields(vm="vm001", hypervisor="x", mode="live"))
    assert source.closed
    assert source.reads_after_close == 0
    assert repository.list() == []
