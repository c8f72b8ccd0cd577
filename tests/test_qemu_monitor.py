"""The shared QMP connection: answers, events, descriptors, and everything that can be wrong with a socket."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.lab import QemuBuild, available_qemus
from vmsnap.errors import Busy, HypervisorError, UnknownVm, UsageError, VmGone
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError

pytestmark = pytest.mark.qemu


class Machine:
    """An empty machine without a guest."""

    def __init__(self, folder: Path, *, build: QemuBuild | None = None, second: Path | None = None) -> None:
        self.socket = folder / "qmp.sock"
        build = build or available_qemus()[0]
        arguments = ["-nodefaults", "-display", "none", "-machine", "none"]
        for path in (self.socket, second) if second else (self.socket,):
            arguments += ["-qmp", f"unix:{path},server=on,wait=off"]
        self.process = subprocess.Popen(
            build.command(*arguments), env=build.start_environment(), stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                Monitor.borrow(self.socket).close()
                return
            except (UnknownVm, VmGone):
                time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="vmsnap-test-"))
    yield place
    shutil.rmtree(place)


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    machine = Machine(folder)
    yield machine
    machine.kill()


@pytest.fixture
def monitor(machine: Machine) -> Iterator[Monitor]:
    with Monitor.borrow(machine.socket) as monitor:
        yield monitor


@contextmanager
def listener(path: Path, *, greeting: bytes) -> Iterator[None]:
    """A server of one client, which greets and then holds the connection for as long as this lasts."""
    over = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.settimeout(60)
        server.listen(1)

        def serve() -> None:
            client, _ = server.accept()
            with client:
                # The client may go away in the middle of a greeting that it does not understand.
                with suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(greeting)
                over.wait()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def test_knows_version_and_process(machine: Machine, monitor: Monitor) -> None:
    assert monitor.version >= (7, 2, 0)
    assert monitor.peer_pid == machine.process.pid
    assert monitor.path == str(machine.socket)


def test_an_error_of_qemu_keeps_its_class(monitor: Monitor) -> None:
    with pytest.raises(MonitorError, match="QEMU refused no-such-command") as caught:
        monitor.execute("no-such-command")
    assert caught.value.error_class == "CommandNotFound"
    assert monitor.execute("query-name") == {}


def test_borrowers_share_one_connection_until_the_last_gives_it_back(machine: Machine, monitor: Monitor) -> None:
    second = Monitor.borrow(f"{machine.socket.parent}/../{machine.socket.parent.name}/qmp.sock")
    assert second.execute("query-status")["running"] is True
    second.close()
    second.close()
    assert monitor.execute("query-status")["running"] is True
    monitor.close()
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(2)
        other.connect(str(machine.socket))
        assert b"QMP" in other.recv(4096)


def test_events_are_kept_in_order_with_qemus_own_time(monitor: Monitor) -> None:
    mark = monitor.mark()
    before = time.time_ns()
    monitor.execute("stop")
    monitor.execute("cont")
    resumed = monitor.wait_for_event("RESUME", since=mark, timeout_seconds=30)
    assert [event.name for event in monitor.events_since(mark)] == ["STOP", "RESUME"]
    assert before - 1000 <= resumed.wall_ns <= time.time_ns()
    began = time.monotonic_ns() - (time.time_ns() - before)
    assert began - 10**6 <= resumed.moment("resume").monotonic_ns <= time.monotonic_ns() + 10**6
    assert monitor.events_since(monitor.mark()) == []


def test_an_event_is_waited_for_by_name_and_content(monitor: Monitor) -> None:
    mark = monitor.mark()
    monitor.execute("stop")
    with pytest.raises(HypervisorError, match="no event RESUME"):
        monitor.wait_for_event("RESUME", since=mark, timeout_seconds=0.05)
    with pytest.raises(HypervisorError, match="no event STOP"):
        monitor.wait_for_event("STOP", since=mark, timeout_seconds=0.05, match=lambda event: event.wall_ns == 0)


def test_one_thread_waits_while_another_works(monitor: Monitor) -> None:
    mark = monitor.mark()
    found = []
    waiter = threading.Thread(
        target=lambda: found.append(monitor.wait_for_event("RESUME", since=mark, timeout_seconds=30).name)
    )
    waiter.start()
    for _ in range(50):
        monitor.execute("query-status")
    monitor.execute("stop")
    monitor.execute("cont")
    waiter.join(30)
    assert found == ["RESUME"]


def test_a_descriptor_reaches_qemu(monitor: Monitor) -> None:
    reading, writing = os.pipe()
    monitor.send_descriptor("ours", writing)
    os.close(writing)
    monitor.execute("closefd", {"fdname": "ours"})
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_qemu_that_dies_ends_every_wait(machine: Machine, monitor: Monitor) -> None:
    threading.Timer(0.1, machine.kill).start()
    with pytest.raises(VmGone):
        monitor.wait_for_event("STOP", timeout_seconds=60)
    with pytest.raises(VmGone):
        monitor.execute("query-status")
    with pytest.raises((VmGone, UnknownVm)):
        Monitor.borrow(machine.socket)


def test_a_new_qemu_on_the_same_socket_is_a_new_connection(machine: Machine, monitor: Monitor, folder: Path) -> None:
    machine.kill()
    second = Machine(folder)
    try:
        with Monitor.borrow(second.socket) as fresh:
            assert fresh.peer_pid == second.process.pid
    finally:
        second.kill()


def test_a_qemu_that_does_not_answer_is_given_up(machine: Machine, monitor: Monitor) -> None:
    os.kill(machine.process.pid, 19)
    with pytest.raises(HypervisorError, match=r"did not answer query-status within 0\.2 s"):
        monitor.execute("query-status", timeout_seconds=0.2)
    os.kill(machine.process.pid, 18)
    assert monitor.execute("query-name") == {}


def test_a_socket_that_is_missing(folder: Path) -> None:
    with pytest.raises(UnknownVm, match="there is no QMP socket"):
        Monitor.borrow(folder / "none.sock")


def test_a_file_that_is_no_socket(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(UsageError, match="is no socket"):
        Monitor.borrow(folder / "file")


def test_a_socket_that_nobody_listens_on(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "dead.sock"))
        server.listen()
    with pytest.raises(VmGone, match="no QEMU listens"):
        Monitor.borrow(folder / "dead.sock")


def test_a_socket_that_serves_somebody_else(machine: Machine) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(machine.socket))
        other.recv(4096)
        with pytest.raises(Busy, match="serves another client"):
            Monitor.borrow(machine.socket)


@pytest.mark.parametrize("build", available_qemus(), ids=lambda build: f"qemu-{build.version}")
def test_a_client_that_comes_while_much_happens(folder: Path, build: QemuBuild) -> None:
    # QEMU 10.0 sends an event ahead of the greeting to some six of 1000 such clients.
    machine = Machine(folder, build=build, second=folder / "second.sock")
    over = threading.Event()

    def happen() -> None:
        with Monitor.borrow(folder / "second.sock") as other:
            while not over.is_set():
                other.execute_all([("stop", None), ("cont", None)] * 5)

    thread = threading.Thread(target=happen)
    thread.start()
    try:
        for _ in range(500):
            with Monitor.borrow(machine.socket) as monitor:
                assert monitor.version >= (7, 2, 0)
    finally:
        over.set()
        thread.join()
        machine.kill()


def test_events_that_come_before_the_greeting(folder: Path) -> None:
    event = b'{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "RESUME"}\r\n'
    version = {"qemu": {"major": 7, "minor": 2, "micro": 1}}
    greeting = json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b'\n{"return": {}, "id": 1}\n'
    with (
        listener(folder / "early.sock", greeting=event * 2 + greeting),
        Monitor.borrow(folder / "early.sock") as monitor,
    ):
        assert monitor.version == (7, 2, 1)


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH\r\n", b"{}\n", b'{"QMP": 1}\n', b"x" * 100_000])
def test_a_socket_that_speaks_something_else(folder: Path, greeting: bytes) -> None:
    with (
        listener(folder / "other.sock", greeting=greeting),
        pytest.raises(UsageError, match="does not speak QMP"),
    ):
        Monitor.borrow(folder / "other.sock")


def test_a_socket_with_a_path_longer_than_addresses_are(folder: Path) -> None:
    deep = folder / ("d" * 120)
    deep.mkdir()
    place = os.open(deep, os.O_PATH)
    version = {"qemu": {"major": 7, "minor": 2, "micro": 1}}
    greeting = json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b'\n{"return": {}, "id": 1}\n'
    with (
        listener(Path(f"/proc/self/fd/{place}/long.sock"), greeting=greeting),
        Monitor.borrow(deep / "long.sock") as monitor,
    ):
        assert monitor.version == (7, 2, 1)
    os.close(place)
