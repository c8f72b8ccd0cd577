"""Copies between repositories: the same content under other keys, nothing read or stored twice, whole or not at all."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, Extents, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import AlreadyExists, DamageFound, ObjectNotFound, RepositoryError, StorageError, UsageError
from vmsnap.repository import (
    BackupFields,
    BytesReader,
    ChunkSizes,
    DiskImage,
    ImageKind,
    LostRange,
    Manifest,
    MemoryImage,
    Repository,
)
from vmsnap.repository.copying import CopyReport, copy_backups
from vmsnap.repository.format import MANIFESTS_PREFIX, PACKS_PREFIX, manifest_key
from vmsnap.repository.manifest import seal_manifest
from vmsnap_storage_backends.local import LocalStorage

PIECE = 4096


def noise(seed: int, chunks: int = 40) -> bytes:
    return random.Random(seed).randbytes(chunks * PIECE)


class Counting(Memory):
    """Counts the bytes that are got of packs."""

    got_bytes = 0

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, offset, length)
        if key.startswith(PACKS_PREFIX):
            self.got_bytes += len(data)
        return data


def made(passphrase: str | None, storage: Memory | None = None, chunks: ChunkSizes = SMALL) -> Repository:
    return Repository.create(storage or Memory(), passphrase, chunks=chunks, key_cost=CHEAP)


def with_cache(repository: Repository, folder: Path, passphrase: str | None = None) -> Repository:
    return Repository.open(repository.storage, passphrase, cache_dir=folder)


def same_content(source: Repository, target: Repository, backup: str) -> Manifest:
    """Compare every image of a backup, and all that its manifest says."""
    before, after = source.manifest(backup), target.manifest(backup)
    assert [part for part, _ in before.images] == [part for part, _ in after.images]
    for (_, one), (_, other) in zip(before.images, after.images, strict=True):
        assert content_of(source, one) == content_of(target, other)
        assert not bytes.fromhex(one.root).strip(b"\0") or one.root != other.root
    bare = [replace(each, disks=(), memory=(), device_state=None, origin="", vmsnap="") for each in (before, after)]
    assert bare[0] == bare[1]
    assert not target.verify(backup).findings
    return after


@pytest.mark.parametrize("keys", [(None, None), ("one", None), (None, "other"), ("one", "other"), ("same", "same")])
def test_disks_and_memory_come_through_bit_by_bit(keys: tuple[str | None, str | None]) -> None:
    source, target = made(keys[0]), made(keys[1], chunks=ChunkSizes(disk=8192, ram=8192, state=8192, fanout=8))
    disk = Extents(
        noise(1)[: 20 * PIECE] + bytes(20 * PIECE) + noise(2)[: PIECE // 2], [(0, 20 * PIECE), (163_840, 165_888)]
    )
    with source.writer() as writer:
        image = writer.add_image("disk vda", disk, ImageKind.DISK)
        ram = writer.add_image("memory", BytesReader(noise(3) + bytes(300 * PIECE) + b"end"), ImageKind.RAM)
        state = writer.add_blob("state", os.urandom(20_000))
        fields = BackupFields(
            vm="vm001",
            hypervisor="simulated",
            mode="live",
            disks=(DiskImage("vda", image.size_bytes, "raw", "/x", "file", image, mark="m1"),),
            memory=(MemoryImage("pc.ram", 4096, ram),),
            device_state=state,
            tags=("monday",),
            memory_bytes=ram.size_bytes,
            pause_seconds=0.01,
        )
        backup = writer.commit(fields).backup
    report = copy_backups(source, target)
    assert [each.backup for each in report.copied] == [backup]
    copy = same_content(source, target, backup)
    assert copy.origin == source.id
    assert not target.check(read_data=True).findings
    assert copy_backups(source, target) == CopyReport((), (backup,), ())
    assert source.sessions() == target.sessions() == []


def test_what_the_other_repository_has_is_neither_read_nor_stored(tmp_path: Path) -> None:
    storage = Counting()
    source, target = made("one", storage), with_cache(made("other"), tmp_path, "other")
    first = noise(1)
    second = first[: 30 * PIECE] + noise(2)[: 10 * PIECE]
    backups = [back_up(source, BytesReader(first)).backup, back_up(source, BytesReader(second), vm="vm002").backup]
    (one,) = copy_backups(source, target, [backups[0]]).copied
    assert one.read_bytes == len(first) <= one.stored_bytes
    storage.got_bytes = 0
    (two,) = copy_backups(source, target).copied
    # The disk of another VM: only what differs, and the tree.
    assert two.read_bytes == 10 * PIECE
    assert storage.got_bytes < 20 * PIECE
    assert two.stored_bytes < 20 * PIECE
    for backup in backups:
        same_content(source, target, backup)


@pytest.mark.parametrize("cache", [True, False])
def test_what_both_have_is_seen_without_the_cache_too(tmp_path: Path, cache: bool) -> None:
    source, target = made(None), made("other")
    first = back_up(source, BytesReader(noise(1)))
    copy_backups(source, target)
    second = back_up(source, BytesReader(noise(1)[: 39 * PIECE] + noise(5)[:PIECE]))
    fresh = with_cache(target, tmp_path, "other") if cache else target
    (copied,) = copy_backups(source, fresh, vm="vm001").copied
    assert copied.read_bytes == PIECE
    for backup in (first.backup, second.backup):
        same_content(source, target, backup)


def test_a_cache_that_is_damaged_or_of_another_is_thrown_away(tmp_path: Path) -> None:
    source, target = made("one"), with_cache(made("other"), tmp_path, "other")
    first = back_up(source, BytesReader(noise(1)))
    copy_backups(source, target)
    (folder,) = (path for path in tmp_path.rglob(source.id))
    (file,) = folder.iterdir()
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    (folder / ("0" * 32)).write_bytes(b"")
    (folder / ("1" * 32)).write_bytes(made(None).vault.seal_object("x", bytes(64)))
    second = back_up(source, BytesReader(noise(1) + noise(7)))
    copy_backups(source, target)
    assert not {"0" * 32, "1" * 32, file.name} & {path.name for path in folder.iterdir()}
    for backup in (first.backup, second.backup):
        same_content(source, target, backup)


def test_what_was_collected_in_the_other_repository_is_copied_again(tmp_path: Path) -> None:
    source, target = made("one"), with_cache(made("other"), tmp_path, "other")
    backup = back_up(source, BytesReader(noise(1))).backup
    copy_backups(source, target)
    target.forget(backup)
    target.gc()
    target.gc()
    assert not list(target.storage.list(PACKS_PREFIX))
    (copied,) = copy_backups(source, target).copied
    assert copied.read_bytes == len(noise(1))
    same_content(source, target, backup)


def test_a_copy_is_known_again_wherever_it_comes_from() -> None:
    first, second, third = made(None), made("b"), made("c")
    backup = back_up(first, BytesReader(noise(1))).backup
    copy_backups(first, second)
    copy_backups(second, third)
    assert third.manifest(backup).origin == first.id
    assert copy_backups(first, third).present == (backup,)
    assert copy_backups(third, first).present == (backup,)


def test_another_backup_of_the_same_id_is_not_overwritten() -> None:
    first, second, target = made(None), made(None), made(None)
    manifest = back_up(first, BytesReader(noise(1)))
    other = back_up(second, BytesReader(noise(2)))
    key, data = seal_manifest(second.vault, replace(other, backup=manifest.backup))
    second.storage.put(key, data)
    copy_backups(first, target)
    before = target.storage.get(manifest_key(manifest.backup))
    with pytest.raises(AlreadyExists, match="made elsewhere"):
        copy_backups(second, target, [manifest.backup])
    assert target.storage.get(manifest_key(manifest.backup)) == before


def test_a_repository_is_not_copied_to_itself() -> None:
    storage = Memory()
    made("x", storage)
    with pytest.raises(UsageError, match="same repository"):
        copy_backups(Repository.open(storage, "x"), Repository.open(storage, "x"))


def test_a_dry_run_changes_nothing() -> None:
    source, target = made(None), made(None)
    backup = back_up(source, BytesReader(noise(1))).backup
    before = [info.key for info in target.storage.list()]
    report = copy_backups(source, target, dry_run=True)
    assert (report.dry_run, [each.backup for each in report.copied]) == (True, [backup])
    assert [info.key for info in target.storage.list()] == before


def test_progress_reaches_its_end() -> None:
    source, target = made(None), made(None)
    for number in range(3):
        back_up(source, BytesReader(noise(number) + bytes(5_000_000)))
    seen: list[tuple[int, int | None]] = []
    copy_backups(source, target, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (3 * (len(noise(0)) + 5_000_000),) * 2


# -- damage


def damaged_pack(source: Repository) -> None:
    (key, *_) = sorted(
        (info.key for info in source.storage.list(PACKS_PREFIX)), key=lambda key: -source.storage.stat(key).size_bytes
    )
    data = bytearray(source.storage.get(key))
    data[len(data) // 2] ^= 1
    source.storage.put(key, bytes(data))


def test_a_damaged_backup_is_not_copied_and_the_others_are() -> None:
    source, target = made("one"), made("other")
    bad = back_up(source, BytesReader(noise(1))).backup
    damaged_pack(source)
    good = back_up(source, BytesReader(noise(2)), vm="vm002").backup
    report = copy_backups(source, target)
    assert [each.backup for each in report.copied] == [good]
    assert [backup for backup, _ in report.damaged] == [bad]
    with pytest.raises(DamageFound, match=bad):
        report.raise_if_damaged()
    assert [each.backup for each in target.list()] == [good]
    same_content(source, target, good)


def test_what_repair_noted_as_lost_is_lost_in_the_copy_too() -> None:
    source, target = made("one"), made("other")
    backup = back_up(source, BytesReader(noise(1))).backup
    damaged_pack(source)
    source.repair()
    lost = source.manifest(backup).lost
    assert lost and sum(each.length for each in lost) == PIECE
    copy_backups(source, target)
    copy = target.manifest(backup)
    assert copy.lost == lost == (LostRange("disk disk0", lost[0].offset, PIECE),)
    at = lost[0].offset
    assert content_of(target, copy.disks[0].image) == noise(1)[:at] + bytes(PIECE) + noise(1)[at + PIECE :]


def test_a_manifest_that_cannot_be_read_is_named() -> None:
    source, target = made("one"), made("other")
    backup = back_up(source, BytesReader(noise(1))).backup
    source.storage.put(manifest_key(backup), b"x" * 200)
    good = back_up(source, BytesReader(noise(2)), vm="vm002").backup
    report = copy_backups(source, target)
    assert [each.backup for each in report.copied] == [good]
    assert len(report.damaged) == 1


# -- failures


class Failing(Memory):
    """Fails from the n-th put of a pack on."""

    packs_left = 10**9

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        if key.startswith(PACKS_PREFIX):
            self.packs_left -= 1
            if self.packs_left < 0:
                raise StorageError("the cable is out")
        super().put(key, data, if_absent=if_absent)


def test_after_a_failure_only_what_is_missing_is_copied(tmp_path: Path) -> None:
    storage = Failing()
    sizes = ChunkSizes()
    source = made("one", chunks=sizes)
    target = with_cache(made("other", storage, chunks=sizes), tmp_path, "other")
    content = noise(1, 16_000)  # more than one pack
    backup = back_up(source, BytesReader(content)).backup
    storage.packs_left = 1
    with pytest.raises(StorageError, match="cable"):
        copy_backups(source, target, checkpoint_bytes=1 << 20)
    assert target.list() == []
    storage.packs_left = 10**9
    (copied,) = copy_backups(source, target).copied
    assert 0 < copied.read_bytes < len(content) - (30 << 20)
    same_content(source, target, backup)
    assert target.sessions() == source.sessions() == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from vmsnap.repository import Repository
from vmsnap.repository.copying import copy_backups
from vmsnap_storage_backends.local import LocalStorage
put, left = LocalStorage.put, int(sys.argv[4])
def counted(self, key, data, *, if_absent=False):
    global left
    put(self, key, data, if_absent=if_absent)
    if key.startswith(("packs/", "index/", "manifests/")):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
LocalStorage.put = counted
source, target = (Repository.open(LocalStorage(each), "x", cache_dir=Path(sys.argv[3])) for each in sys.argv[1:3])
copy_backups(source, target, checkpoint_bytes=100_000)
"""


def test_killed_anywhere_the_next_run_goes_on(tmp_path: Path) -> None:
    """Each run is killed after a few more objects, until one is not; what is there is whole each time."""
    source = Repository.create(LocalStorage(str(tmp_path / "one")), "x", chunks=SMALL, key_cost=CHEAP)
    target = Repository.create(LocalStorage(str(tmp_path / "other")), "x", chunks=SMALL, key_cost=CHEAP)
    backups = [back_up(source, BytesReader(noise(number, 100))).backup for number in range(3)]
    killed = 0
    for objects in range(1, 30):
        command = [
            sys.executable,
            "-c",
            _KILLED,
            tmp_path / "one",
            tmp_path / "other",
            tmp_path / "cache",
            str(objects),
        ]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        there = [each.backup for each in target.list()]
        assert set(there) <= set(backups)
        assert not target.check().damaged
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        killed += 1
    assert killed > 2
    assert there == backups
    for backup in backups:
        same_content(source, target, backup)
    target.gc()
    assert target.sessions() == []
    assert not target.check(read_data=True).findings


class Racing(Memory):
    """Deletes its sessions at the first put of a pack, as a garbage collection does that takes them for dead."""

    strikes = False

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        super().put(key, data, if_absent=if_absent)
        if self.strikes and key.startswith(PACKS_PREFIX):
            for info in list(self.list("sessions/")):
                self.delete(info.key)


def test_a_copy_whose_session_was_taken_for_dead_does_not_exist() -> None:
    storage = Racing()
    source, target = made(None), made(None, storage)
    back_up(source, BytesReader(noise(1)))
    storage.strikes = True
    with pytest.raises(RepositoryError, match="for dead"):
        copy_backups(source, target)
    assert not list(storage.list(MANIFESTS_PREFIX))


class Forgetful(Memory):
    """Says that it stored packs, and did not."""

    forgets = False

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        if not (self.forgets and key.startswith(PACKS_PREFIX)):
            super().put(key, data, if_absent=if_absent)


def test_a_copy_that_is_not_there_is_not_said_to_be_there() -> None:
    storage = Forgetful()
    source, target = made(None), made(None, storage)
    backup = back_up(source, BytesReader(noise(1))).backup
    storage.forgets = True
    with pytest.raises((RepositoryError, DamageFound, ObjectNotFound)):
        copy_backups(source, target)
    assert not list(storage.list(manifest_key(backup)))


def test_garbage_is_collected_on_both_sides_meanwhile(tmp_path: Path) -> None:
    class Collecting(Memory):
        """Collects garbage in both repositories whenever a pack was stored."""

        repositories: tuple[Repository, ...] = ()
        busy = False

        def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
            super().put(key, data, if_absent=if_absent)
            if key.startswith(PACKS_PREFIX) and self.repositories and not self.busy:
                self.busy = True
                for repository in self.repositories:
                    repository.gc()
                self.busy = False

    storage = Collecting()
    source, target = made("one"), with_cache(made("other", storage), tmp_path, "other")
    gone = back_up(source, BytesReader(noise(9))).backup
    backups = [back_up(source, BytesReader(noise(number))).backup for number in range(2)]
    source.forget(gone)
    storage.repositories = (Repository.open(source.storage, "one"), Repository.open(storage, "other"))
    copy_backups(source, target, checkpoint_bytes=50_000)
    for backup in backups:
        same_content(source, target, backup)
