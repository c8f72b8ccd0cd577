"""What is read and written quietly leaves the page cache as it was: seen by the kernel's own count of cached pages."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_repository_roundtrip import back_up
from vmsnap import pagecache
from vmsnap.pagecache import QuietReader, forget, write_all
from vmsnap.rawtarget import RawTarget
from vmsnap.repository import Repository, SparseFileReader
from vmsnap.testing.rigs import same
from vmsnap_drivers.snapshots.file import FileReader
from vmsnap_storage_backends.local import LocalStorage

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 24 * MIB + 1234
HOT = [(0, 4 * PAGE), (3 * MIB, MIB), (9 * MIB + 7 * PAGE, PAGE), (23 * MIB, 2 * PAGE)]
"""What the host has in its cache before."""


def resident(path: Path) -> bytes:
    """A byte a page, by mincore(2) over a mapping of the whole file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        address = libc.mmap(None, size, 1, 1, fd, 0)
        vector = ctypes.create_string_buffer(-(-size // PAGE))
        assert libc.mincore(address, size, vector) == 0
        libc.munmap(address, size)
    finally:
        os.close(fd)
    return vector.raw


def make_cold(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    assert not any(resident(path))


def make_hot(path: Path) -> bytes:
    """Have the host cache `HOT`, and no more; returns what is cached then."""
    make_cold(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, length in HOT:
            os.pread(fd, length, offset)
    finally:
        os.close(fd)
    cached = resident(path)
    assert sum(cached) == sum(-(-length // PAGE) for _, length in HOT)
    return cached


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder on a disk: a temporary one may be in memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="vmsnap-test-") as made:
        kind = subprocess.run(["stat", "-f", "-c", "%T", made], capture_output=True, text=True, check=True).stdout
        if kind.strip() == "tmpfs":
            pytest.skip("/var/tmp is in memory here: nothing of it can leave the cache")
        yield Path(made)


@pytest.fixture(scope="module")
def data() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def path(folder: Path, data: bytes) -> Path:
    path = folder / "disk"
    path.write_bytes(data)
    return path


def read_quietly(path: Path, step: int) -> bytes:
    content = bytearray(SIZE)
    fd = os.open(path, os.O_RDONLY)
    reader = QuietReader(fd)
    try:
        with memoryview(content) as view:
            for at in range(0, SIZE, step):
                part, done = view[at : at + step], 0
                while done < len(part):
                    done += reader.read_into(part[done:], at + done) or SIZE
        assert reader.read_into(memoryview(bytearray(10)), SIZE) == 0
    finally:
        reader.close()
        os.close(fd)
    return bytes(content)


def no_direct(_fd: int) -> int:
    return -1


@pytest.mark.parametrize("step", [8 * MIB, MIB, 100_000])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "dropped"])
def test_reading_leaves_the_cache_as_it_was(
    path: Path, data: bytes, step: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(pagecache, "_open_direct", no_direct)
    cached = make_hot(path)
    assert same(read_quietly(path, step), data)
    assert same(resident(path), cached)


def test_what_another_process_has_just_written_is_read(path: Path, data: bytes) -> None:
    make_cold(path)
    with path.open("r+b") as file:  # dirty, not yet on the disk
        file.seek(5 * MIB)
        file.write(b"new" * 1000)
    expected = data[: 5 * MIB] + b"new" * 1000 + data[5 * MIB + 3000 :]
    assert same(read_quietly(path, 4 * MIB), expected)


def test_a_file_in_memory_is_read_and_written(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        path = Path(made, "ram")
        with path.open("w+b") as file:
            write_all(file.fileno(), [data], 0)
            os.fsync(file.fileno())
            forget(file.fileno())
        assert same(read_quietly(path, 3 * MIB), data)


READERS: dict[str, Callable[[Path], SparseFileReader | FileReader]] = {
    "core": lambda path: SparseFileReader(path, SIZE),
    "file mechanism": lambda path: FileReader(path, SIZE),
}


@pytest.mark.parametrize("kind", READERS)
def test_sources_are_read_quietly(path: Path, data: bytes, kind: str) -> None:
    cached = make_hot(path)
    content = bytearray(SIZE)
    with READERS[kind](path) as reader, memoryview(content) as view:
        for at in range(0, SIZE, 4 * MIB):
            reader.read_into(at, view[at : at + 4 * MIB])
    assert same(content, data)
    assert same(resident(path), cached)


def test_neither_a_backup_nor_a_restore_is_seen_in_the_cache(folder: Path, path: Path, data: bytes) -> None:
    storage = LocalStorage(str(folder / "repository"))
    repository = Repository.create(storage)
    cached = make_hot(path)
    with SparseFileReader(path, SIZE) as source:
        image = back_up(repository, source).disks[0].image
    assert same(resident(path), cached)
    packs = [folder / "repository" / info.key for info in storage.list("packs/") if info.size_bytes > MIB]
    assert packs and not any(map(any, map(resident, packs)))
    copy = folder / "copy"
    repository.reader(image).restore_to_file(copy)
    with path.open("r+b") as file:
        file.write(b"other")
    make_cold(path)
    with RawTarget(path) as target:
        assert repository.reader(image).restore_onto(target).written_bytes == image.chunk_bytes
    for file in (copy, path, *packs):
        # Small reads, of tree nodes and single chunks, may stay.
        assert sum(resident(file)) * PAGE <= MIB, file
    assert same(copy.read_bytes(), data)
    assert same(path.read_bytes(), data)


def test_any_pieces_are_written_one_after_the_other(tmp_path: Path) -> None:
    pieces = [b"", b"a" * 10, b"", *(bytes([number % 251]) * (number % 7) for number in range(3000)), b"end"]
    with (tmp_path / "file").open("w+b") as file:
        write_all(file.fileno(), pieces, 5)
    assert same((tmp_path / "file").read_bytes(), bytes(5) + b"".join(pieces))
