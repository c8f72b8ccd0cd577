"""``--freeze overlay`` of a domain: its raw disk is copied as a file after the pause, while the guest writes to an
overlay of which libvirt knows nothing; whoever dies meanwhile, what the guest wrote comes into its disk, and libvirt
can work on it as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import WITH_BARE_DISK, disk_records
from tests.lab import serial as console
from tests.lab.libvirtd import USER
from tests.libvirt_stage import Stage, staged
from tests.test_libvirt_crashes import BUSY_SECONDS, goes_on, let_go_on, set_right
from tests.test_live_backup_qemu import text_after_two_checks
from tests.test_side_by_side import WatchedDrivers
from tests.workers import worker_that_waits_at
from vmsnap.controller import Controller
from vmsnap.model import DiskSnapshot

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

Take = Callable[[], tuple[DiskSnapshot, ...]]
MAX_PAUSE_SECONDS = 30.0


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged(options={"plain_files": "yes"}, disks=WITH_BARE_DISK) as made:
        drivers = {entry["inserted"]["drv"] for entry in made.machine.oracle.execute("query-block")}
        assert drivers == {"qcow2", "file"}, "the raw disk has no node of its format"
        nodes = made.machine.oracle.execute("query-named-block-nodes")
        assert {node["drv"] for node in nodes} == {"qcow2", "file"}, "the raw disk has no node of its format"
        made.controller.backup("vm001", made.repository, max_pause_seconds=MAX_PAUSE_SECONDS)
        yield made


def overlays(stage: Stage) -> list[Path]:
    """The files that hold what the guest writes meanwhile."""
    return sorted(stage.machine.folder.glob("*.frozen.qcow2*"))


def definition(stage: Stage) -> str:
    """The running domain, as libvirt has it."""
    return stage.libvirtd.virsh("dumpxml", "vm001")


def test_a_disk_is_copied_after_the_pause_and_libvirt_sees_it_as_it_was(stage: Stage) -> None:
    machine, virsh = stage.machine, stage.libvirtd.virsh
    rest, before, held = stage.at_rest(), definition(stage), []

    def act(name: str, take: Take) -> tuple[DiskSnapshot, ...]:
        if name == "file":
            (overlay,) = overlays(stage)
            written = machine.disk_path(1).stat().st_mtime_ns
            machine.wait_for_count(machine.latest_count() + 20)
            held.append((overlay.owner(), machine.disk_path(1).stat().st_mtime_ns == written))
            assert stage.seen_by_virsh() == rest[0] and definition(stage) == before
        return take()

    drivers = WatchedDrivers(stage.controller.folders.context(), act)
    with Controller(stage.controller.folders, drivers=drivers) as watched:
        result = watched.backup("vm001", stage.repository, freeze="overlay", max_pause_seconds=MAX_PAUSE_SECONDS)
    assert held == [(USER, True)], "the guest runs, and its disk is as it was"
    manifest = stage.repository.manifest(result.backup)
    assert [(disk.device, disk.mechanism) for disk in manifest.disks] == [("vda", "qcow2"), ("vdb", "file")]
    assert manifest.freeze == "overlay" and result.warnings == ()
    assert stage.at_rest() == rest and definition(stage) == before

    # What libvirt believes of the disk is true: it puts an overlay of its own there, and takes it away.
    over = machine.folder / "vdb.over"
    disks = ("--diskspec", "vda,snapshot=no", "--diskspec", f"vdb,file={over}")
    virsh("snapshot-create-as", "vm001", "--disk-only", "--no-metadata", *disks)
    virsh("blockcommit", "vm001", "vdb", "--active", "--pivot", "--wait")
    over.unlink()
    machine.wait_for_check(machine.latest_check() + 1)

    with stage.restored(result.backup):
        assert console.faults(text_after_two_checks(stage.serial_log("vm002"))) == []


def test_a_worker_that_is_killed_with_frozen_disks(stage: Stage) -> None:
    rest = stage.at_rest()
    for call in ("prepare_freeze", "freeze_disks", "check_frozen", "thaw_disks"):
        worker = worker_that_waits_at(
            stage.controller.folders.state_dir, str(stage.place / "repository"), call, verb="frozen"
        )
        assert bool(overlays(stage)) == (call != "prepare_freeze"), call
        worker.kill()
        worker.communicate()
        goes_on(stage, BUSY_SECONDS)
        set_right(stage, rest, call)
    frozen = stage.controller.backup("vm001", stage.repository, freeze="overlay", max_pause_seconds=MAX_PAUSE_SECONDS)
    assert frozen.warnings == ()
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)


def test_a_libvirtd_that_dies_with_frozen_disks_costs_the_backup(stage: Stage) -> None:
    rest, stored = stage.at_rest(), len(stage.repository.list())
    worker = worker_that_waits_at(
        stage.controller.folders.state_dir, str(stage.place / "repository"), "check_frozen", verb="frozen"
    )
    stage.libvirtd.kill()
    try:
        let_go_on(worker)
        goes_on(stage, BUSY_SECONDS)
        assert worker.wait(120) != 0
        assert overlays(stage), "nobody can tell QEMU to put it back"
    finally:
        stage.libvirtd.start()
        worker.communicate()
    set_right(stage, rest, "check_frozen")
    assert len(stage.repository.list()) == stored
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)


def test_both_killed_while_frozen_recovery_commits_the_overlay(stage: Stage) -> None:
    """The last one: the domain is shut off after it."""
    machine = stage.machine
    worker = worker_that_waits_at(
        stage.controller.folders.state_dir, str(stage.place / "repository"), "check_frozen", verb="frozen"
    )
    seen = machine.wait_for_check(machine.latest_count() + 20)
    assert disk_records.newest_record(machine.disk_path(1), 1) < seen, "the disk is as it was at the instant"
    machine.kill()
    worker.kill()
    worker.communicate()
    assert stage.controller.recover().kept == ()
    assert not overlays(stage)
    assert disk_records.newest_record(machine.disk_path(1), 1) >= seen
