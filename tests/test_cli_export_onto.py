"""``vmsnap export --onto``, and ``restore`` onto what exists, from outside: what they report, and what they refuse."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli_verbs import House
from vmsnap.locks import vm_lock
from vmsnap.testing.rigs import same


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("house"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def exported(house: House) -> bytes:
    house.text("export", house.id, "--output", str(house.folder / "images"), "--disk", "disk1")
    return (house.folder / "images" / "disk1.raw").read_bytes()


def address_of(house: House, device: str) -> Path:
    disks = house.json("vm", "show", "vm001")["disks"]
    return next(Path(disk["address"]) for disk in disks if disk["device"] == device)


def test_a_disk_becomes_the_backup_again(house: House, exported: bytes, tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(os.urandom(1 << 20) + exported[1 << 20 :])
    done = house.json("export", house.id, "--disk", "disk1", "--onto", str(target))
    assert done["files"] == [{"device": "disk1", "path": str(target)}]
    assert 0 < done["written_bytes"] <= 1 << 20
    assert done["compared_bytes"] <= len(exported)
    assert same(target.read_bytes(), exported)
    said = house.text("export", house.id, "--disk", "disk1", "--onto", str(target))
    assert "disk1 onto" in said and "written" in said


def test_where_to_write_is_said_once(house: House, tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"precious")
    onto = ("--onto", str(target))
    assert "--output" in house.error(2, "export", house.id)
    assert "exactly one --disk" in house.error(2, "export", house.id, *onto)
    assert "exactly one --disk" in house.error(2, "export", house.id, *onto, "--disk", "disk0", "--disk", "disk1")
    assert "no --output" in house.error(2, "export", house.id, *onto, "--disk", "disk0", "--output", str(tmp_path))
    assert "there is no" in house.error(3, "export", house.id, "--disk", "disk0", "--onto", str(tmp_path / "none"))
    assert target.read_bytes() == b"precious"


def test_the_disk_of_a_vm_that_is_not_stopped_is_refused(house: House, tmp_path: Path) -> None:
    address = address_of(house, "disk1")
    link = tmp_path / "link"
    link.symlink_to(address)
    for target in (address, link):
        refused = house.error(5, "export", house.id, "--disk", "disk1", "--onto", str(target))
        assert "VM 'vm001', which is executing" in refused
    assert house.state_of("vm001") == "executing"


def test_the_disk_of_a_vm_that_another_operation_works_on_is_refused(house: House) -> None:
    with vm_lock(house.state, "vm001", "test"):
        call = ("export", house.id, "--disk", "disk1", "--onto", str(address_of(house, "disk1")))
        assert "is busy" in house.error(5, *call)


def test_the_disk_of_a_stopped_vm_is_written(house: House, exported: bytes, tmp_path: Path) -> None:
    target = tmp_path / "images"
    house.json("restore", house.id, "--as", "vm002", "--target", str(target))
    disk = target / "disk1.raw"
    before = disk.read_bytes()
    disk.write_bytes(before[: 1 << 20] + os.urandom(4096) + before[(1 << 20) + 4096 :])
    written = house.json("export", house.id, "--disk", "disk1", "--onto", str(disk))["written_bytes"]
    assert 0 < written <= 256 << 10
    assert same(disk.read_bytes(), exported)


def test_places_of_a_restore_that_say_nothing_are_refused(house: House, tmp_path: Path) -> None:
    lun = "iscsi://127.0.0.1:3260/iqn.2009-12.com.example:copy/1"

    def refused(*targets: str) -> str:
        given = [word for target in targets for word in ("--target", target)]
        return house.error(2, "restore", house.id, "--as", "vm009", *given)

    assert "takes one folder" in refused(str(tmp_path / "a"), str(tmp_path / "b"))
    assert f"which disk goes to {lun}?" in refused(lun, str(tmp_path / "a"))
    assert "disk0 twice" in refused(f"disk0={lun}", f"disk0={lun}")
    assert "a VM of 'simulated' cannot have a LUN for a disk" in refused(f"disk0={lun}")
    assert not list(tmp_path.iterdir())


@pytest.mark.qemu
def test_qcow2_is_written_when_told(house: House, exported: bytes, tmp_path: Path) -> None:
    house.text("export", house.id, "--output", str(tmp_path), "--disk", "disk1", "--format", "qcow2")
    target = tmp_path / "disk1.qcow2"
    assert shutil.which("qemu-nbd")
    call = ("export", house.id, "--disk", "disk1", "--onto", str(target))
    assert "--format qcow2" in house.error(2, *call)
    assert house.json(*call, "--format", "qcow2")["written_bytes"] == 0
