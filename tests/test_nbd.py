"""The NBD client: right on real servers, and clear about servers that misbehave."""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmsnap.errors import SnapshotError
from vmsnap_drivers.qemu import nbd_wire as wire
from vmsnap_drivers.qemu.nbd import ALLOCATION, NbdClient, NbdError, NbdRefused
from vmsnap_drivers.qemu.nbd_wire import STATE_ZERO

pytestmark = pytest.mark.qemu

KIB, MIB = 1 << 10, 1 << 20
CHANCE = random.Random(7)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Starts ``qemu-nbd`` with these arguments, to export what they name as ``disk``; gives the socket."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path) -> Path:
        path = tmp_path / f"{len(running)}.sock"
        argv = ["qemu-nbd", "-k", str(path), "-t", "-r", "-e", "8", "-x", "disk", *map(str, arguments)]
        running.append(subprocess.Popen(argv))
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(path))
                return path
            except OSError:
                assert time.monotonic() < deadline, "qemu-nbd does not listen"
                time.sleep(0.01)

    yield start
    for process in running:
        process.kill()
        process.wait()


def zeros_of(client: NbdClient) -> list[tuple[int, int]]:
    return [(found.offset, found.length) for found in client.ranges() if found.flags & STATE_ZERO]


def read(client: NbdClient, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xff" * length)
    client.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize(("request_bytes", "in_flight"), [(512, 3), (64 * KIB, 16), (1000, 5), (100 * MIB, 1)], ids=str)
def test_any_range_is_read_as_it_is(
    serve: Callable[..., Path], tmp_path: Path, request_bytes: int, in_flight: int
) -> None:
    content = bytearray(CHANCE.randbytes(5 * MIB + 512))
    content[MIB : 3 * MIB] = bytes(2 * MIB)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.write(content[:MIB])
        file.seek(3 * MIB)
        file.write(content[3 * MIB :])
    with NbdClient(serve("-f", "raw", image), "disk", request_bytes=request_bytes, in_flight=in_flight) as client:
        assert client.size_bytes == len(content) and client.read_only and client.contexts == {ALLOCATION}
        ranges = [(0, 0), (0, 1), (len(content) - 1, 1), (len(content), 0), (MIB - 1, 2 * MIB + 2), (1, 4096)]
        ranges += [(start, CHANCE.randrange(60 * KIB)) for start in (CHANCE.randrange(4 * MIB) for _ in range(20))]
        for offset, length in ranges:
            assert read(client, offset, length) == content[offset : offset + length]
        for offset, length in ((len(content), 1), (-1, 1), (len(content) - 1, 2)):
            with pytest.raises(NbdError, match="leave the export"):
                read(client, offset, length)
        assert zeros_of(client) == [(MIB, 2 * MIB)]
        assert read(client, 0, 4096) == content[:4096]


@pytest.mark.parametrize("size_bytes", [1, 511, 513, 4097, 65536 + 3])
def test_sizes_that_are_no_multiple_of_a_sector(serve: Callable[..., Path], tmp_path: Path, size_bytes: int) -> None:
    content = CHANCE.randbytes(size_bytes)
    (tmp_path / "image").write_bytes(content)
    with NbdClient(serve("-f", "raw", tmp_path / "image"), "disk") as client:
        assert client.size_bytes in (size_bytes // 512 * 512, -(-size_bytes // 512) * 512)
        padded = content + bytes(512)
        assert read(client, 0, client.size_bytes) == padded[: client.size_bytes]
        assert sum(found.length for found in client.ranges()) == client.size_bytes


def test_a_sparse_terabyte_is_described_in_little(serve: Callable[..., Path], tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1T"], check=True)
    with NbdClient(serve("-f", "qcow2", image), "disk") as client:
        (only,) = client.ranges()
        assert (only.offset, only.length) == (0, 1 << 40) and only.flags & STATE_ZERO
        part = list(client.ranges(offset=12345 * 512, length=512))
        assert [(found.offset, found.length) for found in part] == [(12345 * 512, 512)]
        with pytest.raises(NbdError, match="leave the export"):
            list(client.ranges(offset=1 << 40, length=1))
        with pytest.raises(NbdError, match="does not tell"):
            list(client.ranges("qemu:allocation-depth"))


def test_further_contexts_where_the_server_has_them(serve: Callable[..., Path], tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(CHANCE.randbytes(MIB))
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top)]
    subprocess.run(argv, check=True)
    contexts = (ALLOCATION, "qemu:allocation-depth", "unheard:of")
    with NbdClient(serve("-f", "qcow2", "-A", top), "disk", contexts=contexts) as client:
        assert client.contexts == set(contexts[:2])
        assert [found.flags for found in client.ranges("qemu:allocation-depth")] == [2]
        assert [found.flags for found in client.ranges()] == [0]


def test_several_connections_read_at_once(serve: Callable[..., Path], tmp_path: Path) -> None:
    content = CHANCE.randbytes(8 * MIB)
    (tmp_path / "image").write_bytes(content)
    path = serve("-f", "raw", tmp_path / "image")
    found: dict[int, bytes] = {}

    def run(number: int) -> None:
        with NbdClient(path, "disk") as client:
            found[number] = read(client, 0, len(content))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == content for number in range(4))


def test_a_socket_with_a_long_path(serve: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    (tmp_path / "image").write_bytes(bytes(512))
    path = serve("-f", "raw", tmp_path / "image")
    (folder / "linked").symlink_to(path)
    with NbdClient(folder / "linked", "disk") as client:
        assert client.size_bytes == 512


def test_an_unknown_export_and_an_absent_server(serve: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(512))
    path = serve("-f", "raw", tmp_path / "image")
    with pytest.raises(NbdError, match="export 'other' not"):
        NbdClient(path, "other")
    with pytest.raises(NbdError, match="no NBD server answers"):
        NbdClient(tmp_path / "nowhere", "disk")


def test_a_read_that_the_server_cannot_do_leaves_the_connection_whole(
    serve: Callable[..., Path], tmp_path: Path
) -> None:
    content = CHANCE.randbytes(MIB)
    (tmp_path / "image").write_bytes(content)
    (tmp_path / "rules").write_text(
        '[inject-error]\nevent = "none"\niotype = "read"\nsector = "1024"\nerrno = "5"\nonce = "on"\n'
    )
    options = f"driver=raw,file.driver=blkdebug,file.config={tmp_path}/rules"
    options += f",file.image.driver=file,file.image.filename={tmp_path}/image"
    with NbdClient(serve("--image-opts", options), "disk", request_bytes=64 * KIB) as client:
        with pytest.raises(NbdRefused, match="reading from file failed") as raised:
            read(client, 0, MIB)
        assert raised.value.number == 5
        assert read(client, 0, MIB) == content


# -- a server that misbehaves

SIZE = 4096


class BadServer:
    """Speaks the protocol as the client expects it, except where a test has it do otherwise."""

    def __init__(self, path: Path, behave: Callable[[BadServer], None]) -> None:
        self.path = path
        self._behave = behave
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.client, _ = self._listening.accept()
        with self.client:
            try:
                self._behave(self)
                self.client.settimeout(5)
                while self.client.recv(65536):
                    pass
            except OSError:
                return

    def close(self) -> None:
        self._listening.close()
        self._thread.join(10)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.client.recv(length - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    def greet(self, flags: int = 3) -> None:
        self.client.sendall(wire.GREETING.pack(wire.SERVER_MAGIC, wire.OPTION_MAGIC, flags))
        self.receive(4)

    def option(self) -> int:
        _, option, length = wire.OPTION.unpack(self.receive(wire.OPTION.size))
        self.receive(length)
        return int(option)

    def answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self.client.sendall(wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def negotiate(self, size: int = SIZE, flags: int = 3) -> None:
        self.greet()
        self.answer(self.option(), wire.REPLY_ACK)
        option = self.option()
        self.answer(option, wire.REPLY_META_CONTEXT, struct.pack(">I", 9) + ALLOCATION.encode())
        self.answer(option, wire.REPLY_ACK)
        option = self.option()
        self.answer(option, wire.REPLY_INFO, struct.pack(">HQH", 0, size, flags))
        self.answer(option, wire.REPLY_ACK)

    def request(self) -> tuple[int, int, int]:
        _, _, _, cookie, offset, length = wire.REQUEST.unpack(self.receive(wire.REQUEST.size))
        return cookie, offset, length

    def chunk(self, cookie: int, kind: int, data: bytes = b"", *, done: bool = True, magic: int = 0) -> None:
        head = wire.CHUNK.pack(magic or wire.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, len(data))
        self.client.sendall(head + data)

    def data(self, cookie: int, offset: int, content: bytes, *, done: bool = True) -> None:
        self.chunk(cookie, wire.CHUNK_DATA, struct.pack(">Q", offset) + content, done=done)


@pytest.fixture
def bad(tmp_path: Path) -> Iterator[Callable[[Callable[[BadServer], None]], Path]]:
    made: list[BadServer] = []

    def start(behave: Callable[[BadServer], None]) -> Path:
        made.append(BadServer(tmp_path / f"bad{len(made)}", behave))
        return made[-1].path

    yield start
    for server in made:
        server.close()


def first(act: Callable[[BadServer, int, int, int], None]) -> Callable[[BadServer], None]:
    """Behave until the first request, then `act` on it."""

    def behave(server: BadServer) -> None:
        server.negotiate()
        act(server, *server.request())

    return behave


HANDSHAKES = {
    "does not greet": lambda s: s.client.sendall(bytes(64)),
    "fixed newstyle": lambda s: s.greet(flags=0),
    "hung up": lambda s: s.client.shutdown(socket.SHUT_RDWR),
    "was not asked": lambda s: (s.greet(), s.option(), s.answer(99, wire.REPLY_ACK)),
    "refused option 8: no": lambda s: (s.greet(), s.answer(s.option(), wire.REPLY_ERROR_BIT | 1, b"no")),
    "is 4294967295 bytes long": lambda s: (
        s.greet(),
        s.client.sendall(wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, s.option(), wire.REPLY_ACK, 0xFFFFFFFF)),
    ),
    "is not possible": lambda s: s.negotiate(size=1 << 63),
    "how large": lambda s: (
        s.greet(),
        s.answer(s.option(), wire.REPLY_ACK),
        s.answer(s.option(), wire.REPLY_ACK),
        s.answer(s.option(), wire.REPLY_ACK),
    ),
}
READS = {
    "is no reply": lambda s, cookie, offset, length: s.chunk(cookie, 0, magic=0x12345678),
    "without structure": lambda s, cookie, offset, length: s.client.sendall(
        wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)
    ),
    "with error 5": lambda s, cookie, offset, length: s.client.sendall(
        wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 5, cookie)
    ),
    "request that was not made": lambda s, cookie, offset, length: s.data(cookie + 77, offset, bytes(length)),
    "left out": lambda s, cookie, offset, length: s.data(cookie, offset, bytes(length - 1)),
    "4096 bytes at 1 that were not asked": lambda s, cookie, offset, length: s.data(cookie, offset + 1, bytes(length)),
    "or twice": lambda s, cookie, offset, length: (
        s.data(cookie, offset, bytes(512), done=False),
        s.data(cookie, offset + 511, bytes(512), done=False),
    ),
    "chunk of type 5": lambda s, cookie, offset, length: s.chunk(cookie, wire.CHUNK_BLOCK_STATUS, bytes(12)),
    "chunk of type 0": lambda s, cookie, offset, length: s.chunk(cookie, wire.CHUNK_NONE, done=False),
    "message is 2 bytes long": lambda s, cookie, offset, length: s.chunk(cookie, wire.CHUNK_ERROR_BIT | 1, b"xx"),
    "not the protocol's form": lambda s, cookie, offset, length: s.chunk(
        cookie, wire.CHUNK_ERROR_BIT | 1, struct.pack(">IH", 5, 100)
    ),
    "it hung up": lambda s, cookie, offset, length: s.client.close(),
    "no answer within 0.3 s": lambda s, cookie, offset, length: None,
}
STATUSES = {
    "did not tell": lambda s, cookie, offset, length: s.chunk(cookie, wire.CHUNK_NONE),
    "told metadata that were not asked": lambda s, cookie, offset, length: s.chunk(
        cookie, wire.CHUNK_BLOCK_STATUS, struct.pack(">III", 8, SIZE, 0)
    ),
    "metadata of no bytes": lambda s, cookie, offset, length: s.chunk(
        cookie, wire.CHUNK_BLOCK_STATUS, struct.pack(">III", 9, 0, 0)
    ),
    "metadata are 13 bytes long": lambda s, cookie, offset, length: s.chunk(cookie, wire.CHUNK_BLOCK_STATUS, bytes(13)),
    "twice": lambda s, cookie, offset, length: [
        s.chunk(cookie, wire.CHUNK_BLOCK_STATUS, struct.pack(">III", 9, SIZE, 0), done=False) for _ in range(2)
    ],
    "request that was not made": lambda s, cookie, offset, length: s.chunk(cookie + 1, wire.CHUNK_NONE),
}


@pytest.mark.parametrize("message", HANDSHAKES)
def test_a_bad_handshake_is_told(bad: Callable[[Callable[[BadServer], None]], Path], message: str) -> None:
    with pytest.raises(NbdError, match=message):
        NbdClient(bad(HANDSHAKES[message]), "disk", timeout_seconds=60)


@pytest.mark.parametrize("message", READS)
def test_a_bad_reply_to_a_read_is_told(bad: Callable[[Callable[[BadServer], None]], Path], message: str) -> None:
    timeout_seconds = 0.3 if message == "no answer within 0.3 s" else 60
    client = NbdClient(bad(first(READS[message])), "disk", timeout_seconds=timeout_seconds)
    with pytest.raises(NbdError, match=message):
        read(client, 0, SIZE)
    with pytest.raises(SnapshotError, match="closed"):
        read(client, 0, SIZE)
    client.close()


@pytest.mark.parametrize("message", STATUSES)
def test_bad_metadata_are_told(bad: Callable[[Callable[[BadServer], None]], Path], message: str) -> None:
    with (
        NbdClient(bad(first(STATUSES[message])), "disk", timeout_seconds=60) as client,
        pytest.raises(NbdError, match=message),
    ):
        list(client.ranges())


def test_replies_out_of_order_in_pieces_and_as_holes(bad: Callable[[Callable[[BadServer], None]], Path]) -> None:
    content = CHANCE.randbytes(SIZE - 1024) + bytes(1024)

    def behave(server: BadServer) -> None:
        server.negotiate()
        asked = [server.request() for _ in range(4)]
        for cookie, offset, length in reversed(asked):
            if offset == SIZE - 1024:
                server.chunk(cookie, wire.CHUNK_HOLE, struct.pack(">QI", offset, length))
                continue
            middle = offset + length // 2
            server.data(cookie, middle, content[middle : offset + length], done=False)
        for cookie, offset, length in asked[:3]:
            server.data(cookie, offset, content[offset : offset + length // 2], done=False)
            server.chunk(cookie, wire.CHUNK_NONE)

    with NbdClient(bad(behave), "disk", request_bytes=1024, in_flight=4) as client:
        assert read(client, 0, SIZE) == content
