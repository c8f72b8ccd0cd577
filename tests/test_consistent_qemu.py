"""Consistent backups of a real guest without an agent in it, on both QEMUs: what an application had only in RAM is on
the disks of the backup, the file systems are clean, and the original never noticed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine, available_qemus, disk_records, ext4
from tests.lab import serial as console
from tests.lab.qemus import QemuBuild
from tests.lab.qmp import seconds_between
from tests.left_out import some_of
from tests.qemu_stage import ENTRIES_AT_LEAST, Stage, read_ledger, staged
from tests.test_live_backup_qemu import block_graph, controller, files_beside, place, processes_of, repository
from tests.workers import worker_that_waits_at
from vmsnap.controller import Controller
from vmsnap.errors import HypervisorError
from vmsnap.repository import Repository

__all__ = ["controller", "place", "repository"]
pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

BUILDS = [pytest.param(build, id=f"qemu-{build.version}") for build in available_qemus()]
KILLED_AT = [
    ("finish_duplicate", 1),
    ("clone", 1),
    ("load", 1),
    ("switch_disks", 1),
    ("cut_network", 1),
    ("resume", 2),
    ("shut_down", 1),
    ("destroy", 1),
    ("delete_clone", 1),
]
"""Calls of drivers at which the worker is killed, and which one of that name: those that no live backup has."""


@pytest.fixture(scope="module", params=some_of(BUILDS[::-1], 2))
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with staged(request.param) as made:
        yield made


def test_what_was_only_in_memory_is_on_the_clean_disks_and_the_original_never_notices(stage: Stage) -> None:
    machine, bridge = stage.machine, stage.bridge
    live = stage.controller.backup("vm001", stage.repository)
    graph, files, processes = block_graph(machine), files_beside(machine), processes_of(stage.place)
    entries, stops, count = stage.entries(), stage.stops(), machine.latest_count()
    assert entries >= ENTRIES_AT_LEAST

    consistent = stage.controller.backup("vm001", stage.repository, mode="consistent", timeout_seconds=200)

    # The original: one pause, as long as was said; nothing of its duplicate is left, and not one packet came from it.
    assert stage.stops()[len(stops) :] == ["STOP", "RESUME"]
    stop, resume = [e for e in machine.oracle.events() if e["event"] in ("STOP", "RESUME")][-2:]
    assert seconds_between(stop, resume) == pytest.approx(consistent.pause_seconds, abs=0.002)
    assert machine.wait_for_count(machine.latest_count() + 20) > count
    assert machine.faults() == []
    assert block_graph(machine) == graph
    assert files_beside(machine) == files
    assert processes_of(stage.place) == processes
    assert stage.left() == []
    assert len(bridge.numbers()) > 50 and bridge.repeated() == set()

    # The live backup: as after a power failure. What was only in RAM is lost.
    image = stage.disk(live.backup, "disk1")
    assert ext4.needs_recovery(image) and ext4.complaints(image)
    ext4.replay(image)
    lost = read_ledger(image)
    assert lost.buffered is None and lost.integrity == "ok" and lost.entries == lost.total == 0
    assert disk_records.flushed_count(stage.disk(live.backup, "disk0")) is None

    # The consistent one: nothing is.
    manifest = stage.repository.manifest(consistent.backup)
    assert manifest.mode == consistent.mode == "consistent" and manifest.memory == ()
    image = stage.disk(consistent.backup, "disk1")
    assert not ext4.needs_recovery(image)
    assert ext4.complaints(image) == ""
    kept = read_ledger(image)
    assert kept.integrity == "ok" and not kept.open_journal
    assert kept.buffered == kept.entries and kept.entries >= entries
    assert kept.amount == kept.total == sum(n * 7919 % 1000 for n in range(1, kept.entries + 1))
    flushed = disk_records.flushed_count(stage.disk(consistent.backup, "disk0"))
    assert flushed is not None and flushed >= count


def test_a_live_backup_is_consolidated_and_verified_by_booting(stage: Stage) -> None:
    entries = stage.entries()
    live = stage.controller.backup("vm001", stage.repository)
    processes = processes_of(stage.place)
    verified = stage.controller.verify_boot(stage.repository, live.backup, timeout_seconds=200)
    assert re.fullmatch(r"it wrote to its serial line \(serial.log\) within \d+\.\d s", verified.life)
    target = stage.place / "clean"
    result = stage.controller.consolidate(stage.repository, live.backup, target, timeout_seconds=200)
    disks = {disk.device: Path(disk.address) for disk in result.disks}
    assert ext4.complaints(disks["disk1"]) == ""
    kept = read_ledger(disks["disk1"])
    assert kept.buffered == kept.entries and kept.entries >= entries and kept.amount == kept.total
    assert processes_of(stage.place) == processes
    assert stage.left() == []
    assert stage.bridge.repeated() == set()
    assert stage.machine.faults() == []


def test_a_worker_that_is_killed_at_any_instruction_leaves_the_original_alone_and_nothing_behind(stage: Stage) -> None:
    machine = stage.machine
    graph, files, processes = block_graph(machine), files_beside(machine), processes_of(stage.place)
    for call, number in some_of(KILLED_AT, 2):
        stored = len(stage.repository.list())
        worker = worker_that_waits_at(
            stage.controller.folders.state_dir, str(stage.place / "repository"), call, verb="consistent", number=number
        )
        worker.kill()
        worker.communicate()
        recovered = stage.controller.recover()
        assert recovered.kept == (), (call, recovered)
        assert stage.left() == [], call
        assert block_graph(machine) == graph, call
        assert files_beside(machine) == files, call
        assert processes_of(stage.place) == processes, call
        assert stage.controller.journal.unfinished() == []
        # Only after the commit is there a backup.
        assert len(stage.repository.list()) == stored + (call in ("delete_clone",)), call
        machine.wait_for_count(machine.latest_count() + 10)
    assert stage.bridge.repeated() == set()
    assert machine.faults() == []
    assert stage.stops().count("STOP") == stage.stops().count("RESUME")


@pytest.fixture(params=some_of(BUILDS[::-1], 2))
def deaf(request: pytest.FixtureRequest, place: Path) -> Iterator[LabMachine]:
    build: QemuBuild = request.param
    with LabMachine(place / "vm001", build, settings={"deaf": 1}) as machine:
        machine.wait_for_count(20)
        yield machine


def test_a_guest_that_ignores_its_power_button_fails_the_backup_or_keeps_it_live(
    deaf: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    controller.add_vm("vm001", "qemu", {"qmp": str(deaf.qmp_socket)})
    processes, graph = processes_of(place), block_graph(deaf)
    with pytest.raises(HypervisorError, match="within 1 s: it ignores its power button"):
        controller.backup("vm001", repository, mode="consistent", timeout_seconds=1)
    assert repository.list() == []
    kept = controller.backup("vm001", repository, mode="consistent", timeout_seconds=1, on_timeout="keep-live")
    assert kept.mode == "live" and "not consistent but live" in kept.warnings[0]
    assert repository.manifest(kept.backup).memory
    assert processes_of(place) == processes
    assert block_graph(deaf) == graph
    assert not list((place / "state" / "qemu" / "run").glob("*"))
    deaf.wait_for_count(deaf.latest_count() + 20)
    assert console.faults(deaf.serial_text()) == []


def test_the_lab_sees_a_file_system_that_was_cut_off(tmp_path: Path) -> None:
    """The oracle: an image that is clean, and one whose flag says that it must be recovered."""
    image = tmp_path / "ext4.raw"
    ext4.make_ext4(image, 8 << 20)
    assert not ext4.needs_recovery(image) and ext4.complaints(image) == ""
    subprocess.run(["debugfs", "-w", "-R", "feature +needs_recovery", str(image)], check=True, capture_output=True)
    assert ext4.needs_recovery(image) and ext4.complaints(image)
    assert ext4.content_of(image, "buffer") is None
