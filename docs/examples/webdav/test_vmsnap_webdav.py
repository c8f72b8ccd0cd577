"""The WebDAV backend keeps the contract of its role, on a real lighttpd."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmsnap.errors import StorageError, TransientStorageError, UsageError
from vmsnap.testing.figures import StorageFigures
from vmsnap.testing.storage import RawObjects, StorageContract
from vmsnap_webdav import MARK, WebdavsStorage, WebdavStorage

SLOW_WRITER = """
import http.client, sys
host, port, path = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port))
connection.putrequest("PUT", path)
connection.putheader("Content-Length", str(8 << 20))
connection.endheaders(b"x" * (1 << 20))
print("begun", flush=True)
sys.stdin.read()
"""


class Server:
    """A lighttpd of the test's own on loopback, with mod_webdav."""

    def __init__(self, folder: Path) -> None:
        lighttpd = os.environ.get("LIGHTTPD") or shutil.which("lighttpd", path=f"{os.environ['PATH']}:/usr/sbin")
        if lighttpd is None:
            raise RuntimeError("lighttpd is needed: apt-get install lighttpd lighttpd-mod-webdav")
        self.root = folder / "root"
        self.root.mkdir()
        (folder / "uploads").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        configuration = folder / "lighttpd.conf"
        configuration.write_text(
            f'server.document-root = "{self.root}"\nserver.bind = "127.0.0.1"\nserver.port = {self.port}\n'
            f'server.upload-dirs = ("{folder / "uploads"}")\nserver.modules = ("mod_webdav")\n'
            'webdav.activate = "enable"\nwebdav.is-readonly = "disable"\n'
            f'server.errorlog = "{folder / "errors.log"}"\n'
        )
        modules = os.environ.get("LIGHTTPD_MODULES", "/usr/lib/lighttpd")
        self._process = subprocess.Popen([lighttpd, "-D", "-f", str(configuration), "-m", modules])
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (folder / "errors.log").read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("lighttpd"))
    yield running
    running.stop()


class Files(RawObjects):
    """The server's folder, looked at past it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> bytes | None:
        file = self._folder / f"{key}{MARK}"
        return file.read_bytes() if file.exists() else None

    def write(self, key: str, data: bytes) -> None:
        file = self._folder / f"{key}{MARK}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def keys(self) -> Sequence[str]:
        files = [file for file in self._folder.rglob("*") if file.is_file()]
        return [str(file.relative_to(self._folder)).removesuffix(MARK) for file in files]


class TestWebdav(StorageContract):
    @pytest.fixture
    def folder(self, server: Server) -> Iterator[Path]:
        folder = server.root / "backups"
        yield folder
        shutil.rmtree(folder)

    @pytest.fixture
    def storage(self, server: Server, folder: Path) -> Iterator[WebdavStorage]:
        # lighttpd is one thread: between its look and its rename nobody else comes
        storage = WebdavStorage(f"webdav://127.0.0.1:{server.port}/backups", {"atomic_move": "yes"})
        storage.create()
        yield storage
        storage.close()

    @pytest.fixture
    def oracle(self, folder: Path) -> Files:
        return Files(folder)

    @pytest.fixture
    def kill_a_put(self, server: Server) -> Callable[[str], None]:
        def kill(key: str) -> None:
            argv = [sys.executable, "-c", SLOW_WRITER, "127.0.0.1", str(server.port), f"/backups/{key}{MARK}0123"]
            writer = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"
            writer.send_signal(signal.SIGKILL)
            writer.communicate()

        return kill

    def test_an_object_and_a_folder_may_have_one_name(self, storage: WebdavStorage, oracle: Files) -> None:
        storage.put("packs/ab", b"below")
        storage.put("packs", b"beside")
        storage.delete("packs")
        assert oracle.keys() == ["packs/ab"]

    def test_a_repository_that_is_not_there_is_not_empty(self, server: Server) -> None:
        nowhere = WebdavStorage(f"webdav://127.0.0.1:{server.port}/nowhere", {})
        with pytest.raises(StorageError, match="is not there"):
            list(nowhere.list())
        with pytest.raises(StorageError, match="is not there"):
            nowhere.put("packs/x", b"1")
        assert [finding.severity for finding in nowhere.doctor()] == ["missing"]
        assert not (server.root / "nowhere").exists()

    def test_hurry_ends_what_waits(self) -> None:
        """`hurry`: "calls that wait for better times fail now"."""
        with socket.create_server(("127.0.0.1", 0)) as deaf, ThreadPoolExecutor(1) as thread:
            storage = WebdavStorage(f"webdav://127.0.0.1:{deaf.getsockname()[1]}/x", {"timeout": "300"})
            waiting = thread.submit(storage.get, "config")
            deaf.accept()[0].recv(1)
            storage.hurry()
            with pytest.raises(TransientStorageError):
                waiting.result(60)

    def test_a_server_that_is_silent_is_given_up(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            storage = WebdavStorage(f"webdav://127.0.0.1:{deaf.getsockname()[1]}/x", {"timeout": "0.2"})
            with pytest.raises(TransientStorageError, match="timed out"):
                storage.get("config")


class TestFigures(StorageFigures):
    folder = TestWebdav.folder
    storage = TestWebdav.storage


@pytest.mark.parametrize("url", ["webdav://", "webdav://u:secret@host/x", "http://host/x", "webdav://host:port/x"])
def test_other_urls_are_refused_and_no_password_is_shown(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        WebdavStorage(url, {})
    assert "secret" not in str(refused.value)


def test_no_password_goes_out_without_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine example.org login u password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="without TLS"):
        WebdavStorage("webdav://example.org/x", {}).get("config")
    assert WebdavsStorage("webdavs://example.org/x", {}).name == "webdavs"
