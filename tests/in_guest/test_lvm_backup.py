"""Whole backups of a VM on a thick and a thin volume: live, consistent, killed; and the commands of ``vmsnap-lvm``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disk_rig import write
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thick, make_thin, volume_group, volumes
from tests.test_duplicate_failures import run_and_be_killed
from tests.world import World
from vmsnap.cli.backends import vmsnap_lvm
from vmsnap.controller import Controller
from vmsnap.repository import Repository
from vmsnap.testing.faults import Effect, Fault
from vmsnap_drivers.snapshots.lvm import LvmMechanism

pytestmark = [pytest.mark.storage]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("group"), "vg", 64) as name:
        make_pool(name, "pool", 16)
        make_thick(name, "disk0", 1)
        make_thin(name, "pool", "disk1", 1)
        yield name


class VolumeWorld(World):
    """A simulated VM whose disks are volumes. What is kept to tell changes stays after a backup."""

    def files(self) -> set[str]:
        return super().files() | {name for name in volumes() if not name.endswith(".mark")}


@pytest.fixture(scope="module")
def world(group: str) -> Iterator[VolumeWorld]:
    made = VolumeWorld(
        images=[Path(f"/dev/{group}/disk0"), Path(f"/dev/{group}/disk1")],
        mechanism_options={"lvm": {"pause_seconds": "60", "marks": "1"}},
    )
    yield made
    made.close()


def back_up(controller: Controller, repository: Repository) -> str:
    return controller.backup("vm001", repository, max_pause_seconds=100.0).backup


def test_a_live_backup_comes_to_life_again_and_nothing_is_left(world: VolumeWorld) -> None:
    with world.controller() as controller:
        backup = back_up(controller, world.repository())
        assert [disk.mechanism for disk in controller.table.get("vm001").disks] == ["lvm", "lvm"]
        controller.verify_boot(world.repository(), backup)
    world.see_that_all_is_well(1)


def test_the_next_backup_reads_of_a_thin_volume_what_has_changed(group: str, world: VolumeWorld) -> None:
    def marks() -> set[str]:
        return {name for name in volumes() if name.endswith(".mark")}

    with world.controller() as controller:
        before = marks()
        result = controller.backup("vm001", world.repository(), max_pause_seconds=100.0)
        assert not result.warnings, "they would say why a disk was read whole"
        assert len(before) == len(marks()) == 1 and before != marks()
        assert controller.strays() == [], "its disk is registered"
        (owned,) = LvmMechanism(world.folders.context(), {}).list_owned()
        assert owned.kind == "mark" and owned.name.endswith(f".mark of /dev/{group}/disk1")
        (mark,) = marks()
        LvmMechanism(world.folders.context(), {}).remove_owned(owned)
        assert mark not in volumes()


def test_a_consistent_backup_runs_its_duplicate_on_clones(world: VolumeWorld) -> None:
    with world.controller() as controller:
        before = len(world.repository().list())
        result = controller.backup("vm001", world.repository(), mode="consistent", max_pause_seconds=100.0)
        assert result.mode == "consistent"
    world.see_that_all_is_well(before + 1)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("snapshot", 1, Effect.KILL_AFTER),
        Fault("delete_snapshots", 1, Effect.KILL),
    ],
    ids=lambda fault: fault.method,
)
def test_what_a_killed_backup_leaves_is_removed_by_recovery(world: VolumeWorld, fault: Fault) -> None:
    run_and_be_killed(world, back_up, fault)
    assert [name for name in world.files() if "/vmsnap-" in name and not name.startswith("/")]
    with world.controller() as controller:
        assert controller.strays() == [], "the journal knows all of it"
        assert controller.recover().kept == ()
    world.see_that_all_is_well()


class Console:
    """``vmsnap-lvm`` in this process, with a state folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._state, self._capsys = folder, capsys

    def __call__(self, *words: str, status: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            vmsnap_lvm.main([words[0], "--json", "--state-dir", str(self._state), *words[1:]])
        said = self._capsys.readouterr()
        assert (ended.value.code or 0) == status, said.err
        return json.loads(said.out) if status == 0 else said.err


def test_the_commands_of_vmsnap_lvm(
    group: str, world: VolumeWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LvmMechanism(world.folders.context(), {}).forget_marks("vm001")
    lvm("lvcreate", "--yes", "--size", "1m", "--name", "plain", group)
    address = f"/dev/{group}/plain"
    Path(address).write_bytes(content := os.urandom(MIB))
    console = Console(tmp_path / "state", capsys)
    assert {found["severity"] for found in console("doctor")} == {"ok"}
    assert "does not serve /dev/null" in console("snapshot", "/dev/null", status=2)
    taken = console("snapshot", address)
    assert taken["disks"] == [{"address": address, "size_bytes": MIB}] and taken["complete"]
    write(address, 0, bytes(MIB // 2))
    made = console("clone", taken["snapshot"], "--as", "trial")
    (clone,) = (disk["address"] for disk in made["disks"])
    assert Path(clone).read_bytes() == content
    listed = console("list")
    assert [each["snapshot"] for each in listed["snapshots"]] == [taken["snapshot"]]
    assert {each["kind"] for each in listed["resources"]} == {"snapshot", "clone"}
    assert "has clones: trial" in console("delete", taken["snapshot"], status=1)
    console("delete", taken["snapshot"], "--clone", "trial")
    console("delete", taken["snapshot"])
    assert console("list") == {"snapshots": [], "resources": []}
    assert "there is no snapshot" in console("delete", taken["snapshot"], status=3)
    assert Path(address).read_bytes() == bytes(MIB // 2) + content[MIB // 2 :]
    lvm("lvremove", "--force", f"{group}/plain")
