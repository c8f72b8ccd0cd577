"""Whole backups of VMs whose image files lie on zfs-fuse: a simulated one, and a real guest in QEMU."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.lab import LabMachine, disk_records, find_qemu
from tests.lab import serial as console
from tests.lab.machine import Disk
from tests.lab.zfs_fuse import ZfsFuse
from tests.test_live_backup_qemu import processes_of, text_after_two_checks
from tests.test_zfs_contract import zfs
from tests.zfs_backups import BackupScenarios, ZfsWorld, back_up
from tests.zfs_rig import MIB, make_image, names
from vmsnap.controller import Controller
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap_drivers.runner import LocalRunner, Output
from vmsnap_drivers.snapshots import file

__all__ = ["zfs"]

pytestmark = pytest.mark.lab

T = TypeVar("T")


@pytest.fixture(scope="module")
def made(zfs: ZfsFuse) -> Iterator[ZfsWorld]:
    images = []
    for index in range(2):
        zfs.run("zfs", "create", f"{zfs.pool}/vm{index}")
        make_image(image := zfs.mounted / f"vm{index}" / "disk.img", MIB, f"disk{index}")
        images.append(image)
    world = ZfsWorld(zfs.run, zfs.pool, images)
    yield world
    world.close()


class TestBackups(BackupScenarios):
    @pytest.fixture
    def world(self, made: ZfsWorld) -> ZfsWorld:
        return made


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    yield folder
    shutil.rmtree(folder)


def test_zfs_and_a_file_are_snapshotted_at_the_same_time_inside_one_pause(
    zfs: ZfsFuse, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real mechanisms of one VM: the command of each goes on only when that of the other has begun, and ends only
    when that of the other is done. One after the other they would wait for ever.
    """
    zfs.run("zfs", "create", f"{zfs.pool}/beside")
    images = [zfs.mounted / "beside" / "disk.img", place / "disk.img"]
    for index, image in enumerate(images):
        make_image(image, MIB, f"disk{index}")
    begun, done = threading.Barrier(2), threading.Barrier(2)
    spans: dict[str, tuple[int, int]] = {}

    def together(name: str, act: Callable[[], T]) -> T:
        begun.wait(60)
        start = time.monotonic_ns()
        found = act()
        end = time.monotonic_ns()
        done.wait(60)
        spans[name] = start, end
        return found

    run, copy = LocalRunner.run, file._copy

    def run_beside(self: LocalRunner, argv: Sequence[str], seconds: float, *, changes: bool = False) -> Output:
        def act() -> Output:
            return run(self, argv, seconds, changes=changes)

        return together("zfs", act) if tuple(argv[:2]) == ("zfs", "snapshot") else act()

    def copy_beside(*arguments: Any) -> None:
        together("file", lambda: copy(*arguments))

    world = ZfsWorld(zfs.run, zfs.pool, images)
    try:
        monkeypatch.setattr(LocalRunner, "run", run_beside)
        monkeypatch.setattr(file, "_copy", copy_beside)
        with world.controller() as controller:
            backup = back_up(controller, world.repository())
        manifest = world.repository().manifest(backup)
        assert [disk.mechanism for disk in manifest.disks] == ["zfs", "file"]
        assert spans.keys() == {"zfs", "file"}
        pause, resume = manifest.moments[0], manifest.moments[-1]
        assert (pause.name, resume.name) == ("pause", "resume")
        for start, end in spans.values():
            assert pause.monotonic_ns < start < end < resume.monotonic_ns
        world.see_that_all_is_well(1)
    finally:
        world.close()


@pytest.mark.qemu
def test_a_real_guest_is_backed_up_live_and_consistent_and_goes_on(zfs: ZfsFuse, place: Path) -> None:
    zfs.run("zfs", "create", f"{zfs.pool}/qemu")
    disk = Disk("raw", 80 * MIB)
    make_image(image := zfs.mounted / "qemu" / "disk.img", disk.size_bytes, "disk0")
    (place / "vm001").mkdir()
    (place / "vm001" / "disk0.raw").symlink_to(image)
    before = names(zfs.run, zfs.pool)
    settings = {"slots": 64, "check_every": 50}
    folders = HostFolders.find(place / "state")
    repository = create_repository(str(place / "repository"))
    with (
        LabMachine(place / "vm001", find_qemu("7.2"), memory_mib=256, disks=(disk,), settings=settings) as machine,
        Controller(folders) as controller,
    ):
        machine.wait_for_check(40)
        controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        processes = processes_of(place)
        live = controller.backup("vm001", repository)
        assert [row.mechanism for row in controller.table.get("vm001").disks] == ["zfs"]
        assert live.warnings == () and names(zfs.run, zfs.pool) == before
        restored = controller.restore(repository, live.backup, "vm002", run=True)
        driver = controller.drivers.hypervisor("qemu", "vm002", restored.options)
        text = text_after_two_checks(Path(restored.options["qmp"]).parent / "serial.log")
        assert console.faults(text) == []
        driver.destroy()
        driver.close()
        controller.remove_vm("vm002")
        count = machine.latest_count()
        consistent = controller.backup("vm001", repository, mode="consistent", timeout_seconds=120)
        assert consistent.mode == "consistent"
        raw = place / "disk.raw"
        with repository.reader(repository.manifest(consistent.backup).disks[0].image, "disk0") as reader:
            reader.restore_to_file(raw)
        flushed = disk_records.flushed_count(raw)
        assert flushed is not None and flushed >= count
        assert names(zfs.run, zfs.pool) == before and processes_of(place) == processes
        machine.wait_for_count(machine.latest_count() + 20)
        assert machine.faults() == [] and controller.journal.unfinished() == []
    shutil.rmtree(folders.memory_dir)
