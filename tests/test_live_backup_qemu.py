"""A real Linux guest under load, backed up live ten times; each backup brought back beside the first, which goes on.

The guest (tests/lab/guest) writes a counter to its RAM and to both disks all the time and checks that they agree; it
says so on its serial console. A QEMU monitor of the tests' own looks at the block graph past vmsnap.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guardians import remove_host
from tests.lab import WITH_BARE_DISK, LabMachine, available_qemus
from tests.lab import serial as console
from tests.lab.machine import PATIENCE_SECONDS
from tests.lab.qemus import QemuBuild
from tests.left_out import some_of
from vmsnap.controller import Controller
from vmsnap.host import HostFolders
from vmsnap.model import VmState
from vmsnap.places import create_repository
from vmsnap.repository import Repository

pytestmark = pytest.mark.qemu

ROUNDS = 10
"""With the newest QEMU; a third of them in the suite with older ones."""
BUILDS = [pytest.param(build, id=f"qemu-{build.version}") for build in available_qemus()]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    yield folder
    remove_host(folder)


@pytest.fixture(params=BUILDS)
def machine(request: pytest.FixtureRequest, place: Path) -> Iterator[LabMachine]:
    build: QemuBuild = request.param
    with LabMachine(place / "vm001", build, disks=WITH_BARE_DISK, settings={"touch_mib": 200}) as started:
        started.wait_for_check(40)
        yield started


@pytest.fixture
def controller(place: Path) -> Iterator[Controller]:
    folders = HostFolders.find(place / "state")
    with Controller(folders) as made:
        yield made


@pytest.fixture
def repository(place: Path) -> Repository:
    return create_repository(str(place / "repository"))


def text_after_two_checks(log: Path, seconds: float = PATIENCE_SECONDS) -> str:
    """What a restored guest has said once it has checked RAM and disks twice."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if len(console.checks(text)) >= 2 or console.faults(text):
            return text
        time.sleep(0.02)
    raise AssertionError(f"the restored guest did not check itself within {seconds} s: {text[-500:]}")


def block_graph(machine: LabMachine) -> tuple[Any, ...]:
    """All of QEMU's block layer that is not traffic, as its own monitor tells it."""
    ask = machine.oracle.execute
    nodes = {(node["node-name"], node["drv"], node["file"], node["ro"]) for node in ask("query-named-block-nodes")}
    return (
        sorted(nodes),
        ask("query-block-jobs"),
        ask("query-block-exports"),
        sorted((info["qdev"], info["inserted"]["node-name"]) for info in ask("query-block")),
    )


def files_beside(machine: LabMachine) -> set[str]:
    return {path.name for path in machine.folder.iterdir()}


def processes_of(folder: Path) -> set[int]:
    """The processes that name the folder in their command line or environment, this one aside."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and int(process.name) != os.getpid():
            found.add(int(process.name))
    return found


def migration_settings(machine: LabMachine) -> tuple[Any, ...]:
    ask = machine.oracle.execute
    return ask("query-migrate-parameters"), ask("query-migrate-capabilities")


@pytest.mark.timeout(600)
def test_live_backups_under_load_each_restored_beside_the_machine_that_never_stops(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    graph, files, processes = block_graph(machine), files_beside(machine), processes_of(place)
    settings = migration_settings(machine)
    pauses = []
    rounds = range(ROUNDS) if machine.qemu.version == available_qemus()[-1].version else some_of(range(ROUNDS))
    for done, _ in enumerate(rounds, 1):
        before = machine.latest_count()
        result = controller.backup("vm001", repository)
        after = machine.latest_count()
        pauses.append(result.pause_seconds)
        assert result.warnings == ()

        assert block_graph(machine) == graph
        assert files_beside(machine) == files
        assert processes_of(place) == processes
        assert migration_settings(machine) == settings
        assert list(controller.folders.memory_dir.rglob("*")) == []

        restored = controller.restore(repository, result.backup, "vm002", run=True)
        driver = controller.drivers.hypervisor("qemu", "vm002", restored.options)
        try:
            text = text_after_two_checks(Path(restored.options["qmp"]).parent / "serial.log")
            assert console.faults(text) == []
            first = console.counts(text)[0]
            assert before <= first <= after + 200, "it goes on at the captured count"
            assert machine.faults() == []
            machine.wait_for_count(after + 1)
            assert driver.state() is VmState.EXECUTING
        finally:
            driver.destroy()
            driver.close()
            controller.remove_vm("vm002")
            shutil.rmtree(place / "state" / "vms" / "vm002")
        assert processes_of(place) == processes

        manifest = repository.manifest(result.backup)
        assert manifest.pause_seconds == result.pause_seconds
        assert {moment.source for moment in manifest.moments} >= {"qemu:STOP", "qemu:RESUME"}
        assert done == len(repository.list())
    assert controller.journal.unfinished() == []
    machine.wait_for_check(machine.latest_count() + 1)
    assert all(0 < pause_seconds <= 5 for pause_seconds in pauses)
    assert all(not report.findings for report in [repository.check(read_data=True)])
