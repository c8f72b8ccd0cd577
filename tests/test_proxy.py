"""The proxy of the tests does what it says: otherwise nothing that a test shows behind it is shown."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.proxy import Proxy, Trouble, http_answer


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.got = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        try:
            while data := connection.recv(1 << 16):
                self.got += data
                connection.sendall(data)
        except OSError:
            pass
        connection.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.listener.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", echo.port)) as found:
        yield found


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), 10)


def receive(connection: socket.socket, count: int) -> bytes:
    """Up to `count` bytes; fewer where the connection ends before."""
    got = b""
    try:
        while len(got) < count and (data := connection.recv(count - len(got))):
            got += data
    except ConnectionResetError:
        pass
    return got


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_without_trouble_all_goes_through(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        for _ in range(3):
            connection.sendall(b"x" * 100_000)
            assert receive(connection, 100_000) == b"x" * 100_000
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 1) == b""
    assert (proxy.bytes_up, proxy.bytes_down, proxy.connections) == (300_000, 300_000, 1)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cut_at_a_byte(proxy: Proxy, echo: Echo, direction: str) -> None:
    trouble = proxy.add(Trouble("cut", 700, direction))  # type: ignore[arg-type]
    with connect(proxy) as connection:
        connection.sendall(b"y" * 500)
        assert receive(connection, 500) == b"y" * 500
        connection.sendall(b"z" * 500)
        assert len(receive(connection, 500)) <= 200
    assert trouble.struck == 1
    if direction == "up":
        until(lambda: echo.got == b"y" * 500 + b"z" * 200)
    with connect(proxy) as connection:
        connection.sendall(b"again" * 500)
        assert receive(connection, 2500) == b"again" * 500


def test_corrupt_one_byte_behind_a_word(proxy: Proxy) -> None:
    proxy.add(Trouble("corrupt", 3, after=b"PUT "))
    with connect(proxy) as connection:
        connection.sendall(b"GET 0123 PUT 0123456")
        assert receive(connection, 20) == b"GET 0123 PUT 012#456"
        connection.sendall(b"PUT 0123")
        assert receive(connection, 8) == b"PUT 0123"


def test_stall_until_released(proxy: Proxy, echo: Echo) -> None:
    proxy.add(Trouble("stall", 10))
    with connect(proxy) as connection:
        connection.sendall(b"x" * 20)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            receive(connection, 20)
        assert echo.got == b"x" * 10
        proxy.clear()
        connection.settimeout(10)
        assert len(receive(connection, 20)) <= 10
    with connect(proxy) as connection:
        connection.sendall(b"fine")
        assert receive(connection, 4) == b"fine"


def test_answer_in_the_servers_place(proxy: Proxy, echo: Echo) -> None:
    answer = http_answer(503, "Slow Down", "SlowDown")
    proxy.add(Trouble("answer", 0, after=b"PUT /", answer=answer, times=2))
    for _ in range(2):
        with connect(proxy) as connection:
            connection.sendall(b"PUT /key" + b"d" * 100_000)
            # The word that it waited for went through, and this server sends everything back.
            assert receive(connection, 1 << 20).replace(b"PUT /", b"") == answer
    with connect(proxy) as connection:
        connection.sendall(b"PUT /key")
        assert receive(connection, 8) == b"PUT /key"
    assert not echo.got.count(b"d")


def test_slow_and_far_away(echo: Echo) -> None:
    with Proxy(("127.0.0.1", echo.port), latency_seconds=0.05) as proxy:
        with connect(proxy) as connection:
            begun = time.monotonic()
            connection.sendall(b"ping")
            assert receive(connection, 4) == b"ping"
            assert time.monotonic() - begun >= 0.1
        proxy.add(Trouble("slow", bytes_per_second=100_000))
        with connect(proxy) as connection:
            begun = time.monotonic()
            connection.sendall(b"x" * 50_000)
            assert receive(connection, 50_000) == b"x" * 50_000
            assert time.monotonic() - begun >= 0.5


def test_a_server_that_is_away(proxy: Proxy) -> None:
    proxy.refusing = True
    try:
        with connect(proxy) as connection:
            assert receive(connection, 1) == b""
    except (BrokenPipeError, ConnectionResetError):
        pass  # reset before connect() had returned
    proxy.refusing = False
    with connect(proxy) as connection:
        connection.sendall(b"back")
        assert receive(connection, 4) == b"back"
        proxy.cut_all()
        assert receive(connection, 1) == b""
