"""Writing a backup onto a qcow2 image, and into new ones, through the real qemu-nbd."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_repository_roundtrip import SMALL, back_up
from tests.test_restore_in_place import Counting, held_by_qemu, kill_in_the_middle
from vmsnap.errors import Busy, DriverUnavailable, NotFound, StorageError, UsageError
from vmsnap.export import export_disks
from vmsnap.nbd import NbdConnection
from vmsnap.overwrite import export_onto
from vmsnap.qcow2target import Qcow2Target
from vmsnap.repository import BytesReader, Repository
from vmsnap.testing.rigs import eventually, same
from vmsnap_storage_backends.local import LocalStorage

CHUNK = SMALL.disk
CLUSTER = 64 << 10
pytestmark = pytest.mark.qemu


def qemu(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def make_qcow2(path: Path, data: bytes) -> None:
    raw = path.with_suffix(".old")
    raw.write_bytes(data)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    raw.unlink()


def disk_of(path: Path) -> bytes:
    """The disk that a qcow2 image holds; the image must be sound."""
    qemu("qemu-img", "check", str(path))
    raw = path.with_suffix(".read")
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw))
    return raw.read_bytes()


def servers() -> set[str]:
    """The qemu-nbd processes of this host, by their command lines."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if words[0].endswith(b"qemu-nbd"):
            found.add(b" ".join(words).decode())
    return found


def serving(path: Path) -> bool:
    return any(str(path) in words for words in servers())


@pytest.fixture
def repository() -> Repository:
    return Repository.create(Counting(), chunks=SMALL)


def test_an_image_becomes_the_backup_and_only_what_differs_is_written(tmp_path: Path, repository: Repository) -> None:
    data = os.urandom(40 * CLUSTER) + bytes(40 * CLUSTER) + os.urandom(20 * CLUSTER) + bytes(60 * CLUSTER)
    manifest = back_up(repository, BytesReader(data))
    old = bytearray(data)
    old[3 * CHUNK : 5 * CHUNK] = os.urandom(2 * CHUNK)
    old[50 * CLUSTER : 54 * CLUSTER] = os.urandom(4 * CLUSTER)
    old[90 * CLUSTER : 92 * CLUSTER] = bytes(2 * CLUSTER)
    path = tmp_path / "disk.qcow2"
    make_qcow2(path, bytes(old))
    stats = export_onto(repository, manifest.backup, "disk0", path, image_format="qcow2")
    assert same(disk_of(path), data)
    assert stats.written_bytes == 2 * CHUNK + 4 * CLUSTER + (2 * CLUSTER)
    assert stats.compared_bytes <= 64 * CLUSTER  # holes of the image are known without reading
    ranges = json.loads(qemu("qemu-img", "map", "--output=json", str(path)))
    zeros = [
        range(each["start"] // CLUSTER, (each["start"] + each["length"]) // CLUSTER) for each in ranges if each["zero"]
    ]
    assert {number for each in zeros for number in each} == {*range(40, 80), *range(100, 160)}
    assert export_onto(repository, manifest.backup, "disk0", path, image_format="qcow2").written_bytes == 0
    assert not serving(path)


def test_a_snapshot_inside_the_image_stays_as_it_is(tmp_path: Path, repository: Repository) -> None:
    old, data = os.urandom(4 * CLUSTER), os.urandom(4 * CLUSTER)
    path = tmp_path / "disk.qcow2"
    make_qcow2(path, old)
    qemu("qemu-img", "snapshot", "-c", "before", str(path))
    backup = back_up(repository, BytesReader(data)).backup
    export_onto(repository, backup, "disk0", path, image_format="qcow2")
    assert same(disk_of(path), data)
    qemu("qemu-img", "snapshot", "-a", "before", str(path))
    assert same(disk_of(path), old)


def test_after_a_kill_qemu_nbd_ends_and_the_next_run_finishes(tmp_path: Path) -> None:
    url = str(tmp_path / "repository")
    repository = Repository.create(LocalStorage(url), chunks=SMALL)
    data = os.urandom(3000 * CHUNK)
    backup = back_up(repository, BytesReader(data)).backup
    path = tmp_path / "disk.qcow2"
    make_qcow2(path, bytes(len(data)))
    kill_in_the_middle(url, backup, path, "qcow2")
    eventually(lambda: not serving(path), "qemu-nbd ends")
    assert not same(disk_of(path), data)
    export_onto(repository, backup, "disk0", path, image_format="qcow2")
    assert same(disk_of(path), data)


def test_what_is_no_free_image_of_that_size_is_refused_and_stays(tmp_path: Path, repository: Repository) -> None:
    backup = back_up(repository, BytesReader(os.urandom(8 * CLUSTER))).backup
    path = tmp_path / "disk.qcow2"

    def onto(path: Path) -> None:
        export_onto(repository, backup, "disk0", path, image_format="qcow2")

    with pytest.raises(NotFound):
        onto(path)
    path.write_bytes(b"raw" * 1000)
    with pytest.raises(UsageError, match="no qcow2 image"):
        onto(path)
    path.write_bytes(b"QFI\xfb" + bytes(1000))
    with pytest.raises(StorageError, match="qemu-nbd cannot open"):
        onto(path)
    with pytest.raises(UsageError, match="no plain file"):
        onto(tmp_path)
    make_qcow2(path, bytes(9 * CLUSTER))
    content = path.read_bytes()
    with pytest.raises(UsageError, match="qemu-img resize"):
        onto(path)
    qemu("qemu-img", "resize", "--shrink", str(path), str(8 * CLUSTER))
    with held_by_qemu(path, "qcow2"), pytest.raises(Busy, match="QEMU"):
        onto(path)
    onto(path)
    assert len(content) and not serving(tmp_path)


def test_qemu_does_not_start_on_an_image_that_is_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_qcow2(path, bytes(CLUSTER))
    with Qcow2Target(path) as target:
        call = ["qemu-io", "-f", "qcow2", "-c", "read 0 512", str(path)]
        refused = subprocess.run(call, capture_output=True, text=True, check=False)
        assert refused.returncode and "lock" in refused.stderr
        with pytest.raises(Busy):
            Qcow2Target(path)
        target.write(0, [b"x" * 512])
        target.flush()
    assert disk_of(path).startswith(b"x" * 512)


def test_without_qemu_nbd_its_package_is_named(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DriverUnavailable, match="qemu-utils"):
        Qcow2Target(tmp_path / "disk.qcow2")


@pytest.mark.parametrize("odd", [0, 512, 1000])
def test_a_new_image_holds_the_disk_and_takes_no_room_for_holes(
    tmp_path: Path, repository: Repository, odd: int
) -> None:
    data = os.urandom(10 * CLUSTER) + bytes(1000 * CLUSTER) + os.urandom(CLUSTER + odd)
    backup = back_up(repository, BytesReader(data)).backup
    made = export_disks(repository, backup, tmp_path / "out", image_format="qcow2")["disk0"]
    assert made.stat().st_size < 18 * CLUSTER
    assert made.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in made.parent.iterdir()] == ["disk0.qcow2"]
    # QEMU counts in sectors.
    assert same(disk_of(made), data + bytes(-len(data) % 512))


def test_a_failed_export_leaves_neither_image_nor_server(tmp_path: Path) -> None:
    storage = Counting()
    repository = Repository.create(storage, chunks=SMALL)
    backup = back_up(repository, BytesReader(os.urandom(3000 * CHUNK))).backup
    storage.fails_at = storage.reads + 40
    with pytest.raises(StorageError, match="the line is down"):
        export_disks(repository, backup, tmp_path / "out", image_format="qcow2")
    assert not (tmp_path / "out").exists()
    assert not serving(tmp_path)


# -- servers that do not keep to the protocol

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"
GO_REPLY = bytes.fromhex("0003e889045565a900000007")
INFO = GO_REPLY + b"\0\0\0\3" + b"\0\0\0\x0c" + b"\0\0" + (1 << 20).to_bytes(8, "big") + b"\0\x4d"
ACK = GO_REPLY + b"\0\0\0\1" + b"\0\0\0\0"


@settings(max_examples=60, deadline=None)
@given(
    agreed=st.sampled_from([b"", GREETING, GREETING + INFO, GREETING + INFO + ACK]),
    noise=st.binary(max_size=200),
    status=st.booleans(),
)
def test_whatever_a_server_says_is_an_answer_or_an_error(agreed: bytes, noise: bytes, status: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        path = Path(folder, "s")
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(agreed + noise)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        server = threading.Thread(target=serve)
        server.start()
        try:
            with pytest.raises(StorageError, match="cannot be used"):
                client = NbdConnection(path, "the image", status=status)
                assert client.size_bytes == 1 << 20
                try:
                    client.read_into(0, memoryview(bytearray(512)))
                finally:
                    client.close()
        finally:
            server.join()
