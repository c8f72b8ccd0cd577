"""Whatever fails or dies in the middle of a backup: the backups before it are intact, and there is a whole new one or
none.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from tests.test_storage_local import small_file_system  # noqa: F401 (a fixture)
from vmsnap.errors import StorageError, StorageFull, VmsnapError
from vmsnap.repository import BytesReader, ImageKind, Repository
from vmsnap.repository.format import BlobKind
from vmsnap.roles import ObjectInfo
from vmsnap_storage_backends.local import LocalStorage


class Failing(Memory):
    """Fails put number `at`: before it is done, or after it with the answer lost, or that one and all later ones."""

    def __init__(self, at: int = -1, how: str = "before") -> None:
        super().__init__()
        self.at, self.how, self.puts = at, how, 0

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        with self.lock:
            number, self.puts = self.puts, self.puts + 1
        failing = self.at >= 0 and (number == self.at or (self.how == "ever" and number > self.at))
        if not failing or self.how == "after":
            super().put(key, data, if_absent=if_absent)
        if failing:
            raise StorageFull(f"no room for {key}", cure="free some")


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.repository.upload.PACK_BYTES_OF", dict.fromkeys(BlobKind, 144 << 10))
    monkeypatch.setattr("vmsnap.repository.chunkstore._INDEX_AT_CHUNKS", 64)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before


@pytest.mark.parametrize("how", ["before", "after", "ever"])
@pytest.mark.parametrize("passphrase", [None, "x"])
def test_a_failure_of_any_put_of_a_backup(how: str, passphrase: str | None) -> None:
    old, new = os.urandom(300_000), os.urandom(900_000)
    at = 0
    while True:
        storage = Failing()
        repository = Repository.create(storage, passphrase, chunks=SMALL, key_cost=CHEAP)
        first = back_up(repository, BytesReader(old))
        storage.at, storage.how, storage.puts = at, how, 0
        try:
            back_up(repository, BytesReader(old + new))
        except StorageFull as e:
            failed = True
            assert "no room" in str(e)
        else:
            failed = False
        puts, storage.at = storage.puts, -1
        again = Repository.open(storage, passphrase)
        assert not again.check(read_data=True).damaged
        assert len(again.list()) == (1 if failed else 2)
        assert content_of(again, again.manifest(first.backup).disks[0].image) == old
        assert content_of(again, back_up(again, BytesReader(new)).disks[0].image) == new
        assert not again.check(read_data=True).damaged
        if at >= puts:
            assert not failed
            break
        at += 1
    assert at > 8


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("passphrase", [None, "x"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_failure_of_any_put_of_init(how: str, passphrase: str | None, at: int) -> None:
    storage = Failing(at, how)
    if at == 1 and not passphrase:
        Repository.create(storage)
        return
    with pytest.raises(StorageFull):
        Repository.create(storage, passphrase, key_cost=CHEAP)
    storage.at = -1
    if "config" in storage.raw:  # the answer was lost: it exists, and is whole
        assert Repository.open(storage, passphrase).list() == []
    else:
        assert storage.raw == {}
        Repository.create(storage, passphrase, key_cost=CHEAP)


def test_a_failed_upload_ends_the_backup_at_once_and_hangs_nobody() -> None:
    storage = Failing()
    repository = Repository.create(storage)
    storage.at, storage.how, storage.puts = 1, "ever", 0
    read = 0

    class Endless(BytesReader):
        def __init__(self) -> None:
            super().__init__(os.urandom(4 << 20))
            self.size_bytes = 4 << 30

        def extents(self):  # type: ignore[no-untyped-def]
            from vmsnap.model import Extent

            yield Extent(0, self.size_bytes)

        def read_into(self, offset: int, buffer: memoryview) -> None:
            nonlocal read
            read += len(buffer)
            buffer[:] = os.urandom(len(buffer))

    with pytest.raises(StorageFull), repository.writer() as writer:
        writer.add_image("disk", Endless(), ImageKind.DISK)
    assert read < 200 << 20


def test_giving_up_while_the_storage_is_slow_hangs_nobody() -> None:
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    release = threading.Event()
    put = storage.put
    entered = threading.Semaphore(0)

    def slow(key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        if key.startswith("packs/"):
            entered.release()
            release.wait(30)
        put(key, data, if_absent=if_absent)

    storage.put = slow  # type: ignore[method-assign]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with repository.writer() as writer:
                writer.add_image("disk", BytesReader(os.urandom(3 << 20)), ImageKind.DISK)
                raise KeyboardInterrupt
        except BaseException as e:  # noqa: BLE001 (looked at below)
            failures.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.acquire(timeout=60)
    assert entered.acquire(timeout=60)
    release.set()
    thread.join(20)
    assert not thread.is_alive()
    assert [type(failure) for failure in failures] == [KeyboardInterrupt]
    assert [key for key in storage.raw if key.startswith("manifests/")] == []


def test_what_came_to_storage_that_failed_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.repository.chunkstore._INDEX_AT_CHUNKS", 1 << 18)

    class Broken(Memory):
        puts_left = 1 << 30

        def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
            if key.startswith("packs/"):
                self.puts_left -= 1
                if self.puts_left < 0:
                    raise StorageError("the connection is cut")
            super().put(key, data, if_absent=if_absent)

    storage = Broken()
    content = os.urandom(2_000_000)
    repository = Repository.create(storage, chunks=SMALL)
    storage.puts_left = 6
    with pytest.raises(StorageError, match="cut"):
        back_up(repository, BytesReader(content))
    there = {key for key in storage.raw if key.startswith("packs/")}
    assert len(there) == 6
    storage.puts_left = 1 << 30
    manifest = back_up(Repository.open(storage), BytesReader(content))
    assert manifest.stats.stored_bytes < len(content) - 4 * (144 << 10)
    assert there <= storage.raw.keys()
    assert not Repository.open(storage).check(read_data=True).damaged


def test_deleting_that_fails_after_a_failure_does_not_hide_it() -> None:
    storage = Failing()
    repository = Repository.create(storage, chunks=SMALL)
    storage.at, storage.how, storage.puts = 2, "ever", 0

    def fail(key: str) -> None:
        raise StorageError("cannot delete either")

    storage.delete = fail  # type: ignore[method-assign]
    with pytest.raises(StorageFull):
        back_up(repository, BytesReader(os.urandom(900_000)))
    assert repository.list() == []
    assert not repository.check(read_data=True).damaged


def test_a_storage_that_fails_while_reading_is_not_called_damage() -> None:
    storage = Memory()
    repository = Repository.create(storage, chunks=SMALL)
    manifest = back_up(repository, BytesReader(os.urandom(50_000)))
    reader = repository.reader(manifest.disks[0].image)

    def fail(key: str, offset: int = 0, length: int | None = None) -> bytes:
        raise StorageError("connection reset")

    storage.get = fail  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="reset"):
        reader.read_into(0, memoryview(bytearray(10)))
    with pytest.raises(StorageError, match="reset"):
        repository.verify("vm001")


def test_a_full_file_system(small_file_system: Path, tmp_path: Path) -> None:  # noqa: F811
    storage = LocalStorage(str(small_file_system / "repository"))
    repository = Repository.create(storage)
    old = os.urandom(1 << 20)
    first = back_up(repository, BytesReader(old))
    for _ in range(3):
        with pytest.raises(StorageFull):
            back_up(repository, BytesReader(os.urandom(20 << 20)))
    again = Repository.open(storage)
    assert [manifest.backup for manifest in again.list()] == [first.backup]
    assert content_of(again, first.disks[0].image) == old
    assert not again.check(read_data=True).damaged
    with pytest.raises(StorageFull):
        big = Repository.create(LocalStorage(str(tmp_path / "big")))
        image = back_up(big, BytesReader(os.urandom(20 << 20))).disks[0].image
        big.reader(image).restore_to_file(small_file_system / "restored")
    assert not (small_file_system / "restored").exists()
    back_up(again, BytesReader(os.urandom(1 << 20)))


_BACK_UP = """
import itertools, os, random, signal, sys
from vmsnap_storage_backends.local import LocalStorage
from vmsnap.repository import *
import vmsnap.repository.upload, vmsnap.repository.chunkstore
vmsnap.repository.upload.PACK_BYTES_OF = dict.fromkeys(vmsnap.repository.upload.BlobKind, 128 << 10)
vmsnap.repository.chunkstore._INDEX_AT_CHUNKS = 64
class Dies(LocalStorage):
    numbers = itertools.count(1)
    def put(self, key, data, *, if_absent=False):
        mine = next(self.numbers) == int(sys.argv[2])
        if mine and sys.argv[3] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        super().put(key, data, if_absent=if_absent)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
repository = Repository.open(Dies(sys.argv[1]), "x")
print("begin", flush=True)
while True:
    with repository.writer() as writer:
        content = random.Random(7).randbytes(500_000) + os.urandom(int(sys.argv[4]))
        image = writer.add_image("disk", BytesReader(content), ImageKind.DISK)
        disk = DiskImage("d", image.size_bytes, "raw", "", "", image)
        writer.commit(BackupFields(vm="vm002", hypervisor="x", mode="live", disks=(disk,)))
    if sys.argv[4] == "0":
        break
"""


def backing_up(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _BACK_UP, str(folder), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def all_is_well(folder: Path, old: bytes, backup: str) -> int:
    """Every listed backup is whole; returns how many there are besides the old one."""
    repository = Repository.open(LocalStorage(str(folder)), "x")
    assert not repository.check(read_data=True).damaged
    assert content_of(repository, repository.manifest(backup).disks[0].image) == old
    manifests = repository.list()
    for manifest in manifests:
        assert not repository.verify(manifest.backup).findings
    return len(manifests) - 1


def test_killed_at_every_put(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    repository = Repository.create(LocalStorage(str(folder)), "x", chunks=SMALL, key_cost=CHEAP)
    old = os.urandom(200_000)
    first = back_up(repository, BytesReader(old))
    outcomes = []
    for put in range(1, 30):
        with backing_up(folder, put, "after" if put % 2 else "before", 0) as process:
            process.communicate(timeout=60)
        outcomes.append((process.returncode, all_is_well(folder, old, first.backup)))
        if process.returncode == 0:
            break
    # What an index lists is used by the next try, so that every try gets further, and there is one backup at the end,
    # or two where the kill came after the manifest was there.
    assert outcomes[-1][0] == 0
    assert all(code == -signal.SIGKILL for code, _ in outcomes[:-1])
    assert outcomes[-1][1] in (1, 2)
    assert len(outcomes) > 3


def test_killed_at_any_moment(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    repository = Repository.create(LocalStorage(str(folder)), "x", chunks=SMALL, key_cost=CHEAP)
    old = os.urandom(200_000)
    first = back_up(repository, BytesReader(old))
    for round_ in range(4):
        with backing_up(folder, -1, "never", 500_000) as process:
            assert process.stdout and process.stdout.readline() == "begin\n"
            # No synchronisation on purpose: the moment is to be any.
            deadline = time.monotonic() + 0.02 + 0.043 * round_
            while time.monotonic() < deadline:
                assert process.poll() is None
            process.kill()
            process.communicate()
        all_is_well(folder, old, first.backup)


def test_every_error_is_one_line() -> None:
    repository = Repository.create(Failing(), chunks=SMALL)
    for call in (
        lambda: repository.manifest("nothing"),
        lambda: repository.forget("nothing"),
        lambda: Repository.create(repository.storage),
        lambda: Repository.open(Memory()),
    ):
        with pytest.raises(VmsnapError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_deleted_backup_is_passed_over_while_listing() -> None:
    class Late(Memory):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            yield from super().list(prefix)
            if prefix == "manifests/":
                yield ObjectInfo("manifests/vm001-20260101t000000z-000000", 5)

    repository = Repository.create(Late(), chunks=SMALL)
    manifest = back_up(repository, BytesReader(b"x"))
    assert repository.list() == [manifest]
