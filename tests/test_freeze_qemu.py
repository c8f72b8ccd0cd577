"""Frozen disks of a real guest under real QEMUs: one disk is copied as a file, after the pause, the other one is QEMU's
own, within it. What the guest writes meanwhile is in its disks afterwards, whoever was killed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import WITH_BARE_DISK, LabMachine, disk_records, find_qemu
from tests.left_out import some_of
from tests.qemu_stage import until
from tests.test_live_backup_qemu import BUILDS, block_graph, controller, files_beside, place, repository
from tests.test_side_by_side import WatchedDrivers
from tests.workers import worker_that_waits_at
from vmsnap.controller import Controller
from vmsnap.errors import SnapshotError
from vmsnap.model import DiskSnapshot
from vmsnap.repository import Repository

__all__ = ["controller", "place", "repository"]
pytestmark = pytest.mark.qemu

MIB = 1 << 20
PATIENCE_SECONDS = 120.0
FREEZE_CALLS = ("plan_freeze", "prepare_freeze", "freeze_disks", "check_frozen", "thaw_disks")
Take = Callable[[], tuple[DiskSnapshot, ...]]


@pytest.fixture(params=some_of(BUILDS, 2))
def machine(request: pytest.FixtureRequest, place: Path) -> Iterator[LabMachine]:
    """A guest with a qcow2 disk and a raw one without a node of its format, both written to all the time."""
    with LabMachine(place / "vm001", request.param, disks=WITH_BARE_DISK) as started:
        started.wait_for_check(10, PATIENCE_SECONDS)
        yield started


def add(controller: Controller, machine: LabMachine) -> None:
    """Registered so, its raw disk is taken as a file."""
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket), "plain_files": "yes"})


def worker_at(controller: Controller, place: Path, call: str) -> subprocess.Popen[str]:
    """A backup with frozen disks that waits at a call of a driver."""
    state, url = controller.folders.state_dir, str(place / "repository")
    return worker_that_waits_at(state, url, call, verb="frozen", max_pause_seconds=30)


@pytest.mark.timeout(900)
def test_two_mechanisms_one_within_the_pause_and_one_after_it_show_one_instant(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    add(controller, machine)
    graph, files, held, count = block_graph(machine), files_beside(machine), [], machine.latest_count()

    def act(name: str, take: Take) -> tuple[DiskSnapshot, ...]:
        if name == "file":
            before = machine.disk_path(1).stat().st_mtime_ns
            machine.wait_for_count(machine.latest_count() + 20, PATIENCE_SECONDS)
            held.append(machine.disk_path(1).stat().st_mtime_ns == before)
        return take()

    drivers = WatchedDrivers(controller.folders.context(), act)
    with Controller(controller.folders, drivers=drivers) as watched:
        result = watched.backup("vm001", repository, freeze="overlay", max_pause_seconds=30)
    assert held == [True], "the guest runs, and its disk is as it was"
    manifest = repository.manifest(result.backup)
    assert [(disk.device, disk.mechanism) for disk in manifest.disks] == [("disk0", "qcow2"), ("disk1", "file")]
    assert manifest.freeze == "overlay"
    names = [moment.name for moment in manifest.moments]
    assert names[0] == "pause" and names[-1] == "resume" and {"freeze", "disks"} < set(names)
    plain = controller.backup("vm001", repository, max_pause_seconds=30)
    assert repository.manifest(plain.backup).freeze == ""
    assert block_graph(machine) == graph and files_beside(machine) == files
    assert "serial" in controller.verify_boot(repository, result.backup, timeout_seconds=200).life
    clean = controller.consolidate(repository, result.backup, place / "clean", timeout_seconds=200)
    assert disk_records.newest_record(Path(clean.disks[1].address), 1) >= count
    machine.wait_for_check(machine.latest_check() + 1, PATIENCE_SECONDS)


@pytest.mark.timeout(900)
def test_killed_at_any_call_with_frozen_disks_nothing_that_the_guest_wrote_is_lost(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    add(controller, machine)
    graph, files = block_graph(machine), files_beside(machine)
    for call in FREEZE_CALLS:
        worker = worker_at(controller, place, call)
        worker.kill()
        worker.wait()
        machine.wait_for_count(machine.latest_count() + 20, PATIENCE_SECONDS)
        assert controller.recover().kept == (), call
        assert block_graph(machine) == graph, call
        assert files_beside(machine) == files, call
        machine.wait_for_check(machine.latest_check() + 1, PATIENCE_SECONDS)
    assert repository.list() == []
    assert controller.backup("vm001", repository, freeze="overlay", max_pause_seconds=30).warnings == ()
    machine.wait_for_check(machine.latest_check() + 1, PATIENCE_SECONDS)
    count = machine.powerdown()
    assert disk_records.newest_record(machine.disk_path(1), 1) == count
    check = [str(machine.qemu.img_binary), "check", "-q", str(machine.disk_path(0))]
    assert subprocess.run(check, check=False).returncode == 0


@pytest.mark.timeout(900)
def test_both_killed_while_frozen_recovery_commits_the_overlay(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    add(controller, machine)
    files = files_beside(machine)
    worker = worker_at(controller, place, "check_frozen")
    seen = machine.wait_for_check(machine.latest_count() + 20, PATIENCE_SECONDS)
    assert disk_records.newest_record(machine.disk_path(1), 1) < seen, "the disk is as it was at the instant"
    machine.kill()
    worker.kill()
    worker.wait()
    assert controller.recover().kept == ()
    assert files_beside(machine) == files
    assert disk_records.newest_record(machine.disk_path(1), 1) >= seen
    assert repository.list() == []


@pytest.fixture
def small(place: Path) -> Iterator[Path]:
    """A file system that has room for the guest and the beginning of an overlay."""
    folder = place / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=384M,mode=0700", "vmsnap-test", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.lab
@pytest.mark.timeout(900)
def test_a_backup_gives_way_before_the_room_for_what_the_guest_writes_runs_out(
    small: Path, controller: Controller, repository: Repository
) -> None:
    with LabMachine(small / "vm001", find_qemu("10.0")) as machine:
        machine.wait_for_check(10, PATIENCE_SECONDS)
        add(controller, machine)
        graph, files = block_graph(machine), files_beside(machine)

        def act(name: str, take: Take) -> tuple[DiskSnapshot, ...]:
            if name == "file":
                with (small / "others").open("wb") as file:
                    state = os.statvfs(small)
                    os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - 8 * MIB)
                until(lambda: not list(machine.folder.glob("*.frozen.qcow2*")), "the disk is thawed")
            return take()

        drivers = WatchedDrivers(controller.folders.context(), act)
        with Controller(controller.folders, drivers=drivers) as watched:
            running_out = "the room for what the guest writes to disk disk1 is running out"
            with pytest.raises(SnapshotError, match=running_out):
                watched.backup("vm001", repository, freeze="overlay", max_pause_seconds=30)
        (small / "others").unlink()
        assert controller.recover().kept == ()
        assert block_graph(machine) == graph and files_beside(machine) == files
        machine.wait_for_check(machine.latest_check() + 1, PATIENCE_SECONDS)
