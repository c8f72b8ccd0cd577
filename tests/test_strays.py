"""What carries our tag is found when the host's database is gone, and removed when it is named, and only then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine
from tests.test_duplicate_failures import run_and_be_killed
from tests.test_live_backup_qemu import block_graph, controller, files_beside, machine, place, repository
from tests.test_qcow2_mechanism_machine import TAGS, context, mechanism
from tests.test_qcow2_mechanism_machine import Machine as BlockMachine
from tests.test_qcow2_mechanism_machine import machine as block_machine
from tests.workers import worker_that_waits_at
from tests.world import World
from vmsnap.cli.main import vmsnap
from vmsnap.controller import Controller
from vmsnap.errors import NotFound, SnapshotError, VmsnapError
from vmsnap.model import OwnedResource, Window
from vmsnap.repository import Repository
from vmsnap.roles import DriverContext
from vmsnap.testing.faults import Effect, Fault
from vmsnap_drivers.snapshots.qcow2.names import PlanNames

__all__ = ["block_machine", "context", "controller", "machine", "place", "repository"]


def lose_database(folder: Path) -> None:
    for path in folder.glob("vmsnap.db*"):
        path.unlink()


def back_up(controller: Controller, repository: Repository) -> object:
    return controller.backup("vm001", repository)


def keep(controller: Controller, repository: Repository) -> object:
    return controller.backup("vm001", repository, keep_duplicate=True)


def test_what_the_database_knows_is_no_stray(world: World) -> None:
    with world.controller() as controller:
        keep(controller, world.repository())
        backup = controller.backup("vm001", world.repository()).backup
        controller.restore(world.repository(), backup, "vm002", run=True)
        assert controller.strays() == []
    run_and_be_killed(world, back_up, Fault("settle", 1, Effect.KILL))
    with world.controller() as controller:
        assert controller.strays() == [], "recovery removes them"
        with pytest.raises(NotFound, match="no stray named"):
            controller.remove_strays(["vm002"])


def test_a_duplicate_its_disks_and_a_loaded_vm_are_found_without_the_database(world: World) -> None:
    with world.controller() as controller:
        keep(controller, world.repository())
        (held,) = controller.duplicates()
        backup = controller.backup("vm001", world.repository()).backup
        controller.restore(world.repository(), backup, "vm002", run=True)
    lose_database(world.folders.state_dir)
    with world.controller() as controller:
        assert [finding.subject for _, finding in controller.doctor() if "tag" in finding.message] == ["strays"]
        found = controller.strays()
        assert {(each.kind, each.name) for each in found if each.driver == "simulated"} == {
            ("duplicate", held.duplicate),
            ("vm", "vm002"),
        }
        clones = [each.name for each in found if each.driver == "file"]
        assert sorted(clones) == sorted(disk.address for disk in held.disks)
        assert controller.recover().removed == () and controller.strays() == found, "nothing goes by itself"
        removed = controller.remove_strays([held.duplicate, clones[0]])
        assert {each.name for each in removed} == {held.duplicate, clones[0]}
        assert {each.name for each in controller.strays()} == {"vm002", clones[1]}
        controller.remove_strays(["vm002", clones[1]])
        assert controller.strays() == []
    assert world.status()["state"] == "executing", "the VM itself is nobody's stray"


def test_snapshots_of_a_killed_backup_are_found_without_the_database(world: World) -> None:
    run_and_be_killed(world, back_up, Fault("settle", 1, Effect.KILL))
    lose_database(world.folders.state_dir)
    with world.controller() as controller:
        found = controller.strays()
        assert {each.kind for each in found} == {"duplicate", "snapshot"}
        assert len(controller.remove_strays([each.name for each in found])) == len(found)
        assert controller.strays() == []
    assert world.files() == world.files_at_rest


OFF = "192.0.2.1:3260=ssh://root@127.0.0.1:1"
"""An appliance where nobody answers."""


@pytest.fixture
def world_beside_an_appliance_that_is_off() -> Iterator[World]:
    made = World(mechanism_options={"iscsi": {"appliances": OFF}})
    yield made
    made.close()


def test_an_appliance_that_is_off_hides_nothing_of_what_others_find(
    world_beside_an_appliance_that_is_off: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = world_beside_an_appliance_that_is_off
    with world.controller() as controller:
        keep(controller, world.repository())
        (held,) = controller.duplicates()
    lose_database(world.folders.state_dir)
    told: list[str] = []
    with world.controller() as controller:
        found = controller.strays(told.append)
        assert {each.kind for each in found} == {"duplicate", "clone"}
        assert len(told) == 1 and told[0].startswith("iscsi: ") and "127.0.0.1" in told[0]
        assert [finding.subject for _, finding in controller.doctor() if "tag" in finding.message] == ["strays"]
        assert [each.name for each in controller.remove_strays([held.duplicate])] == [held.duplicate]

    configuration = tmp_path / "config.toml"
    configuration.write_text(f'[mechanism.iscsi]\nappliances = "{OFF}"\n')

    def say(*words: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            vmsnap.main(["--state-dir", str(world.folders.state_dir), "--config", str(configuration), "strays", *words])
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        return said.out, said.err

    clones = sorted(disk.address for disk in held.disks)
    out, err = say("--json")
    assert sorted(each["name"] for each in json.loads(out)["strays"]) == clones
    assert json.loads(out)["passed_over"] == told and f"vmsnap: passed over: {told[0]}" in err
    out, err = say("--remove", clones[0], "--remove", clones[1])
    assert out.count("removed  clone") == 2 and "passed over: iscsi" in err
    assert say()[0] == "the other drivers find no strays\n"


@pytest.mark.qemu
def test_the_blocks_of_a_snapshot_are_taken_out_of_a_running_qemu(
    block_machine: BlockMachine, context: DriverContext
) -> None:
    before = block_machine.traces()
    driver = mechanism(context)
    disks = block_machine.disks()[:3]
    plan = driver.plan("vm001", disks, next(TAGS), Window.FREE)
    driver.prepare(plan)
    block_machine.pause(Window.FREE)
    driver.snapshot(plan)
    block_machine.resume(Window.FREE)
    driver.close()
    other = mechanism(context)
    owned = other.list_owned()
    assert {each.tag for each in owned} == {plan.tag}
    other.remove_owned(owned[0])
    assert other.list_owned() == []
    assert block_machine.traces() == before
    other.remove_owned(owned[0])
    with pytest.raises(SnapshotError, match="records what changes"):
        other.remove_owned(OwnedResource("dirty bitmap", "vmsnap-since-x of /disk", "vmsnap-since-x", "qcow2"))
    other.close()


@pytest.mark.qemu
def test_blocks_in_a_running_qemu_are_found_when_all_of_the_state_folder_is_lost(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    graph, files = block_graph(machine), files_beside(machine)
    state = controller.folders.state_dir
    worker = worker_that_waits_at(state, str(place / "repository"), "read_into", number=3)
    worker.kill()
    worker.wait()
    assert block_graph(machine) != graph
    shutil.rmtree(state)
    state.mkdir(mode=0o700)
    with Controller(controller.folders) as anew:
        assert {each.kind for each in anew.strays()} == {"duplicate"}
        anew.remove_strays([each.name for each in anew.strays()])
        assert anew.strays() == []
        anew.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        (stray,) = (each for each in anew.strays() if each.kind == "block nodes")
        assert stray.tag.startswith("vmsnap-") and Path(stray.name).is_relative_to(place)
        with pytest.raises(VmsnapError, match="stands a block job or filter"):
            anew.backup("vm001", repository)
        assert anew.remove_strays([stray.name]) == [stray]
        assert (block_graph(machine), files_beside(machine)) == (graph, files)
        backup = anew.backup("vm001", repository).backup
    assert not repository.verify(backup).findings
    machine.wait_for_count(machine.latest_count() + 10)
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


@pytest.mark.qemu
def test_a_plan_that_somebody_else_could_have_written_is_not_carried_out(
    block_machine: BlockMachine, context: DriverContext, tmp_path: Path
) -> None:
    driver = mechanism(context)
    plan = driver.plan("vm001", block_machine.disks()[:2], next(TAGS), Window.FREE)
    driver.prepare(plan)
    (copy, *_) = (Path(path) for path in PlanNames.of(plan).records[1:])
    Path(PlanNames.of(plan).record).unlink()
    copy.chmod(0o666)
    (stray,) = driver.list_owned_on(plan.disks)
    assert stray.name != str(copy)
    with pytest.raises(SnapshotError, match="no record tells"):
        driver.remove_owned(stray)
    driver.remove_owned(OwnedResource("block nodes", str(copy), plan.tag, "qcow2"))
    assert driver.list_owned_on(plan.disks) == [stray]
    copy.chmod(0o600)
    driver.delete(plan)
    assert driver.list_owned_on(plan.disks) == [] and not copy.exists()
    driver.close()


@pytest.mark.qemu
def test_a_duplicate_in_memory_and_a_loaded_vm_of_qemu_are_found_without_the_database(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path
) -> None:
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    controller.backup("vm001", repository, keep_duplicate=True)
    (held,) = controller.duplicates()
    backup = controller.backup("vm001", repository).backup
    controller.restore(repository, backup, "vm002", run=True, isolated=True)
    lose_database(controller.folders.state_dir)
    with Controller(controller.folders) as anew:
        found = {(each.driver, each.kind): each.name for each in anew.strays() if each.kind != "dirty bitmap"}
        assert found[("qemu", "duplicate")] == held.duplicate and found[("qemu", "vm")] == "vm002"
        anew.remove_strays(list(found.values()))
        assert {each.kind for each in anew.strays()} <= {"dirty bitmap", "clone"}
        anew.remove_strays([each.name for each in anew.strays() if each.kind == "clone"])
        assert {each.kind for each in anew.strays()} <= {"dirty bitmap"}
    machine.wait_for_count(machine.latest_count() + 10)
    assert machine.faults() == []
