"""``-o fsfreeze=yes``: the guest's own agent freezes its file systems around the pause, and they are thawed again
wherever that guest goes on: in the original, also when vmsnap or libvirtd dies in between, and in all that is made of
it.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import ext4
from tests.lab import serial as console
from tests.libvirt_stage import Stage, staged
from tests.qemu_stage import read_ledger, until
from tests.test_libvirt_crashes import BUSY_SECONDS, goes_on, let_go_on, set_right
from tests.workers import MAX_PAUSE_SECONDS, worker_that_waits_at
from vmsnap.errors import Busy
from vmsnap_drivers.qemu.agent_socket import ask_at

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

STATUS, FREEZE, THAW = (f"guest-fsfreeze-{word}" for word in ("status", "freeze", "thaw"))
OPTIONS = {"fsfreeze": "yes", "fsfreeze_timeout": "20"}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged(options=OPTIONS, agent=1, ext4_disk=2) as made:
        until(lambda: answers(made), "the guest's agent runs")
        until(lambda: written(made.machine.serial_text()) > 0, "the guest's application writes")
        made.controller.backup("vm001", made.repository)
        yield made


def answers(stage: Stage) -> bool:
    """Whether the guest's agent can be asked."""
    return "state='connected'" in stage.libvirtd.virsh("dumpxml", "vm001")


def written(text: str) -> int:
    """How often the guest's application has written to its file system, as far as the guest said."""
    return max(console.application_counts(text), default=0)


def status_of(stage: Stage, vm: str = "vm001") -> str:
    """What the agent of a domain says, asked by virsh."""
    return stage.libvirtd.virsh("qemu-agent-command", vm, f'{{"execute":"{STATUS}"}}')


def is_thawed_and_writes(stage: Stage) -> None:
    """The original's."""
    assert stage.machine.ask_agent(STATUS) == "thawed"
    before = written(stage.machine.serial_text())
    until(lambda: written(stage.machine.serial_text()) > before, "the guest's application writes on")
    assert not mark(stage).exists()


def mark(stage: Stage, vm: str = "vm001") -> Path:
    """What says that a VM may be frozen."""
    return stage.controller.folders.state_dir / "libvirt" / "captures" / f"{vm}.frozen"


def disk_of(stage: Stage, backup: str) -> Path:
    """The file system's disk, as it is in a backup."""
    (image,) = (disk.image for disk in stage.repository.manifest(backup).disks if disk.device == "vdb")
    path = stage.place / f"{backup}.raw"
    with stage.repository.reader(image, "vdb") as reader:
        reader.restore_to_file(path)
    return path


def test_a_frozen_backup_has_clean_file_systems_and_the_guest_writes_on(stage: Stage) -> None:
    rest = stage.at_rest()
    result = stage.controller.backup("vm001", stage.repository)
    assert result.warnings == () and result.pause_seconds <= 5
    is_thawed_and_writes(stage)
    assert stage.at_rest() == rest
    told = stage.repository.manifest(result.backup).duplicate_details["fsfreeze"]
    assert told["file_systems"] == 1 and 0 < told["frozen_seconds"] < 30
    image = disk_of(stage, result.backup)
    assert not ext4.needs_recovery(image) and ext4.complaints(image) == ""
    assert stage.machine.faults() == []


def test_a_restored_guest_thaws_when_it_is_let_run(stage: Stage) -> None:
    controller, virsh = stage.controller, stage.libvirtd.virsh
    backup = controller.backup("vm001", stage.repository).backup
    rest = stage.at_rest()
    for run in (True, False):
        with stage.restored(backup, run=run) as (_, driver):
            if not run:
                # Not by vmsnap: then it is for whoever does it.
                assert mark(stage, "vm002").exists()
                (finding,) = [found for found in driver.doctor() if "fsfreeze" in found.subject]
                assert "virsh domfsthaw vm002" in finding.cure
                virsh("resume", "vm002")
                until(lambda: "state='connected'" in virsh("dumpxml", "vm002"), "its agent is there")
                assert '"frozen"' in status_of(stage, "vm002")
                driver.resume()
            assert '"thawed"' in status_of(stage, "vm002") and not mark(stage, "vm002").exists()
            until(lambda: written(stage.serial_log("vm002").read_text()) > 0, "its application writes")
            assert console.faults(stage.serial_log("vm002").read_text()) == []
    assert stage.at_rest() == rest


def test_a_consistent_backup_thaws_its_duplicate_and_shuts_it_down(stage: Stage) -> None:
    rest = stage.at_rest()
    result = stage.controller.backup("vm001", stage.repository, mode="consistent", timeout_seconds=200)
    assert result.mode == "consistent" and stage.at_rest() == rest
    image = disk_of(stage, result.backup)
    assert not ext4.needs_recovery(image) and ext4.complaints(image) == ""
    is_thawed_and_writes(stage)


def test_a_frozen_backup_is_verified_by_booting_and_consolidated(stage: Stage) -> None:
    backup = stage.controller.backup("vm001", stage.repository).backup
    rest, clean = stage.at_rest(), stage.controller.folders.state_dir / "clean"
    verified = stage.controller.verify_boot(stage.repository, backup, timeout_seconds=200, options=stage.options)
    assert verified.life
    result = stage.controller.consolidate(stage.repository, backup, clean, timeout_seconds=200, options=stage.options)
    (image,) = (Path(disk.address) for disk in result.disks if disk.device == "vdb")
    assert not ext4.needs_recovery(image) and ext4.complaints(image) == ""
    # Written when it was told to end: it was not frozen any more.
    assert read_ledger(image).buffered == read_ledger(image).entries
    shutil.rmtree(clean)
    assert stage.at_rest() == rest


def frozen_by_worker(worker: subprocess.Popen[str], stage: Stage) -> None:
    """The worker, which waits at its pause, is killed while it freezes."""
    let_go_on(worker)
    deadline = time.monotonic() + 60
    while not mark(stage).exists():
        assert time.monotonic() < deadline and worker.poll() is None
    worker.kill()


@pytest.mark.parametrize(
    ("call", "kill"),
    [("pause", frozen_by_worker), ("resume", lambda worker, _: worker.kill())],
    ids=["while it freezes", "while the guest is frozen"],
)
def test_a_worker_that_is_killed_between_freezing_and_thawing(
    stage: Stage, call: str, kill: Callable[[subprocess.Popen[str], Stage], None]
) -> None:
    rest = stage.at_rest()
    worker = worker_that_waits_at(stage.controller.folders.state_dir, str(stage.place / "repository"), call)
    assert mark(stage).exists() == (call != "pause")
    kill(worker, stage)
    worker.communicate()
    until(lambda: not mark(stage).exists(), "the guardian thaws it", MAX_PAUSE_SECONDS + BUSY_SECONDS)
    goes_on(stage, BUSY_SECONDS)
    is_thawed_and_writes(stage)
    set_right(stage, rest, call)


def test_without_any_libvirtd_the_agent_is_told_at_its_own_socket(stage: Stage) -> None:
    rest = stage.at_rest()
    worker = worker_that_waits_at(
        stage.controller.folders.state_dir, str(stage.place / "repository"), "duplicate", max_pause_seconds=20
    )
    stage.libvirtd.kill()
    try:
        let_go_on(worker)
        until(lambda: not mark(stage).exists(), "it is thawed", 20 + BUSY_SECONDS)
        assert ask_at(stage.machine.folder / "agent.sock", STATUS, 20) == "thawed"
        assert worker.wait(120) != 0
    finally:
        stage.libvirtd.start()
        worker.communicate()
    until(lambda: answers(stage), "libvirtd has the agent's channel again")
    is_thawed_and_writes(stage)
    set_right(stage, rest, "duplicate")
    assert stage.controller.backup("vm001", stage.repository).mode == "live"


def test_what_somebody_else_has_frozen_is_left_to_him(stage: Stage) -> None:
    rest, stored = stage.at_rest(), len(stage.repository.list())
    stage.machine.ask_agent(FREEZE)
    try:
        with pytest.raises(Busy, match=r"the file systems of VM 'vm001' are frozen by somebody else \(let them thaw"):
            stage.controller.backup("vm001", stage.repository)
        assert stage.machine.ask_agent(STATUS) == "frozen"
    finally:
        stage.machine.ask_agent(THAW)
    is_thawed_and_writes(stage)
    assert stage.at_rest() == rest and len(stage.repository.list()) == stored


def test_a_duplicate_that_takes_over_thaws(stage: Stage) -> None:
    """The last one: the original is gone after it."""
    machine, controller = stage.machine, stage.controller
    controller.backup("vm001", stage.repository, keep_duplicate=True)
    machine.kill()
    begun = len(machine.serial_text())
    controller.failover("vm001")
    until(lambda: written(machine.serial_text()[begun:]) > 0, "its application writes")
    assert '"thawed"' in status_of(stage) and not mark(stage).exists()
    assert console.faults(machine.serial_text()[begun:]) == []
