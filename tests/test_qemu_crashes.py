"""A worker that is killed or hangs during a live backup of a real guest: the guest goes on, and nothing is left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Counted
from tests.killed_verbs import LATER, LIVE_CALLS, Later, Scene
from tests.lab import LabMachine, available_qemus
from tests.left_out import some_of
from tests.test_live_backup_qemu import (
    BUILDS,
    block_graph,
    controller,
    files_beside,
    machine,
    migration_settings,
    place,
    processes_of,
    repository,
)
from tests.workers import MAX_PAUSE_SECONDS, SLOW_MACHINE_SECONDS, worker_that_waits_at
from vmsnap.controller import Controller
from vmsnap.repository import Repository

__all__ = ["controller", "machine", "place", "repository"]
pytestmark = pytest.mark.qemu

ELSEWHERE = [later for later in LATER if later.verb != "consistent"]
"""Consistent backups are killed with a guest that has an application, in test_consistent_qemu.py; failovers too."""


def goes_on(machine: LabMachine, seconds: float) -> None:
    """The guest's own counter goes on within so many seconds; it checks itself."""
    machine.wait_for_count(machine.latest_count() + 20, timeout_seconds=seconds)


@pytest.fixture
def scene(machine: LabMachine, controller: Controller, repository: Repository, place: Path) -> Scene:
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    folders = controller.folders

    def at_rest() -> object:
        left = [folders.memory_dir, *(folders.state_dir / name for name in ("duplicates", "vms"))]
        return (
            block_graph(machine), files_beside(machine), migration_settings(machine), processes_of(place),
            {path for folder in left for path in folder.rglob("*")},
        )  # fmt: skip

    def counts_on() -> None:
        goes_on(machine, MAX_PAUSE_SECONDS + SLOW_MACHINE_SECONDS)

    return Scene(controller, repository, place, "qemu", None, at_rest, counts_on)


@pytest.mark.timeout(600)
def test_killed_at_any_instruction_the_guest_goes_on_and_recover_removes_the_rest(
    scene: Scene, machine: LabMachine, counted: Counted
) -> None:
    rest = scene.at_rest()
    calls = LIVE_CALLS if machine.qemu.version == available_qemus()[-1].version else some_of(LIVE_CALLS, 2)
    for call in calls:
        if call == "keep_mark":  # the first that comes after the commit
            assert scene.repository.list() == []
        scene.kill("backup", rest, call)
    # One that is killed before it has kept its dirty bitmaps costs the next a whole reading.
    scene.controller.backup("vm001", scene.repository)
    assert scene.controller.backup("vm001", scene.repository).warnings == ()
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []
    counted(f"{len(calls)} kills ({', '.join(calls)}), the VM ran, nothing was left", cases=len(calls))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", BUILDS[-1:], indirect=True)
@pytest.mark.parametrize("later", ELSEWHERE, ids=lambda later: later.verb)
def test_killed_at_any_instruction_of_what_follows_the_guest_goes_on_and_nothing_is_left(
    scene: Scene, machine: LabMachine, later: Later, counted: Counted
) -> None:
    kills = later.kill_at_each_call(scene)
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []
    counted(f"{len(kills)} kills ({', '.join(kills)}), the VM ran, nothing was left or lost", cases=len(kills))


def test_a_worker_that_hangs_in_the_pause_is_killed_and_the_guest_goes_on(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    """Such as one whose disks do not come to an end with their snapshots."""
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    graph, files, settings = block_graph(machine), files_beside(machine), migration_settings(machine)
    for call in ("snapshot", "duplicate"):
        mark = len(machine.oracle.events())
        worker = worker_that_waits_at(
            controller.folders.state_dir, str(place / "repository"), call, max_pause_seconds=MAX_PAUSE_SECONDS
        )
        assert worker.wait(timeout=60) == -9
        goes_on(machine, 60)
        events = machine.oracle.events()[mark:]
        stopped = next(event for event in events if event["event"] == "STOP")
        resumed = next(event for event in events if event["event"] == "RESUME")
        assert _seconds(resumed) - _seconds(stopped) < MAX_PAUSE_SECONDS + SLOW_MACHINE_SECONDS
        assert controller.recover().kept == ()
        assert (block_graph(machine), files_beside(machine), migration_settings(machine)) == (graph, files, settings)
        assert list(controller.folders.memory_dir.rglob("*")) == []
        assert repository.list() == []
    assert controller.backup("vm001", repository).warnings == ()


def _seconds(event: dict[str, object]) -> float:
    stamp = event["timestamp"]
    if not isinstance(stamp, dict):
        raise TypeError(f"no time stamp: {event}")
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


@pytest.mark.parametrize("capture", ["cow", "precopy"])
def test_memory_that_runs_full_while_it_is_copied_costs_the_backup_and_not_the_guest(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path, capture: str
) -> None:
    """The room was there when it was looked for, and somebody else has taken it since."""
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket), "capture": capture})
    graph, files, settings = block_graph(machine), files_beside(machine), migration_settings(machine)
    memory = controller.folders.memory_dir
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m,mode=0700", "tmpfs", str(memory)], check=True)
    try:
        worker = worker_that_waits_at(controller.folders.state_dir, str(place / "repository"), "prepare")
        with (memory / "somebody else's").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 600 << 20)
        told, _ = worker.communicate("x", timeout=120)
        assert worker.returncode == 1, told
        assert "ERROR" in told
        goes_on(machine, 60)
        assert controller.recover().kept == ()
        assert [path.name for path in memory.rglob("*")] == ["somebody else's"]
    finally:
        subprocess.run(["umount", str(memory)], check=True)
    assert (block_graph(machine), files_beside(machine), migration_settings(machine)) == (graph, files, settings)
    assert repository.list() == []
    assert controller.backup("vm001", repository).warnings == ()
    machine.wait_for_check(machine.latest_check() + 1)
