"""``-o memory=supported``: memory by libvirt's own external snapshot, disks by the mechanism, all from one pause."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import serial as console
from tests.libvirt_stage import Stage, staged
from tests.test_live_backup_qemu import text_after_two_checks
from tests.workers import MAX_PAUSE_SECONDS, SLOW_MACHINE_SECONDS, worker_that_waits_at
from vmsnap.errors import CannotCapture

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

PAUSE_SECONDS = 30
"""What a busy machine may need to save 256 MiB, the guest standing still."""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as made:
        made.controller.remove_vm("vm001")
        made.controller.add_vm("vm001", "libvirt", {**made.options, "memory": "supported"})
        made.controller.backup("vm001", made.repository, max_pause_seconds=PAUSE_SECONDS)
        yield made


def test_backups_in_a_row_leave_nothing_and_the_manifest_says_how_they_were_made(stage: Stage) -> None:
    rest = stage.at_rest()
    for _ in range(2):
        result = stage.controller.backup("vm001", stage.repository, max_pause_seconds=PAUSE_SECONDS)
        assert result.warnings == () and result.capture == "libvirt"
        assert stage.at_rest() == rest
        manifest = stage.repository.manifest(result.backup)
        assert manifest.capture == "libvirt"
        assert {moment.source for moment in manifest.moments} >= {"qemu:STOP", "qemu:RESUME"}
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []


def test_memory_and_disks_come_back_from_one_instant(stage: Stage) -> None:
    machine, controller = stage.machine, stage.controller
    before = machine.latest_count()
    backup = controller.backup("vm001", stage.repository, max_pause_seconds=PAUSE_SECONDS).backup
    after = machine.latest_count()
    with stage.restored(backup):
        # The guest compares its disks with what it remembers.
        text = text_after_two_checks(stage.serial_log("vm002"))
        assert console.faults(text) == []
        assert before <= console.counts(text)[0] <= after + 200, "it goes on at the captured count"
    assert machine.faults() == []


def test_a_pause_that_would_be_too_long_is_refused_before_it(stage: Stage) -> None:
    count = stage.machine.latest_count()
    with pytest.raises(CannotCapture, match=r"would stand still for about \d+\.\d s while libvirt saves its memory"):
        stage.controller.backup("vm001", stage.repository, max_pause_seconds=0.05)
    stage.machine.wait_for_count(count + 20)


def test_a_worker_that_is_killed_in_the_pause(stage: Stage) -> None:
    rest = stage.at_rest()
    for call in ("duplicate", "resume", "finish_duplicate"):
        worker = worker_that_waits_at(stage.controller.folders.state_dir, str(stage.place / "repository"), call)
        worker.kill()
        worker.communicate()
        machine = stage.machine
        machine.wait_for_count(
            machine.latest_count() + 20, timeout_seconds=MAX_PAUSE_SECONDS + SLOW_MACHINE_SECONDS + 15
        )
        assert stage.controller.recover().kept == (), call
        assert stage.at_rest() == rest, call
    assert stage.machine.faults() == []
