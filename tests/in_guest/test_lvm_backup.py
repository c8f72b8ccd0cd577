"""Whole backups of a VM on a thick and a thin volume: live, consistent, killed; and the commands of ``vmsnap-lvm``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.consoles import NOBODY, Console, as_nobody
from tests.disk_rig import write
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thick, make_thin, volume_group, volumes
from tests.test_duplicate_failures import run_and_be_killed
from tests.world import World
from vmsnap.cli.backends import vmsnap_lvm
from vmsnap.controller import Controller
from vmsnap.repository import Repository
from vmsnap.testing.faults import Effect, Fault
from vmsnap_drivers.runner import LocalRunner
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


def test_the_commands_of_vmsnap_lvm(
    group: str, world: VolumeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LvmMechanism(world.folders.context(), {}).forget_marks("vm001")
    lvm("lvcreate", "--yes", "--size", "1m", "--name", "plain", group)
    address = f"/dev/{group}/plain"
    Path(address).write_bytes(content := os.urandom(MIB))
    console = Console(vmsnap_lvm, tmp_path / "state", {"pause_seconds": "60"})
    assert {found["severity"] for found in console("doctor")} == {"ok"}
    assert "does not serve /dev/null" in console("snapshot", "/dev/null", status=2)
    assert f"there is no /dev/{group}/nothing" in console("snapshot", f"/dev/{group}/nothing", status=3)
    taken = console("snapshot", address)
    assert taken["disks"] == [{"device": "disk0", "address": address, "size_bytes": MIB}] and taken["complete"]
    write(address, 0, bytes(MIB // 2))
    made = console("clone", taken["snapshot"], "--as", "trial")
    (clone,) = (disk["address"] for disk in made["disks"])
    assert [disk["device"] for disk in made["disks"]] == ["disk0"]
    assert Path(clone).read_bytes() == content
    listed = console("list")
    assert [each["snapshot"] for each in listed["snapshots"]] == [taken["snapshot"]]
    assert {each["kind"] for each in listed["resources"]} == {"snapshot", "clone"}
    assert listed["snapshots"][0]["clones"] == [{"name": "trial", "device": "disk0", "address": clone}]
    with monkeypatch.context() as patched:
        patched.setattr(LocalRunner, "find", lambda *_: None)
        said = console.say("list")
        assert said.status == 6 and "lvm is not installed" in said.err
        assert [each["snapshot"] for each in json.loads(said.out)["snapshots"]] == [taken["snapshot"]]
    assert "has clones: trial" in console("delete", taken["snapshot"], status=1)
    with Path(clone).open("rb"):
        assert f"{clone.removeprefix('/dev/')} in use" in console(
            "delete", taken["snapshot"], "--clone", "trial", status=5
        )
    console("delete", taken["snapshot"], "--clone", "trial")
    with Path(f"/dev/{group}/{taken['snapshot']}.0").open("rb"):
        assert f"{taken['snapshot']}.0 in use" in console("delete", taken["snapshot"], status=5)
    console("delete", taken["snapshot"])
    assert console("list") == {"snapshots": [], "resources": []}
    assert "there is no snapshot" in console("delete", taken["snapshot"], status=3)
    assert Path(address).read_bytes() == bytes(MIB // 2) + content[MIB // 2 :]
    lvm("lvremove", "--force", f"{group}/plain")


def test_somebody_without_rights_is_told_so_and_not_that_there_are_no_snapshots(group: str, tmp_path: Path) -> None:
    address = f"/dev/{group}/disk0"
    ours = Console(vmsnap_lvm, tmp_path / "state", {"pause_seconds": "60"})
    taken = ours("snapshot", address)["snapshot"]
    assert ours("list")["resources"]
    state = Path(tempfile.mkdtemp())
    os.chown(state, NOBODY, NOBODY)
    theirs = Console(vmsnap_lvm, state)
    assert as_nobody(os.geteuid) == NOBODY
    for words in (("snapshot", address), ("snapshot", f"/dev/{group}/nothing"), ("list",)):
        said = as_nobody(partial(theirs, *words, status=6))
        assert said == "vmsnap-lvm: LVM is root's (run vmsnap as root)\n"
    assert [found["cure"] for found in as_nobody(partial(theirs, "doctor"))] == ["run vmsnap as root"]
    ours("delete", taken)
    assert ours("list") == {"snapshots": [], "resources": []}
