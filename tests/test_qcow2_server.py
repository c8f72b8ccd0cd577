"""The NBD server of a real QEMU (without a guest): stopped without a trace, whoever has just hung up on it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import available_qemus
from tests.lab.qemus import QemuBuild
from tests.qemu_stage import until
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.nbd_wire import NbdError
from vmsnap_drivers.snapshots.qcow2 import server

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

BARE = ("-machine", "none", "-nodefaults", "-display", "none")


@pytest.fixture(params=[pytest.param(build, id=build.version) for build in available_qemus()])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockGraph]:
    build: QemuBuild = request.param
    qmp = tmp_path / "qmp"
    with (tmp_path / "stderr").open("wb") as stderr:
        qemu = subprocess.Popen(
            build.command(*BARE, "-qmp", f"unix:{qmp},server=on,wait=off"),
            stderr=stderr,
            env=build.start_environment(),
        )
    try:
        until(qmp.exists, "QEMU to listen")
        yield BlockGraph(Monitor.borrow(qmp))
    finally:
        qemu.kill()
        qemu.wait()


def test_it_is_stopped_though_a_client_died_while_it_negotiated(graph: BlockGraph, tmp_path: Path) -> None:
    path = tmp_path / "nbd"
    for _ in range(20):
        server.start(graph, path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert client.recv(8) == b"NBDMAGIC"
        server.stop(graph, path)
        assert not path.exists()
    server.stop(graph, path)


def test_looking_whether_it_listens_is_no_broken_connection_to_it(graph: BlockGraph, tmp_path: Path) -> None:
    for _ in range(20):
        server.start(graph, tmp_path / "nbd")
        server.stop(graph, tmp_path / "nbd")
    assert (tmp_path / "stderr").read_text() == ""


def test_a_server_that_does_not_answer_is_not_taken_for_stopped(
    graph: BlockGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_ANSWERS_WITHIN_SECONDS", 0.2)
    path = tmp_path / "nbd"
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        with pytest.raises(NbdError, match=r"no answer within 0\.2 s"):
            server.stop(graph, path)
        assert path.exists()
    server.stop(graph, path)
    assert not path.exists()


def test_a_socket_that_qemu_was_given_and_never_served_is_taken_back(graph: BlockGraph, tmp_path: Path) -> None:
    """vmsnap was killed in between."""
    path = tmp_path / "nbd"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        graph.monitor.send_descriptor(path.stem, listening.fileno())
    graph.monitor.close()
    with Monitor.borrow(tmp_path / "qmp") as anew:
        server.stop(BlockGraph(anew), path)
        assert not path.exists()
        server.start(BlockGraph(anew), path)
        server.stop(BlockGraph(anew), path)
