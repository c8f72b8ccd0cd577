"""A domain of which one disk is an image file on a real zfs-fuse, snapshotted by it, and the other one a qcow2 image,
QEMU's own matter: both from one instant. libvirt and QEMU see nothing of ZFS but a file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import Disk, disk_records
from tests.lab import serial as console
from tests.lab.zfs_fuse import ZfsFuse, programs
from tests.libvirt_stage import Stage, staged
from tests.test_live_backup_qemu import text_after_two_checks
from tests.zfs_rig import MIB, make_image, names

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.lab, pytest.mark.timeout(900)]

SIZE = 80 * MIB


@pytest.fixture(scope="module")
def zfs() -> Iterator[ZfsFuse]:
    """What is mounted later is seen by libvirtd too, as the clone on which a duplicate runs."""
    path, place = os.environ["PATH"], Path(tempfile.mkdtemp(prefix="vmsnap-"))
    # QEMU's user has to get to the disk.
    place.chmod(0o755)
    os.environ["PATH"] = f"{programs()}:{path}"
    try:
        with ZfsFuse(place, shared=True) as started:
            started.run("zfs", "create", f"{started.pool}/vm001")
            yield started
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def stage(zfs: ZfsFuse) -> Iterator[Stage]:
    image = zfs.mounted / "vm001" / "disk.img"
    make_image(image, SIZE, "vda")
    with staged(disks=[Disk("raw", SIZE, str(image)), Disk("qcow2", SIZE)]) as made:
        made.controller.backup("vm001", made.repository)
        yield made


def test_a_live_backup_comes_back_beside_the_original(stage: Stage, zfs: ZfsFuse) -> None:
    controller, machine = stage.controller, stage.machine
    rest, datasets = stage.at_rest(), names(zfs.run, zfs.pool)
    before = machine.latest_count()
    result = controller.backup("vm001", stage.repository)
    after = machine.latest_count()
    assert result.warnings == () and result.pause_seconds <= 5
    assert [disk.mechanism for disk in controller.table.get("vm001").disks] == ["zfs", "qcow2"]
    assert stage.at_rest() == rest and names(zfs.run, zfs.pool) == datasets
    with stage.restored(result.backup):
        # It compares both disks with what it remembers, so that one of another instant would be a fault.
        text = text_after_two_checks(stage.serial_log("vm002"))
        assert console.faults(text) == [] and before <= console.counts(text)[0] <= after + 200
    assert stage.at_rest() == rest and names(zfs.run, zfs.pool) == datasets
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


def test_a_consistent_backup_runs_its_duplicate_on_a_clone(stage: Stage, zfs: ZfsFuse) -> None:
    machine = stage.machine
    rest, datasets, count = stage.at_rest(), names(zfs.run, zfs.pool), machine.latest_count()
    result = stage.controller.backup("vm001", stage.repository, mode="consistent", timeout_seconds=200)
    assert result.mode == "consistent" and result.warnings == ()
    assert stage.at_rest() == rest and names(zfs.run, zfs.pool) == datasets
    assert (disk_records.flushed_count(disk_of(stage, result.backup)) or 0) >= count
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


def disk_of(stage: Stage, backup: str) -> Path:
    """The disk on ZFS, as it is in a backup."""
    (image,) = (disk.image for disk in stage.repository.manifest(backup).disks if disk.device == "vda")
    path = stage.place / f"{backup}.raw"
    with stage.repository.reader(image, "vda") as reader:
        reader.restore_to_file(path)
    return path
