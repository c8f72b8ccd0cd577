"""The pause has a limit, and what cannot keep it gives way: on real guests of every QEMU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine
from tests.lab import serial as console
from tests.left_out import some_of
from tests.test_live_backup_qemu import (
    BUILDS,
    block_graph,
    controller,
    files_beside,
    migration_settings,
    place,
    repository,
    text_after_two_checks,
)
from tests.workers import worker_that_waits_at
from vmsnap.controller import Controller
from vmsnap.repository import Repository

__all__ = ["controller", "place", "repository"]
pytestmark = pytest.mark.qemu

BUSY = {"touch_mib": 100, "stamp_mib": 128, "dirty_pages": 16384, "pause_us": 0, "count_every": 1, "check_every": 5}
"""64 MiB of RAM are written for each count, as fast as the guest's processor can."""
SLOW_MACHINE_SECONDS = 240


@pytest.fixture(params=some_of(BUILDS, 2))
def busy_machine(request: pytest.FixtureRequest, place: Path) -> Iterator[LabMachine]:
    with LabMachine(place / "vm001", request.param, settings=BUSY) as started:
        started.wait_for_check(5, timeout_seconds=SLOW_MACHINE_SECONDS)
        yield started


def test_a_guest_that_writes_too_fast_for_pre_copy_is_captured_by_copy_on_write(
    busy_machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    machine = busy_machine
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    graph, files, settings = block_graph(machine), files_beside(machine), migration_settings(machine)
    learned = controller.folders.state_dir / "qemu" / "pauses" / "vm001.json"
    learned.parent.mkdir(parents=True)
    for _ in range(5):
        # This makes it try pre-copy first, on the QEMU too for which it would not.
        learned.write_text('{"precopy": 0.25}')
        result = controller.backup("vm001", repository)
        assert result.warnings == ()
        if result.capture == "cow":
            break
    # Other programs may have kept the guest from writing, once.
    assert result.capture == "cow"
    details = repository.manifest(result.backup).duplicate_details
    assert isinstance(details, dict)
    assert "pre-copy: the guest writes too fast" in details["pause"]["reason"]
    assert (block_graph(machine), files_beside(machine), migration_settings(machine)) == (graph, files, settings)
    assert list(controller.folders.memory_dir.rglob("*")) == []
    assert controller.journal.unfinished() == []

    restored = controller.restore(repository, result.backup, "vm002", run=True)
    driver = controller.drivers.hypervisor("qemu", "vm002", restored.options)
    try:
        text = text_after_two_checks(Path(restored.options["qmp"]).parent / "serial.log", SLOW_MACHINE_SECONDS)
        assert console.faults(text) == []
    finally:
        driver.destroy()
        driver.close()
        controller.remove_vm("vm002")
        shutil.rmtree(place / "state" / "vms" / "vm002")
    machine.wait_for_check(machine.latest_check() + 1, timeout_seconds=SLOW_MACHINE_SECONDS)


def test_a_pause_that_nothing_can_keep_costs_the_backup_and_nothing_else(
    busy_machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    machine = busy_machine
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    graph, files, settings = block_graph(machine), files_beside(machine), migration_settings(machine)
    worker = worker_that_waits_at(
        controller.folders.state_dir, str(place / "repository"), "prepare", max_pause_seconds=0.001
    )
    told, _ = worker.communicate("x", timeout=120)
    # Killed by the guardian, or quick enough to see it.
    assert worker.returncode in (-9, 1), told
    machine.wait_for_count(machine.latest_count() + 2, timeout_seconds=SLOW_MACHINE_SECONDS)
    assert controller.recover().kept == ()
    assert (block_graph(machine), files_beside(machine), migration_settings(machine)) == (graph, files, settings)
    assert list(controller.folders.memory_dir.rglob("*")) == []
    assert repository.list() == []
    assert controller.backup("vm001", repository).warnings == ()
    machine.wait_for_check(machine.latest_check() + 1, timeout_seconds=SLOW_MACHINE_SECONDS)
