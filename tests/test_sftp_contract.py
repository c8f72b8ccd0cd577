"""The SFTP backend keeps the storage contract, on Debian's sshd on loopback, and on servers that can less."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.sshd import USER_ID, SshServer
from tests.test_storage_local import Files
from vmsnap.errors import ObjectExists, StorageError, StorageFull, TransientStorageError
from vmsnap.testing.storage import StorageContract
from vmsnap_storage_backends.local import LocalStorage
from vmsnap_storage_backends.sftp import SftpStorage

pytestmark = pytest.mark.sshd

# Kills itself in the middle of the put, when some of the object is written.
_PUT_HALF = """
import os, signal, sys
from vmsnap_storage_backends.sftp import SftpStorage, conversation
ask = conversation.Conversation.ask
writes = []
def half(talk, kind, *parts):
    number = ask(talk, kind, *parts)
    if kind == 6:
        writes.append(number)
    if len(writes) == 3:
        talk.answer(number)
        os.kill(os.getpid(), signal.SIGKILL)
    return number
conversation.Conversation.ask = half
SftpStorage(sys.argv[1], {"config": sys.argv[2]}).put(sys.argv[3], b"x" * 1_000_000)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as started:
        yield started


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """One without any of OpenSSH's extensions that we use."""
    denied = "internal-sftp -P fsync,posix-rename,hardlink,statvfs,limits"
    with SshServer(tmp_path_factory.mktemp("plain"), sftp=denied) as started:
        yield started


def opened(server: SshServer, folder: Path) -> SftpStorage:
    return SftpStorage(server.url(folder), {"config": str(server.config_file)})


class TestSftpStorage(StorageContract):
    state_machine_examples = 12

    @pytest.fixture
    def storage(self, server: SshServer, tmp_path: Path) -> Iterator[SftpStorage]:
        backend = SftpStorage(server.url(f"{tmp_path}/place%20here"), {"config": str(server.config_file)})
        backend.create()
        yield backend
        backend.close()

    @pytest.fixture
    def oracle(self, tmp_path: Path) -> Files:
        return Files(tmp_path / "place here")

    @pytest.fixture
    def kill_a_put(self, server: SshServer, tmp_path: Path) -> Callable[[str], None]:
        def kill(key: str) -> None:
            command = [sys.executable, "-c", _PUT_HALF, server.url(f"{tmp_path}/place%20here"), server.config_file, key]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
            assert done.returncode == -signal.SIGKILL
            assert unfinished(tmp_path / "place here")

        return kill


class TestSftpStorageWithoutExtensions(StorageContract):
    """All but atomic conditional puts, which `properties` does not promise there."""

    state_machine_examples = 12

    @pytest.fixture
    def storage(self, plain_server: SshServer, tmp_path: Path) -> Iterator[SftpStorage]:
        backend = opened(plain_server, tmp_path / "place")
        backend.create()
        assert not backend.properties().conditional_put
        assert backend.properties().free_bytes is None
        yield backend
        backend.close()

    @pytest.fixture
    def oracle(self, tmp_path: Path) -> Files:
        return Files(tmp_path / "place")

    def test_19_whole_or_not_at_all(self, storage: SftpStorage) -> None:
        """Such a server cannot rename onto an object: between the old and the new one there is none for a moment."""
        notes = [finding.message for finding in storage.doctor() if finding.severity == "note"]
        assert any("no posix-rename" in note for note in notes)
        assert any("no hardlink" in note for note in notes)
        assert any("no fsync" in note for note in notes)


@pytest.fixture
def storage(server: SshServer, tmp_path: Path) -> Iterator[SftpStorage]:
    backend = opened(server, tmp_path / "place")
    backend.create()
    yield backend
    backend.close()


def unfinished(folder: Path) -> list[Path]:
    return [path for path in (folder / ".unfinished").iterdir() if path.is_file()]


def test_nobody_else_can_read(storage: SftpStorage, tmp_path: Path) -> None:
    storage.put("packs/ab/cd", b"secret")
    for path in [tmp_path / "place", *(tmp_path / "place").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0


def test_the_folder_is_one_of_the_local_backend_too(storage: SftpStorage, tmp_path: Path) -> None:
    here = LocalStorage(str(tmp_path / "place"))
    storage.put("packs/ab/cd", b"from afar")
    here.put("packs/ef/gh", b"from here")
    assert list(here.list()) == list(storage.list())
    assert storage.get("packs/ef/gh") + here.get("packs/ab/cd") == b"from herefrom afar"


def test_a_link_at_the_top_is_followed(storage: SftpStorage, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other disk"
    (elsewhere / "ab").mkdir(parents=True)
    (elsewhere / "ab" / "cd").write_bytes(b"moved")
    (tmp_path / "place" / "packs").symlink_to(elsewhere)
    (tmp_path / "place" / "nowhere").symlink_to(tmp_path / "gone")
    assert [info.key for info in storage.list()] == ["nowhere", "packs/ab/cd"]
    assert [info.key for info in storage.list("packs/ab")] == ["packs/ab/cd"]


def test_a_place_that_vanished_is_not_made_anew(storage: SftpStorage, tmp_path: Path) -> None:
    storage.put("x", b"1")
    (tmp_path / "place").rename(tmp_path / "unmounted")
    with pytest.raises(StorageError, match="not there"):
        storage.put("y", b"1")
    with pytest.raises(StorageError, match="not there"):
        list(storage.list())
    assert not (tmp_path / "place").exists()


def test_what_dead_writers_left_goes_after_an_hour(server: SshServer, storage: SftpStorage, tmp_path: Path) -> None:
    place = tmp_path / "place" / ".unfinished"
    (place / "old").write_bytes(b"x")
    (place / "young").write_bytes(b"x")
    os.utime(place / "old", (time.time() - 7200,) * 2)
    storage.put("x", b"1")
    assert [path.name for path in unfinished(tmp_path / "place")] == ["young"]


def test_a_full_server_is_said_to_be_full(server: SshServer, tmp_path: Path) -> None:
    # The server has /run for itself: a tmpfs that the test fills to the brim.
    with SshServer(tmp_path / "small", lines=[]) as small:
        mounted = tmp_path / "disk"
        mounted.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "vmsnap-test", mounted], check=True)
        try:
            # Mounts made later are not seen in the server's namespace: it is started again.
            small.stop()
            small.start()
            backend = opened(small, mounted / "place")
            backend.create()
            backend.put("small", b"x" * 1000)
            with pytest.raises(StorageFull, match="free"):
                backend.put("big", bytes(64 << 20))
            with pytest.raises(StorageFull):
                backend.put("big", bytes(64 << 20), if_absent=True)
            assert [info.key for info in backend.list()] == ["small"]
            assert unfinished(mounted / "place") == []
            backend.put("small", b"y" * 1000)
            backend.close()
            small.stop()
        finally:
            subprocess.run(["umount", mounted], check=True)


def test_a_folder_where_one_may_not_write(server: SshServer, tmp_path: Path) -> None:
    (server.home / "closed").mkdir()
    (server.home / "closed").chmod(0o755)
    backend = SftpStorage(server.url("/~/closed", "keeper"), {"config": str(server.config_file)})
    for call in (lambda: backend.put("x", b"1"), lambda: backend.put("x", b"1", if_absent=True)):
        with pytest.raises(StorageError, match="Permission denied"):
            call()
    assert "may not write" in backend.doctor()[-1].message
    (server.home / "own").mkdir()
    os.chown(server.home / "own", USER_ID, USER_ID)
    own = SftpStorage(server.url("/~/own", "keeper"), {"config": str(server.config_file)})
    assert [finding.severity for finding in own.doctor()][:2] == ["ok", "ok"]
    (server.home / "own").chmod(0o500)
    assert "may not write" in own.doctor()[-1].message
    below = SftpStorage(server.url("/~/closed/below", "keeper"), {"config": str(server.config_file)})
    with pytest.raises(StorageError, match="Permission denied"):
        below.create()
    backend.close()
    below.close()


def test_in_a_chroot(tmp_path: Path) -> None:
    lines = ["Match User keeper", "ChrootDirectory /home", "ForceCommand internal-sftp", "Match all"]
    with SshServer(tmp_path / "jail", lines=lines) as jail:
        backend = SftpStorage(jail.url("/keeper/backups", "keeper"), {"config": str(jail.config_file)})
        backend.create()
        backend.put("packs/x", b"1", if_absent=True)
        with pytest.raises(ObjectExists):
            backend.put("packs/x", b"2", if_absent=True)
        assert (jail.home / "backups/packs/x").read_bytes() == b"1"
        backend.close()


def test_a_dropped_connection_is_one_clear_error_and_the_next_call_has_a_new_one(
    server: SshServer, storage: SftpStorage, tmp_path: Path
) -> None:
    storage.put("x", b"1")
    server.drop_connections()
    deadline = time.monotonic() + 30
    while True:
        # Whether the loss is noticed before or in the call is the network's choice; both are right.
        try:
            storage.put("y", b"2")
            break
        except TransientStorageError as e:
            assert "y" in str(e) and "\n" not in str(e)
            assert time.monotonic() < deadline
    assert storage.get("y") == b"2"
    assert unfinished(tmp_path / "place") == []
