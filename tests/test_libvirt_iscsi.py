"""Disks of a domain that are LUNs (``<disk type='network'>``, protocol iSCSI), snapshotted where they lie: by a
mechanism of the host's side, of which libvirt and QEMU know nothing.
"""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import Disk, disk_records
from tests.lab import serial as console
from tests.lab.tgtd import TargetServer, programs
from tests.libvirt_stage import Stage, staged
from tests.test_file_mechanism import xfs
from tests.test_live_backup_qemu import text_after_two_checks

__all__ = ["xfs"]
pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.lab, pytest.mark.timeout(900)]

MIB = 1 << 20
TARGETS = ("iqn.2009-12.com.example:005", "iqn.2009-12.com.example:005-data")
SIZES = (256 * MIB, 64 * MIB)


@pytest.fixture(scope="module")
def luns(xfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetServer]:
    images = xfs / "libvirt-luns"
    images.mkdir()
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{programs()}:{path}"
    try:
        with TargetServer(tmp_path_factory.mktemp("tgtd")) as server:
            for index, (target, size_bytes) in enumerate(zip(TARGETS, SIZES, strict=True)):
                with (images / f"disk{index}.img").open("wb") as file:
                    file.truncate(size_bytes)
                server.add(target, images / f"disk{index}.img")
            yield server
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(images)


@pytest.fixture(scope="module")
def stage(luns: TargetServer) -> Iterator[Stage]:
    disks = [Disk("raw", size, luns.address(target)) for target, size in zip(TARGETS, SIZES, strict=True)]
    options = {"iscsi": {"control_port": str(luns.control_port), "reading": "initiator"}}
    with staged(disks=disks, mechanism_options=options) as made:
        made.controller.backup("vm001", made.repository)
        yield made


def test_luns_are_snapshotted_where_they_lie_and_come_back_as_files(stage: Stage, luns: TargetServer) -> None:
    controller, rest = stage.controller, stage.at_rest()
    before = stage.machine.latest_count()
    result = controller.backup("vm001", stage.repository)
    assert {disk.device: (disk.mechanism, disk.address) for disk in controller.table.get("vm001").disks} == {
        "vda": ("iscsi", luns.address(TARGETS[0])),
        "vdb": ("iscsi", luns.address(TARGETS[1])),
    }
    assert stage.at_rest() == rest and sorted(luns.targets()) == sorted(TARGETS)
    # The overlays of LUNs are no files beside them: QEMU's user is let through to them in the state folder.
    result = controller.backup("vm001", stage.repository, freeze="overlay")
    assert stage.repository.manifest(result.backup).freeze == "overlay"
    assert stage.at_rest() == rest and not (stage.place / "state" / "libvirt" / "freezes").exists()
    with stage.restored(result.backup):
        text = text_after_two_checks(stage.serial_log("vm002"))
        assert console.faults(text) == [] and console.counts(text)[0] >= before
        types = [disk.get("type") for disk in ET.fromstring(stage.libvirtd.virsh("dumpxml", "vm002")).iter("disk")]
        assert types == ["file", "file"]
    assert stage.at_rest() == rest
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []


def test_a_duplicate_runs_on_writable_luns_of_its_own(stage: Stage, luns: TargetServer) -> None:
    rest, count = stage.at_rest(), stage.machine.latest_count()
    result = stage.controller.backup("vm001", stage.repository, mode="consistent", timeout_seconds=200)
    assert result.mode == "consistent" and result.warnings == ()
    assert stage.at_rest() == rest and sorted(luns.targets()) == sorted(TARGETS)
    (image,) = (disk.image for disk in stage.repository.manifest(result.backup).disks if disk.device == "vda")
    path = stage.place / "vda.raw"
    with stage.repository.reader(image, "vda") as reader:
        reader.restore_to_file(path)
    assert (disk_records.flushed_count(path) or 0) >= count
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []
