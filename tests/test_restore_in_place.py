"""Writing a backup onto a disk that exists: equal afterwards, only what differs touched, never a disk in use."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_repository_roundtrip import SMALL, back_up
from tests.test_storage_contract import Memory
from vmsnap.errors import Busy, DamageFound, NotFound, StorageError, UsageError
from vmsnap.overwrite import export_onto
from vmsnap.rawtarget import RawTarget
from vmsnap.repository import BytesReader, Repository
from vmsnap.testing.rigs import same
from vmsnap_storage_backends.local import LocalStorage

CHUNK = SMALL.disk
needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs root and loop devices"
)


class Watched(RawTarget):
    """Notes the ranges that are changed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.changed: list[tuple[int, int]] = []

    def write(self, offset: int, contents: Sequence[bytes | memoryview]) -> None:
        self.changed.append((offset, offset + sum(map(len, contents))))
        super().write(offset, contents)

    def write_zeros(self, offset: int, length: int) -> None:
        self.changed.append((offset, offset + length))
        super().write_zeros(offset, length)


class Counting(Memory):
    """Counts reads; fails from the read `fails_at` on."""

    reads = 0
    fails_at: int | None = None

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self.reads += 1
        if self.fails_at is not None and self.reads >= self.fails_at:
            raise StorageError("the line is down")
        return super().get(key, offset, length)


def different_chunks(old: bytes, new: bytes) -> set[int]:
    """The chunks of `new` that `old`, cut or filled up with zeros to the same size, has otherwise."""
    old = old[: len(new)].ljust(len(new), b"\0")
    return {at // CHUNK for at in range(0, len(new), CHUNK) if old[at : at + CHUNK] != new[at : at + CHUNK]}


def chunks_of(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {number for start, end in ranges for number in range(start // CHUNK, -(-end // CHUNK))}


def content(pieces: Sequence[tuple[str, int]], tail: int, seed: int) -> bytes:
    """Chunks of data, zeros and repeated text, and a tail that is no whole chunk."""
    dice = random.Random(seed)
    make: dict[str, Callable[[int], bytes]] = {
        "new": lambda n: dice.randbytes(n * CHUNK),
        "same": lambda n: random.Random(n).randbytes(n * CHUNK),
        "zeros": lambda n: bytes(n * CHUNK),
        "end": lambda n: bytes(n * CHUNK - 1) + b"x",
    }
    return b"".join(make[kind](count) for kind, count in pieces) + dice.randbytes(tail)


pieces = st.lists(st.tuples(st.sampled_from(["new", "same", "zeros", "end"]), st.integers(1, 20)), max_size=6)


def write_sparse(path: Path, data: bytes) -> None:
    """A file with holes where there are zeros."""
    with path.open("wb") as file:
        for at in range(0, len(data), CHUNK):
            part = data[at : at + CHUNK]
            if part.count(0) != len(part):
                file.seek(at)
                file.write(part)
        file.truncate(len(data))


@settings(max_examples=40, deadline=None)
@given(old=pieces, new=pieces, tails=st.tuples(st.integers(0, 5000), st.integers(0, 5000)), sparse=st.booleans())
def test_any_file_becomes_the_backup_and_nothing_else_is_touched(
    tmp_path_factory: pytest.TempPathFactory,
    old: list[tuple[str, int]],
    new: list[tuple[str, int]],
    tails: tuple[int, int],
    sparse: bool,
) -> None:
    before, wanted = content(old, tails[0], 1), content(new, tails[1], 2)
    repository = Repository.create(Memory(), chunks=SMALL)
    image = back_up(repository, BytesReader(wanted)).disks[0].image
    path = tmp_path_factory.mktemp("target") / "disk"
    write_sparse(path, before) if sparse else path.write_bytes(before)
    seen: list[tuple[int, int | None]] = []
    with Watched(path) as target:
        stats = repository.reader(image).restore_onto(target, lambda *at: seen.append(at))
    assert same(path.read_bytes(), wanted)
    assert chunks_of(target.changed) == different_chunks(before, wanted)
    assert stats.written_bytes == sum(end - start for start, end in target.changed)
    assert stats.compared_bytes <= len(wanted)
    assert not seen or seen[-1] == (len(wanted), len(wanted))
    with Watched(path) as again:
        assert repository.reader(image).restore_onto(again).written_bytes == 0
    assert again.changed == []


@pytest.fixture
def storage() -> Counting:
    return Counting()


@pytest.fixture
def repository(storage: Counting) -> Repository:
    return Repository.create(storage, chunks=SMALL)


def test_equal_chunks_are_not_fetched(tmp_path: Path, storage: Counting, repository: Repository) -> None:
    data = bytearray(os.urandom(400 * CHUNK))
    image = back_up(repository, BytesReader(data)).disks[0].image
    path = tmp_path / "disk"
    path.write_bytes(data)
    reader = repository.reader(image)
    list(reader.extents())  # the tree is read by now
    before = storage.reads
    with RawTarget(path) as target:
        stats = reader.restore_onto(target)
    first = storage.reads - before
    assert (stats.compared_bytes, stats.written_bytes) == (400 * CHUNK, 0)
    with path.open("r+b") as file:
        file.seek(7 * CHUNK + 5)
        file.write(b"changed")
    before = storage.reads
    with RawTarget(path) as target:
        assert reader.restore_onto(target).written_bytes == CHUNK
    assert storage.reads - before == first + 1
    assert same(path.read_bytes(), data)


def test_zeros_of_the_backup_become_holes(tmp_path: Path, repository: Repository) -> None:
    data = os.urandom(10 * CHUNK) + bytes(2000 * CHUNK) + os.urandom(10)
    image = back_up(repository, BytesReader(data)).disks[0].image
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(len(data)))
    with RawTarget(path) as target:
        repository.reader(image).restore_onto(target)
    assert same(path.read_bytes(), data)
    assert path.stat().st_blocks * 512 <= 13 * CHUNK


def test_a_failure_in_the_middle_is_told_and_the_next_run_finishes(
    tmp_path: Path, storage: Counting, repository: Repository
) -> None:
    data = os.urandom(4000 * CHUNK)
    manifest = back_up(repository, BytesReader(data))
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    reader = repository.reader(manifest.disks[0].image)
    list(reader.extents())
    storage.fails_at = storage.reads + 3
    with RawTarget(path) as target, pytest.raises(StorageError) as failed:
        reader.restore_onto(target)
    assert "the line is down" in failed.value.message
    assert f"{path} now holds neither its old content nor the backup" in failed.value.message
    assert "run the same again" in failed.value.cure
    assert not same(path.read_bytes(), data)
    storage.fails_at = None
    export_onto(repository, manifest.backup, "disk0", path)
    assert same(path.read_bytes(), data)


def test_a_backup_with_chunks_that_nobody_knows_changes_nothing(tmp_path: Path, storage: Counting) -> None:
    data = bytearray(os.urandom(100 * CHUNK))
    repository = Repository.create(storage, chunks=SMALL)
    first = set(storage.raw)
    back_up(repository, BytesReader(data))
    stored = set(storage.raw) - first
    # Every node of the second tree is new, 80 of its chunks are not.
    for at in range(0, 100, 5):
        data[at * CHUNK : (at + 1) * CHUNK] = os.urandom(CHUNK)
    backup = back_up(repository, BytesReader(data)).backup
    for key in stored:
        del storage.raw[key]
    path = tmp_path / "disk"
    path.write_bytes(b"old" * 1000)
    with pytest.raises(DamageFound, match="missing") as found:
        export_onto(Repository.open(storage), backup, "disk0", path)
    assert "neither" not in found.value.message
    assert path.read_bytes() == b"old" * 1000


KILLED = """
import sys
from pathlib import Path
from vmsnap.rawtarget import RawTarget
from vmsnap.qcow2target import Qcow2Target
from vmsnap.repository import Repository
from vmsnap_storage_backends.local import LocalStorage
import vmsnap.overwrite as overwrite

def slow(kind):
    class Slow(kind):
        writes = 0
        def write(self, offset, contents):
            super().write(offset, contents)
            self.writes += 1
            if self.writes == 3:
                print("writing", flush=True)
                sys.stdin.read()
    return Slow

overwrite.RawTarget, overwrite.Qcow2Target = slow(RawTarget), slow(Qcow2Target)
repository = Repository.open(LocalStorage(sys.argv[1]))
overwrite.export_onto(repository, sys.argv[2], "disk0", Path(sys.argv[3]), image_format=sys.argv[4])
"""


def kill_in_the_middle(repository: str, backup: str, target: Path, image_format: str) -> None:
    """Write `backup` onto `target` in a process that is killed after its third write."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, repository, backup, str(target), image_format],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "writing\n"
        worker.send_signal(signal.SIGKILL)


def test_after_a_kill_the_next_run_finishes(tmp_path: Path) -> None:
    url = str(tmp_path / "repository")
    repository = Repository.create(LocalStorage(url), chunks=SMALL)
    data = os.urandom(3000 * CHUNK)
    manifest = back_up(repository, BytesReader(data))
    path = tmp_path / "disk"
    path.write_bytes(bytes(3000 * CHUNK))
    kill_in_the_middle(url, manifest.backup, path, "raw")
    assert not same(path.read_bytes(), data) and path.read_bytes().count(0) < 3000 * CHUNK
    export_onto(repository, manifest.backup, "disk0", path)
    assert same(path.read_bytes(), data)


# -- targets that are refused


@pytest.fixture
def backup(repository: Repository) -> str:
    return back_up(repository, BytesReader(os.urandom(64 * CHUNK))).backup


@pytest.mark.parametrize("what", ["nothing", "folder", "device", "looks like qcow2"])
def test_what_is_no_raw_disk_is_refused(tmp_path: Path, repository: Repository, backup: str, what: str) -> None:
    path = tmp_path / "target"
    error: type[Exception] = UsageError
    if what == "nothing":
        error = NotFound
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path = Path("/dev/null")
    else:
        path.write_bytes(b"QFI\xfb and more")
    with pytest.raises(error):
        export_onto(repository, backup, "disk0", path)
    if what == "looks like qcow2":
        assert path.read_bytes() == b"QFI\xfb and more"
        assert export_onto(repository, backup, "disk0", path, image_format="raw").written_bytes == 64 * CHUNK
    assert (what == "nothing") == (not path.exists())


def test_an_unknown_disk_or_format_is_refused(tmp_path: Path, repository: Repository, backup: str) -> None:
    with pytest.raises(NotFound, match="no disk 'vda'"):
        export_onto(repository, backup, "vda", tmp_path / "x")
    with pytest.raises(UsageError, match="no format"):
        export_onto(repository, backup, "disk0", tmp_path / "x", image_format="vmdk")


@contextmanager
def held_by_qemu(path: Path, image_format: str, *options: str) -> Iterator[None]:
    """One of QEMU's tools has the image open."""
    with subprocess.Popen(
        ["qemu-io", *options, "-f", image_format, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.read(8) == b"qemu-io>"
        yield
        holder.stdin.write(b"quit\n")


@pytest.mark.qemu
@pytest.mark.parametrize("options", [(), ("-r",)], ids=["writing", "reading"])
def test_an_image_that_qemu_holds_is_refused(
    tmp_path: Path, repository: Repository, backup: str, options: tuple[str, ...]
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old" * 1000)
    with held_by_qemu(path, "raw", *options), pytest.raises(Busy, match="QEMU"):
        export_onto(repository, backup, "disk0", path)
    assert path.read_bytes() == b"old" * 1000
    export_onto(repository, backup, "disk0", path)
    assert path.stat().st_size == 64 * CHUNK


@pytest.mark.qemu
def test_qemu_does_not_start_on_a_disk_that_is_written(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    call = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(path)]
    with RawTarget(path):
        refused = subprocess.run(call, capture_output=True, text=True, check=False)
    assert "lock" in refused.stderr
    assert refused.returncode
    assert subprocess.run(call, capture_output=True, check=False).returncode == 0


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    with RawTarget(path), pytest.raises(Busy):
        RawTarget(path)
    RawTarget(path).close()


# -- block devices


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    found = subprocess.run(["losetup", "--find", "--show", str(path)], capture_output=True, text=True, check=True)
    device = Path(found.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


@needs_loop
def test_a_block_device_becomes_the_backup_and_keeps_what_lies_behind(tmp_path: Path, repository: Repository) -> None:
    data = os.urandom(300 * CHUNK) + bytes(300 * CHUNK) + os.urandom(100 * CHUNK)
    manifest = back_up(repository, BytesReader(data))
    old = bytearray(os.urandom(800 * CHUNK))
    old[: 100 * CHUNK] = data[: 100 * CHUNK]
    backing = tmp_path / "backing"
    backing.write_bytes(old)
    with loop_device(backing) as device:
        stats = export_onto(repository, manifest.backup, "disk0", device)
        assert same(device.read_bytes(), data + bytes(old[len(data) :]))
        assert (stats.compared_bytes, stats.written_bytes) == (700 * CHUNK, 600 * CHUNK)
        assert export_onto(repository, manifest.backup, "disk0", device).written_bytes == 0
    assert same(backing.read_bytes(), data + bytes(old[len(data) :]))


@needs_loop
def test_a_block_device_that_is_too_small_or_in_use_is_refused(
    tmp_path: Path, repository: Repository, backup: str
) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(63 * CHUNK))
    with loop_device(backing) as device:
        with pytest.raises(UsageError, match="as large"):
            export_onto(repository, backup, "disk0", device)
        used = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(Busy, match="in use"):
                RawTarget(device)
        finally:
            os.close(used)
        with pytest.raises(Busy, match=f"behind {device}"):
            export_onto(repository, backup, "disk0", backing)
    assert backing.read_bytes().count(0) == 63 * CHUNK
