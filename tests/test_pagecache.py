"""What is read and written quietly leaves the page cache as it was: seen by the kernel's own count of cached pages."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.test_repository_roundtrip import back_up
from vmsnap.directio import direct_buffer
from vmsnap.pagecache import QuietReader, QuietWriter, forget, write_all
from vmsnap.rawtarget import RawTarget
from vmsnap.repository import Repository, SparseFileReader
from vmsnap.roles.filereader import FileReader
from vmsnap.testing.rigs import same
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


@pytest.fixture(params=[True, False], ids=["direct", "as usual"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can do direct I/O; that it cannot is feigned, by the open that fails there."""
    if not request.param:
        monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)
    return bool(request.param)


@pytest.mark.parametrize("step", [8 * MIB, MIB, 100_000])
@pytest.mark.usefixtures("direct")
def test_reading_leaves_the_cache_as_it_was(path: Path, data: bytes, step: int) -> None:
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


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (PAGE, 4096), (4 * MIB + 100, 5000), (1, SIZE - 1), (0, SIZE)])
def test_ranges_are_read_as_they_are(path: Path, data: bytes, offset: int, length: int) -> None:
    cached = make_hot(path)
    with path.open("rb") as file, closing(QuietReader(file.fileno())) as reader:
        assert same(reader.read(offset, length), data[offset : offset + length])
        assert same(reader.read(SIZE - 7, 1000), data[-7:])
        assert reader.read(SIZE + 5, 10) == b""
    assert same(resident(path), cached)


# In one piece that begins at a page and in one that does not, in many, more than fits into the buffer, and too little.
PIECES: dict[str, Callable[[bytes], list[bytes | memoryview]]] = {
    "page": lambda data: [in_pages(data)],
    "elsewhere": lambda data: [memoryview(bytearray(b"-" + data))[1:]],
    "bytes": lambda data: [data],
    "many": lambda data: [data[at : at + 130_000] for at in range(0, len(data), 130_000)],
    "little": lambda data: [data[at : at + 1000] for at in range(0, 300_000, 1000)],
}


def in_pages(data: bytes) -> memoryview:
    memory = direct_buffer(len(data))
    memory[:] = data
    return memory


@pytest.mark.parametrize("offset", [0, 3 * PAGE, 100])
@pytest.mark.parametrize("pieces", PIECES)
def test_what_is_written_is_there_and_all_around_it_as_before(
    folder: Path, data: bytes, pieces: str, offset: int, direct: bool
) -> None:
    path = folder / "written"
    before = b"old" * (SIZE // 2)
    path.write_bytes(before)
    make_cold(path)
    parts = PIECES[pieces](data)
    with path.open("r+b") as file:
        with closing(QuietWriter(file.fileno())) as writer:
            writer.write_all(parts, offset)
        cached = sum(resident(path)) * PAGE
        os.fsync(file.fileno())
        forget(file.fileno())
    content = b"".join(parts)
    assert same(path.read_bytes(), before[:offset] + content + before[offset + len(content) :])
    if direct and offset % PAGE == 0 and len(content) >= MIB:
        assert cached <= PAGE, "all but the last, incomplete page went past the cache"


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """An ext4 file system of 24 MiB, which can do direct I/O."""
    image, place = folder / "small.img", folder / "small"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_by_direct_writes_too(small_disk: Path) -> None:
    with (small_disk / "file").open("wb") as file, closing(QuietWriter(file.fileno())) as writer:
        with pytest.raises(OSError) as caught:
            for number in range(16):
                writer.write_all([in_pages(os.urandom(4 * MIB))], number * 4 * MIB)
        assert caught.value.errno == errno.ENOSPC


def test_a_forked_child_reads_with_memory_of_its_own(path: Path, data: bytes) -> None:
    assert same(read_quietly(path, 100_000), data)  # by way of this thread's buffer
    child = os.fork()
    if not child:
        whole = False
        try:
            whole = read_quietly(path, 100_000) == data
        finally:
            os._exit(0 if whole else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_any_pieces_are_written_one_after_the_other(tmp_path: Path) -> None:
    pieces = [b"", b"a" * 10, b"", *(bytes([number % 251]) * (number % 7) for number in range(3000)), b"end"]
    with (tmp_path / "file").open("w+b") as file:
        write_all(file.fileno(), pieces, 5)
    assert same((tmp_path / "file").read_bytes(), bytes(5) + b"".join(pieces))
