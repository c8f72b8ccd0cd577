"""The local storage backend keeps the storage contract, and its promises as a file system citizen."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmsnap.errors import StorageError, StorageFull, UsageError
from vmsnap.testing.storage import RawObjects, StorageContract
from vmsnap_storage_backends.local import LocalStorage

# Stops itself in the middle of the put, when half of the object is written.
_PUT_HALF = """
import os, signal, sys
from vmsnap_storage_backends import local
write = os.pwritev
def half(fd, buffers, offset, *flags):
    write(fd, [buffers[0][: len(buffers[0]) // 2]], offset)
    os.kill(os.getpid(), signal.SIGKILL)
os.pwritev = half
local.LocalStorage(sys.argv[1]).put(sys.argv[2], b"x" * 1_000_000)
"""


class Files(RawObjects):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> bytes | None:
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    def write(self, key: str, data: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def keys(self) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[LocalStorage]:
        backend = LocalStorage(f"file://{tmp_path}/place%20here")
        backend.create()
        yield backend
        backend.close()

    @pytest.fixture
    def oracle(self, tmp_path: Path) -> Files:
        return Files(tmp_path / "place here")

    @pytest.fixture
    def kill_a_put(self, tmp_path: Path) -> Callable[[str], None]:
        def kill(key: str) -> None:
            command = [sys.executable, "-c", _PUT_HALF, str(tmp_path / "place here"), key]
            assert subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).returncode == -9

        return kill


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    backend = LocalStorage(str(tmp_path / "place"))
    backend.create()
    return backend


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "vmsnap-test", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def unfinished(storage: LocalStorage) -> list[Path]:
    return [path for path in storage.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("url", ["file://elsewhere/x", "file:relative", "", "file:///x?y", "file:///x#y", "a\0b"])
def test_a_url_that_names_no_folder_here_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        LocalStorage(url)


def test_urls_and_paths_name_the_same_folder() -> None:
    urls = ("/x/y z", "file:///x/y%20z", "file://localhost/x/y%20z")
    assert {LocalStorage(url).folder for url in urls} == {Path("/x/y z")}
    assert LocalStorage("x").folder == Path.cwd() / "x"


def test_nobody_else_can_read(storage: LocalStorage) -> None:
    storage.put("packs/ab/cd", b"secret")
    for path in [storage.folder, *storage.folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EIO, StorageError),
        (errno.EACCES, StorageError),
        (errno.EROFS, StorageError),
    ],
)
@pytest.mark.parametrize("call", ["pwritev", "fsync", "link", "open"])
def test_a_failing_file_system_is_one_clear_error_and_leaves_nothing(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int, error: type[StorageError], call: str
) -> None:
    storage.put("old", b"old")

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(f"vmsnap_storage_backends.local.os.{call}", fail)
        with pytest.raises(error) as caught:
            storage.put("new", b"new", if_absent=True)
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert unfinished(storage) == [storage.folder / "old"]
    storage.put("new", b"new", if_absent=True)


def test_a_write_that_comes_short_goes_on(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset, *_: write(fd, [buffers[0][:7]], offset))
    storage.put("x", b"0123456789" * 9)
    assert storage.get("x") == b"0123456789" * 9


def test_temporary_files_of_dead_writers_go_and_those_of_living_ones_stay(storage: LocalStorage) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", _PUT_HALF, str(storage.folder), "x"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert dead.returncode == -signal.SIGKILL
    (left,) = unfinished(storage)
    living = left.with_name("living")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(living)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "ready\n"
        storage.put("young", b"")
        assert left.exists()
        for path in (left, living):
            os.utime(path, (time.time() - 7200,) * 2)
        LocalStorage(str(storage.folder)).put("y", b"")
        assert not left.exists()
        assert living.exists()
        holder.communicate("\n")
    assert storage.remove_leftovers() == 1


def test_a_place_that_vanished_is_not_made_anew(storage: LocalStorage) -> None:
    storage.folder.rename(storage.folder.with_name("unmounted"))
    with pytest.raises(StorageError, match="not there"):
        storage.put("x", b"1")
    with pytest.raises(StorageError):
        list(storage.list())
    assert not storage.folder.exists()


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(StorageError):
            LocalStorage(str(tmp_path / path)).create()


def test_files_that_are_not_ours_are_listed(storage: LocalStorage) -> None:
    (storage.folder / "Holiday Photo.JPG").write_bytes(b"x")
    assert [info.key for info in storage.list()] == ["Holiday Photo.JPG"]


def test_a_full_file_system(small_file_system: Path) -> None:
    storage = LocalStorage(str(small_file_system / "place"))
    storage.create()
    storage.put("small", b"x" * 1000)
    with pytest.raises(StorageFull):
        storage.put("big", bytes(64 << 20))
    assert [info.key for info in storage.list()] == ["small"]
    assert len(unfinished(storage)) == 1
    storage.put("small", b"y" * 1000)


def test_doctor_names_the_cure(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "a" / "b"))
    assert [(finding.severity, finding.cure) for finding in storage.doctor()] == [("note", "vmsnap init makes it")]
    storage.create()
    assert [finding.severity for finding in storage.doctor()] == ["ok"]
    storage.folder.chmod(0o755)
    assert [finding.severity for finding in storage.doctor()] == ["ok", "note"]
    (tmp_path / "file").write_text("")
    assert [finding.severity for finding in LocalStorage(str(tmp_path / "file")).doctor()] == ["missing"]
