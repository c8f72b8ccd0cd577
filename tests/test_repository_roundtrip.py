"""What is stored comes back, byte for byte, and costs only what is new."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_storage_contract import Memory
from vmsnap.errors import AlreadyExists, HypervisorError, ProtocolError, RepositoryError, StorageError, UsageError
from vmsnap.model import Extent, Moment
from vmsnap.repository import (
    BackupFields,
    BytesReader,
    ChunkSizes,
    DiskImage,
    ImageKind,
    ImageReader,
    ImageRecord,
    Manifest,
    MemoryImage,
    Repository,
    SparseFileReader,
)
from vmsnap.repository.keys import KeyCost
from vmsnap.repository.sources import runs_to_read
from vmsnap.roles import DiskReader
from vmsnap_storage_backends.local import LocalStorage

SMALL = ChunkSizes(disk=4096, ram=4096, state=4096, fanout=4)
CHEAP = KeyCost(time_cost=1, memory_kib=64, lanes=1)


class Extents(BytesReader):
    """Bytes of which only the given extents may be read."""

    def __init__(self, content: bytes, data: list[tuple[int, int]]) -> None:
        super().__init__(content)
        self.data = data

    def extents(self) -> Iterator[Extent]:
        at = 0
        for start, end in self.data:
            if start > at:
                yield Extent(at, start - at, zero=True)
            yield Extent(start, end - start)
            at = end
        if at < self.size_bytes:
            yield Extent(at, self.size_bytes - at, zero=True)


def back_up(repository: Repository, *sources: DiskReader, vm: str = "vm001") -> Manifest:
    with repository.writer() as writer:
        disks = []
        for number, source in enumerate(sources):
            image = writer.add_image(f"disk {number}", source, ImageKind.DISK)
            disks.append(DiskImage(f"disk{number}", image.size_bytes, "raw", "/x", "file", image))
        return writer.commit(BackupFields(vm=vm, hypervisor="simulated", mode="live", disks=tuple(disks)))


def content_of(repository: Repository, image: ImageRecord) -> bytes:
    buffer = bytearray(image.size_bytes)
    repository.reader(image).read_into(0, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture(params=[None, "correct horse"], ids=["plain", "encrypted"])
def repository(request: pytest.FixtureRequest) -> Repository:
    return Repository.create(Memory(), request.param, chunks=SMALL, key_cost=CHEAP)


pieces = st.lists(
    st.tuples(st.integers(0, 30_000), st.sampled_from(["random", "text", "zeros"]), st.integers(1, 20_000)), max_size=6
)


def build(parts: list[tuple[int, str, int]], tail: int) -> tuple[bytes, list[tuple[int, int]]]:
    content = bytearray()
    data = []
    for hole, what, length in parts:
        content += bytes(hole)
        fill = {"random": os.urandom(length), "text": (b"abcdefg\n" * length)[:length], "zeros": bytes(length)}[what]
        data.append((len(content), len(content) + length))
        content += fill
    return bytes(content + bytes(tail)), data


@settings(max_examples=60, deadline=None)
@given(parts=pieces, tail=st.integers(0, 100_000), encrypted=st.booleans(), ranges=st.lists(st.integers(0, 10**6)))
def test_any_content_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[int, str, int]],
    tail: int,
    encrypted: bool,
    ranges: list[int],
) -> None:
    content, data = build(parts, tail)
    repository = Repository.create(Memory(), "x" if encrypted else None, chunks=SMALL, key_cost=CHEAP)
    manifest = back_up(repository, Extents(content, data))
    image = repository.manifest(manifest.backup).disks[0].image
    reader = repository.reader(image, "disk0")
    assert content_of(repository, image) == content
    path = tmp_path_factory.mktemp("restored") / "disk"
    reader.restore_to_file(path)
    assert path.read_bytes() == content
    at = 0
    for extent in reader.extents():
        assert extent.offset == at
        assert extent.length > 0
        at += extent.length
        if extent.zero:
            assert not any(content[extent.offset : at])
    assert at == len(content)
    for start in ranges:
        start %= len(content) + 1
        buffer = bytearray(min(5000, len(content) - start))
        reader.read_into(start, memoryview(buffer))
        assert buffer == content[start : start + len(buffer)]
    assert not repository.check(read_data=True).findings
    assert not repository.verify(manifest.backup).findings


@settings(max_examples=200, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 400), max_size=12, unique=True).map(sorted),
    flags=st.lists(st.booleans(), min_size=13, max_size=13),
    size=st.integers(0, 500),
    run=st.integers(1, 5),
)
def test_every_chunk_comes_once_and_all_data_is_read(cuts: list[int], flags: list[bool], size: int, run: int) -> None:
    edges = [0, *[cut for cut in cuts if 0 < cut < size], size]
    extents = [Extent(a, b - a, zero) for a, b, zero in zip(edges, edges[1:], flags, strict=False) if b > a]

    class Source(BytesReader):
        def extents(self) -> Iterator[Extent]:
            yield from extents

    source = Source(bytes(size))
    at, read = 0, set()
    for first, count, data in runs_to_read(source, "disk", 16, run):
        assert first == at
        assert count > 0
        at += count
        if data:
            assert count <= run
            read |= set(range(first, first + count))
    assert at == -(-size // 16)
    needed = {
        chunk
        for extent in extents
        if not extent.zero
        for chunk in range(extent.offset // 16, -(-(extent.offset + extent.length) // 16))
    }
    assert read == needed


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, 4096), Extent(8192, 4096)],
        [Extent(0, 8192), Extent(4096, 8192)],
        [Extent(0, 4096)],
        [Extent(0, 12288), Extent(12288, 1)],
        [Extent(0, 13000)],
        [],
    ],
)
def test_extents_that_leave_a_gap_or_overlap_fail_the_backup(repository: Repository, extents: list[Extent]) -> None:
    class Gaps(BytesReader):
        def extents(self) -> Iterator[Extent]:
            yield from extents

    with pytest.raises(ProtocolError):
        back_up(repository, Gaps(b"x" * 12288))
    assert repository.list() == []


def test_an_unchanged_second_backup_stores_nothing(repository: Repository) -> None:
    content = os.urandom(1_000_000)
    first = back_up(repository, BytesReader(content))
    second = back_up(repository, BytesReader(content), vm="vm002")
    assert first.stats.stored_bytes > 1_000_000
    assert second.stats.stored_bytes == 0
    assert second.stats.read_bytes == 1_000_000
    assert first.backup != second.backup


def test_a_small_change_stores_a_chunk_and_its_path_in_the_tree(repository: Repository) -> None:
    content = bytearray(os.urandom(4096 * 4**5))
    back_up(repository, BytesReader(content))
    content[2_000_000] ^= 1
    second = back_up(repository, BytesReader(content))
    assert second.stats.stored_bytes < 4096 + 5 * 400 + 1000
    assert content_of(repository, second.disks[0].image) == content


def test_equal_chunks_are_stored_once(repository: Repository) -> None:
    chunk = os.urandom(4096)
    manifest = back_up(repository, BytesReader(chunk * 2000))
    assert manifest.stats.stored_bytes < 12_000
    assert content_of(repository, manifest.disks[0].image) == chunk * 2000


def test_a_block_that_became_zero_restores_as_zero(repository: Repository) -> None:
    content = bytearray(os.urandom(100_000))
    back_up(repository, BytesReader(content))
    content[8192:40960] = bytes(40960 - 8192)
    second = back_up(repository, BytesReader(content))
    assert content_of(repository, second.disks[0].image) == content
    assert Extent(8192, 32768, zero=True) in list(repository.reader(second.disks[0].image).extents())


def test_a_sparse_tebibyte_costs_nothing() -> None:
    class Tebibyte(DiskReader):
        size_bytes = 1 << 40

        def extents(self) -> Iterator[Extent]:
            yield Extent(0, 1 << 39, zero=True)
            yield Extent(1 << 39, 4096)
            yield Extent((1 << 39) + 4096, (1 << 39) - 4096, zero=True)

        def read_into(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = bytes(len(buffer))
            if offset == 1 << 39:
                buffer[:4] = b"data"

        def close(self) -> None:
            pass

    repository = Repository.create(Memory())
    manifest = back_up(repository, Tebibyte())
    assert manifest.stats.read_bytes == ChunkSizes().disk
    assert manifest.stats.stored_bytes < 4096
    reader = repository.reader(manifest.disks[0].image)
    assert [extent.zero for extent in reader.extents()] == [True, False, True]
    buffer = bytearray(8)
    reader.read_into((1 << 39) - 2, memoryview(buffer))
    assert buffer == b"\0\0data\0\0"
    assert not repository.check().findings


def test_sparse_files_are_read_and_restored_sparse(tmp_path: Path, repository: Repository) -> None:
    path, copy = tmp_path / "ram", tmp_path / "copy"
    size = 64 << 20
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 10_000)
        file.seek(40 << 20)
        file.write(os.urandom(50_000))
    with SparseFileReader(path, size) as source:
        manifest = back_up(repository, source)
    assert manifest.stats.read_bytes < 100_000
    seen: list[tuple[int, int | None]] = []
    reader = repository.reader(manifest.disks[0].image)
    reader.restore_to_file(copy, lambda done, total: seen.append((done, total)))
    assert copy.read_bytes() == path.read_bytes() + bytes(size - path.stat().st_size)
    assert copy.stat().st_blocks * 512 < 200_000
    assert copy.stat().st_mode & 0o777 == 0o600
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


def test_a_file_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError):
        SparseFileReader(tmp_path / "none", 10)


def test_restore_never_overwrites(tmp_path: Path, repository: Repository) -> None:
    manifest = back_up(repository, BytesReader(b"new" * 1000))
    path = tmp_path / "disk"
    path.write_bytes(b"mine")
    reader = repository.reader(manifest.disks[0].image)
    with pytest.raises(AlreadyExists):
        reader.restore_to_file(path)
    assert path.read_bytes() == b"mine"
    with pytest.raises(StorageError):
        reader.restore_to_file(tmp_path / "no folder" / "disk")
    with pytest.raises(StorageError):
        reader.read_into(2999, memoryview(bytearray(2)))


def test_progress_reaches_the_size(repository: Repository) -> None:
    seen: list[tuple[int, int | None]] = []
    with repository.writer() as writer:
        writer.add_image(
            "disk", Extents(b"x" * 50_000 + bytes(50_001), [(0, 50_000)]), ImageKind.DISK, lambda *at: seen.append(at)
        )
    assert seen == sorted(seen)
    assert seen[-1] == (100_001, 100_001)


def test_everything_of_a_manifest_comes_back(repository: Repository) -> None:
    with repository.writer() as writer:
        fields = BackupFields(
            vm="vm001",
            hypervisor="qemu",
            mode="live",
            definition={"argv": ["-m", "512"], "nested": [1, 2.5, None, {"x": "ü"}]},
            disks=(DiskImage("virtio-disk0", 5, "qcow2", "/images/a b", "qcow2", writer.add_blob("x", b"12345")),),
            memory=(MemoryImage("0000:00:02.0/vga.vram", 4096, writer.add_blob("y", b"")),),
            device_state=writer.add_blob("device state", b"QEVM" * 10_000),
            capture="cow",
            moments=(Moment("pause", 1, 2, "qemu:STOP"),),
            pause_seconds=0.0123,
            resume_flag=True,
            duplicate_details={"a": 1},
            memory_bytes=512 << 20,
            tags=("nightly", "two words"),
            hypervisor_version="10.0",
        )
        manifest = writer.commit(fields, seconds=1.5, instant_ns=1_795_399_530_000_000_000)
    assert manifest.time == "2026-11-23T02:05:30Z"
    assert manifest.backup.startswith("vm001-20261123T020530Z-")
    assert manifest.stats.seconds == 1.5
    assert repository.manifest(manifest.backup) == manifest
    assert repository.list() == [manifest]
    assert all(getattr(manifest, name) == getattr(fields, name) for name in BackupFields.__dataclass_fields__)
    assert manifest.device_state
    assert content_of(repository, manifest.device_state) == b"QEVM" * 10_000


def test_a_writer_that_was_left_leaves_no_backup_no_pack_and_no_thread(repository: Repository) -> None:
    before = threading.active_count()
    keys = {info.key for info in repository.storage.list()}
    with pytest.raises(KeyboardInterrupt), repository.writer() as writer:
        writer.add_image("disk", BytesReader(os.urandom(40 << 20)), ImageKind.DISK)
        raise KeyboardInterrupt
    assert {info.key for info in repository.storage.list()} == keys
    assert threading.active_count() == before
    with pytest.raises(RepositoryError):
        writer.commit(BackupFields(vm="x", hypervisor="", mode="live"))
    with pytest.raises(RepositoryError):
        writer.add_blob("x", b"")
    assert repository.list() == []


def test_a_source_that_fails_fails_the_backup(repository: Repository) -> None:
    class Fails(BytesReader):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset > 10 << 20:
                raise HypervisorError("the snapshot is lost")
            super().read_into(offset, buffer)

    with repository.writer() as writer:
        with pytest.raises(HypervisorError, match="lost"):
            writer.add_image("disk", Fails(os.urandom(20 << 20)), ImageKind.DISK)
        with pytest.raises(RepositoryError):
            writer.commit(BackupFields(vm="x", hypervisor="", mode="live"))
    assert repository.list() == []


@pytest.mark.parametrize("vm", ["../x", "", "a/b", ".x", "x" * 65, "a b"])
def test_a_vm_name_that_leaves_its_folder_is_refused(repository: Repository, vm: str) -> None:
    with pytest.raises(UsageError):
        back_up(repository, vm=vm)
    assert repository.list() == []


def test_upper_case_names_keep_their_case(repository: Repository) -> None:
    first, second = back_up(repository, vm="WEB"), back_up(repository, vm="web")
    assert {manifest.vm for manifest in repository.list()} == {"WEB", "web"}
    assert repository.manifest(first.backup).vm == "WEB"
    assert repository.manifest(second.backup).vm == "web"
    assert repository.manifest("WEB").backup == first.backup


def test_backups_at_the_same_time_need_no_lock(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "r"))
    repository = Repository.create(storage, chunks=SMALL)
    shared = os.urandom(2_000_000)
    contents = [shared + os.urandom(500_000) for _ in range(4)]
    manifests: list[Manifest] = []
    threads = [
        threading.Thread(target=lambda c=content: manifests.append(back_up(repository, BytesReader(c))))
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Repository.open(storage)
    assert not again.check(read_data=True).findings
    assert sorted(content_of(again, manifest.disks[0].image) for manifest in manifests) == sorted(contents)


def test_a_backup_made_by_somebody_else_meanwhile_can_be_read(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "r"))
    ours = Repository.create(storage, chunks=SMALL)
    back_up(ours, BytesReader(b"1" * 10_000))
    theirs = back_up(Repository.open(storage), BytesReader(b"2" * 10_000))
    assert content_of(ours, ours.manifest(theirs.backup).disks[0].image) == b"2" * 10_000
    assert back_up(ours, BytesReader(b"2" * 10_000)).stats.stored_bytes == 0


def test_images_can_be_read_as_a_disk_is(repository: Repository) -> None:
    content = os.urandom(30_000) + bytes(70_000)
    first = back_up(repository, BytesReader(content))
    with repository.reader(first.disks[0].image) as reader:
        assert isinstance(reader, ImageReader)
        second = back_up(repository, reader)
    assert second.disks[0].image == first.disks[0].image


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def test_memory_is_bounded(tmp_path: Path) -> None:
    code = """
import os, resource, sys
from vmsnap_storage_backends.local import LocalStorage
from vmsnap.repository import *
class Random(BytesReader):
    size_bytes = 600 << 20
    def __init__(self): pass
    def extents(self):
        from vmsnap.model import Extent
        yield Extent(0, self.size_bytes)
    def read_into(self, offset, buffer): buffer[:] = os.urandom(len(buffer))
class Drain(LocalStorage):
    def put(self, key, data, *, if_absent=False):
        super().put(key, b"" if key.startswith("packs") else data, if_absent=if_absent)
r = Repository.create(Drain(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with r.writer() as w:
    w.add_image("disk", Random(), ImageKind.DISK)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    result = run_python(code, str(tmp_path / "r"))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 260


def test_listing_imports_nothing_heavy(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "r"))
    repository = Repository.create(storage, chunks=SMALL)
    for _ in range(20):
        back_up(repository, BytesReader(b"x" * 5000))
    code = """
import sys
from vmsnap_storage_backends.local import LocalStorage
from vmsnap.repository import Repository
print(len(Repository.open(LocalStorage(sys.argv[1])).list()))
heavy = {"numpy", "backports.zstd", "cryptography", "argon2", "hypothesis"} & set(sys.modules)
assert not heavy, heavy
"""
    result = run_python(code, str(tmp_path / "r"))
    assert (result.stdout, result.stderr) == ("20\n", "")
