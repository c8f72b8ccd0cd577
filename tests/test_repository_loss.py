"""What a backup has lost is noted in it, refused where it would be read, and read as zeros by those who accept it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.damage import flip, image_with, make, manifest_with, pack_of, seal_plain
from tests.test_repository_roundtrip import SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import DamageFound
from vmsnap.export import export_disks
from vmsnap.repository import BytesReader, LostRange, Manifest, MemoryImage, Repository
from vmsnap.repository import loss as loss_module
from vmsnap.repository.format import BlobKind
from vmsnap.repository.loss import is_within, joined
from vmsnap.repository.manifest import open_manifest, seal_manifest
from vmsnap.repository.nodes import encode_list


@pytest.fixture
def halved(tmp_path: Path) -> Iterator[tuple[Repository, Manifest, list[bytes]]]:
    """A backup of two disks, one of which has lost a chunk."""
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    disks = [os.urandom(40000), os.urandom(20000)]
    back_up(repository, *map(BytesReader, disks))
    key, offset = pack_of(repository, disks[0][8192:12288])
    flip(storage, key, offset)
    again = Repository.open(storage)
    again.repair()
    yield again, again.list()[0], disks


def test_what_is_lost_is_refused_and_read_as_zeros_when_accepted(
    halved: tuple[Repository, Manifest, list[bytes]], tmp_path: Path
) -> None:
    repository, manifest, disks = halved
    with pytest.raises(DamageFound, match="4096 bytes of disk disk0 from offset 8192") as caught:
        export_disks(repository, manifest.backup, tmp_path / "out")
    assert "--accept-loss" in caught.value.cure
    assert not (tmp_path / "out").exists()
    export_disks(repository, manifest.backup, tmp_path / "out", accept_loss=True)
    expected = disks[0][:8192] + bytes(4096) + disks[0][12288:]
    assert (tmp_path / "out" / "disk0.raw").read_bytes() == expected
    assert (tmp_path / "out" / "disk1.raw").read_bytes() == disks[1]


def test_a_disk_that_lost_nothing_needs_no_option(
    halved: tuple[Repository, Manifest, list[bytes]], tmp_path: Path
) -> None:
    repository, manifest, disks = halved
    export_disks(repository, manifest.backup, tmp_path / "out", devices=["disk1"])
    assert (tmp_path / "out" / "disk1.raw").read_bytes() == disks[1]


def test_a_loss_that_is_made_good_needs_no_option(
    halved: tuple[Repository, Manifest, list[bytes]], tmp_path: Path
) -> None:
    repository, manifest, disks = halved
    back_up(repository, BytesReader(disks[0]))
    export_disks(repository, manifest.backup, tmp_path / "out")
    assert (tmp_path / "out" / "disk0.raw").read_bytes() == disks[0]


def test_accepting_a_loss_accepts_no_other_damage(
    halved: tuple[Repository, Manifest, list[bytes]], tmp_path: Path
) -> None:
    repository, manifest, disks = halved
    key, offset = pack_of(repository, disks[0][:4096])
    flip(repository.storage, key, offset)  # type: ignore[arg-type]
    with pytest.raises(DamageFound, match="from 0 to 4096"):
        export_disks(repository, manifest.backup, tmp_path / "out", accept_loss=True)


def test_a_lost_tree_node_is_read_around_too(tmp_path: Path) -> None:
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    content = os.urandom(100_000)
    manifest = back_up(repository, BytesReader(content))
    # The second node above the chunks: four of them.
    ids = [repository.vault.chunk_id(BlobKind.DATA, content[at : at + 4096]) for at in range(16384, 32768, 4096)]
    key, offset = pack_of(repository, encode_list(1, b"".join(ids)), BlobKind.TREE)
    flip(storage, key, offset)
    again = Repository.open(storage)
    assert [(t.offset, t.lost_bytes) for t in again.repair().lost] == [(16384, 16384)]
    export_disks(again, manifest.backup, tmp_path, accept_loss=True)
    expected = content[:16384] + bytes(16384) + content[32768:]
    assert (tmp_path / "disk0.raw").read_bytes() == expected
    noted = again.manifest(manifest.backup)
    reader = again.reader(noted.disks[0].image, lost=noted.lost)
    buffer = bytearray(len(content))
    reader.read_into(0, memoryview(buffer))
    assert buffer == expected
    with pytest.raises(DamageFound, match="from 16384 to 32768"):
        content_of(again, noted.disks[0].image)


def test_lost_ranges_stand_in_the_manifest_and_are_checked() -> None:
    _, repository, _, _ = make(None)
    memory = (MemoryImage("ram", 4096, image_with(size_bytes=8192, depth=1)),)
    good = (LostRange("disk disk0", 0, 5), LostRange("memory ram", 0, 4096), LostRange("memory ram", 4096, 4096))
    manifest = manifest_with(lost=good, memory=memory)
    key, data = seal_manifest(repository.vault, manifest)
    assert open_manifest(repository.vault, key, data) == manifest
    assert manifest.lost_bytes == 8197
    assert manifest.lost_of("memory ram") == good[1:]
    for bad in (
        (LostRange("disk disk1", 0, 5),),
        (LostRange("disk disk0", 0, 6),),
        (LostRange("disk disk0", -1, 2),),
        (LostRange("disk disk0", 2, 0),),
        (LostRange("disk disk0", 1 << 62, 1 << 62),),
        (LostRange("memory ram", 4096, 4096), LostRange("memory ram", 0, 4096)),
        (LostRange("memory ram", 0, 4097), LostRange("memory ram", 4096, 4096)),
    ):
        content = seal_plain(manifest_with(lost=bad, memory=memory))
        with pytest.raises(DamageFound):
            open_manifest(repository.vault, key, repository.vault.seal_object(key, content))


def test_neighbouring_losses_are_noted_as_one_and_too_many_in_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined("p", [(0, 5), (5, 5), (20, 1)]) == (LostRange("p", 0, 10), LostRange("p", 20, 1))
    assert joined("p", []) == ()
    monkeypatch.setattr(loss_module, "MAX_RANGES", 3)
    ranges = [(0, 1), (2, 1), (10, 1), (12, 1), (100, 1), (101, 1), (104, 1)]
    assert joined("p", ranges) == (LostRange("p", 0, 3), LostRange("p", 10, 3), LostRange("p", 100, 5))


def test_a_range_is_lost_where_one_noted_range_covers_all_of_it() -> None:
    ranges = (LostRange("p", 10, 10), LostRange("p", 30, 10))
    inside = [(10, 10), (12, 3), (30, 1), (39, 1)]
    outside = [(0, 10), (9, 2), (19, 2), (20, 10), (15, 20), (40, 1), (10, 30)]
    assert [is_within(ranges, *each) for each in inside + outside] == [True] * 4 + [False] * 7
    assert not is_within((), 0, 1)
