"""Every call of a consistent backup, a held duplicate, a consolidation, a verification by booting, a restore and a
failover fails once: before it was done, after it was done, and by kill -9 at either moment. Afterwards the VM runs,
nothing is left that nobody owns, the table is true, and what was stored before is whole.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import Counted
from tests.left_out import some_of
from tests.world import World
from vmsnap.controller import Controller
from vmsnap.errors import VmsnapError
from vmsnap.repository import Repository
from vmsnap.testing.faults import Effect, Fault, FaultPlan, single_faults
from vmsnap.testing.rigs import eventually
from vmsnap_drivers.hypervisors.simulated import record
from vmsnap_drivers.hypervisors.simulated.control import ask
from vmsnap_drivers.hypervisors.simulated.layout import read_disk

IN_PROCESS = (Effect.BEFORE, Effect.AFTER)
KILLS = (Effect.KILL, Effect.KILL_AFTER)
STORAGE = {"put", "get", "stat", "list", "delete", "properties", "create"}
"""Calls of the storage: every one fails once, but a process is not killed at each (the repository's tests do that)."""

Verb = Callable[[Controller, Repository], object]


@dataclass(frozen=True)
class Case:
    """One verb, and what is to be removed after a run that went well."""

    name: str
    verb: Verb
    take_away: Callable[[World], None]


def consistent_and_kept(controller: Controller, repository: Repository) -> object:
    return controller.backup("vm001", repository, mode="consistent", keep_duplicate=True)


def consolidated(controller: Controller, repository: Repository) -> object:
    target = controller.folders.state_dir.parent / "clean"
    return controller.consolidate(repository, _live(controller), target, store=True)


def booted(controller: Controller, repository: Repository) -> object:
    return controller.verify_boot(repository, _live(controller), life_seconds=5)


def restored(controller: Controller, repository: Repository) -> object:
    return controller.restore(repository, _live(controller), "vm002", run=True)


def _live(controller: Controller) -> str:
    return (controller.folders.state_dir / "live").read_text()


def discard_all(world: World) -> None:
    with world.controller() as controller:
        for found in controller.duplicates():
            controller.discard_duplicate(found.duplicate)


def remove_clean(world: World) -> None:
    target = world.folder / "clean"
    if target.exists():
        assert {path.name for path in target.iterdir()} == {"disk0.raw", "disk1.raw"}
        for path in target.iterdir():
            content = read_disk(path)
            assert content is not None and content.clean
        shutil.rmtree(target)


CASES = [
    Case("consistent", consistent_and_kept, discard_all),
    Case("consolidate", consolidated, remove_clean),
    Case("verify", booted, lambda _: None),
    Case("restore", restored, lambda world: world.take_away("vm002")),
]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    with made.controller() as controller:
        live = controller.backup("vm001", made.repository()).backup
    (made.folders.state_dir / "live").write_text(live)
    yield made
    made.close()


def run_with(world: World, verb: Verb, faults: FaultPlan) -> bool:
    """Carry a verb out with faults in this process; True if it succeeded."""
    try:
        with world.controller(faults) as controller:
            verb(controller, world.repository(faults))
    except VmsnapError as error:
        assert "\n" not in str(error)
        return False
    return True


def run_and_be_killed(world: World, verb: Verb, fault: Fault) -> None:
    """Carry a verb out in a process that is killed at `fault`."""
    child = os.fork()
    if child == 0:
        try:
            run_with(world, verb, FaultPlan(fault))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, fault


def recover(world: World) -> None:
    with world.controller() as controller:
        assert controller.recover().kept == ()
        again = controller.recover()
        assert (again.resumed, again.removed, again.kept) == ((), (), ())


def forget_all_but_the_live_one(world: World) -> None:
    repository = world.repository()
    for manifest in repository.list():
        assert not repository.verify(manifest.backup).findings
        if manifest.backup != (world.folders.state_dir / "live").read_text():
            repository.forget(manifest.backup)


def see_and_clear(world: World, case: Case, fault: Fault) -> None:
    recover(world)
    case.take_away(world)
    assert not (world.folder / "clean").exists(), fault
    assert not list(world.folder.glob("state/duplicates/*")), fault
    forget_all_but_the_live_one(world)
    world.see_that_all_is_well(backups=1)


def counts_of(world: World, case: Case) -> dict[str, int]:
    plan = FaultPlan()
    assert run_with(world, case.verb, plan)
    see_and_clear(world, case, Fault("none", 0, Effect.BEFORE))
    return dict(plan.counts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whatever_single_call_fails_nothing_is_left_that_nobody_owns(
    world: World, case: Case, counted: Counted
) -> None:
    faults = list(single_faults(counts_of(world, case), IN_PROCESS))
    assert len(faults) > 60
    faults = some_of(faults)
    failed = 0
    for fault in faults:
        plan = FaultPlan(fault)
        failed += not run_with(world, case.verb, plan)
        # How many objects are put depends on what the guest had to write.
        assert plan.struck or fault.method in STORAGE, fault
        see_and_clear(world, case, fault)
    assert failed > len(faults) // 3
    counted(f"{len(faults)} single failures, {failed} runs failed, nothing was left or lost", cases=len(faults))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_killed_at_any_call_of_a_driver_recovery_sets_it_right(world: World, case: Case, counted: Counted) -> None:
    counts = {call: number for call, number in counts_of(world, case).items() if call not in STORAGE}
    faults = some_of(list(single_faults(counts, KILLS)))
    for fault in faults:
        run_and_be_killed(world, case.verb, fault)
        see_and_clear(world, case, fault)
    counted(f"{len(faults)} kills at calls of drivers, nothing was left or lost", cases=len(faults))


# -- failover: each run needs a VM of its own that has failed


@pytest.fixture
def failed_world() -> Iterator[Callable[[], World]]:
    """Makes worlds in which ``vm001`` was killed and its duplicate is held."""
    made: list[World] = []

    def make() -> World:
        world = World()
        made.append(world)
        with world.controller() as controller:
            controller.backup("vm001", world.repository(), keep_duplicate=True)
        os.kill(world.status()["pid"], signal.SIGKILL)
        eventually(lambda: not record.alive(world.socket), "the VM is dead")
        return world

    yield make
    for world in made:
        if world.folder.exists():
            world.close()


def fail_over(controller: Controller, _: Repository) -> object:
    return controller.failover("vm001")


def see_that_one_machine_is_there(world: World, fault: Fault) -> None:
    """Either the duplicate runs as the VM, or it is held as before and takes the place at the next attempt."""
    recover(world)
    with world.controller() as controller:
        held = controller.duplicates()
        alive = record.alive(world.socket)
        assert len(held) == (0 if alive else 1), fault
        if not alive:
            (found,) = held
            assert found.state == "held", fault
            assert controller.vm("vm001").state == "absent"
            controller.failover("vm001")
        status = world.status()
        assert status["state"] == "executing" and ask(world.socket, "check") == {"fault": ""}, fault
        (row,) = controller.vms()
        assert (row.vm, row.state, row.resume_flag) == ("vm001", "executing", False), fault
        assert {disk.address for disk in row.disks} == {disk["path"] for disk in status["disks"]}
        assert status["nic"]["connected"] and world.counts_on()
        assert controller.duplicates() == [] and controller.journal.unfinished() == []
    assert not list(world.folders.memory_dir.iterdir())
    for manifest in world.repository().list():
        assert not world.repository().verify(manifest.backup).findings


def test_whatever_call_of_a_failover_fails_one_machine_is_there_in_the_end(
    failed_world: Callable[[], World], counted: Counted
) -> None:
    plan = FaultPlan()
    assert run_with(failed_world(), fail_over, plan)
    assert {"fence", "load", "switch_disks", "resume", "state", "describe", "discard_duplicate"} <= set(plan.counts)
    counts = {call: n for call, n in plan.counts.items() if call not in STORAGE}
    faults = list(single_faults(counts, IN_PROCESS + KILLS))
    faults.remove(Fault("describe", 1, Effect.KILL_AFTER))  # the dead VM is asked, which fails by itself: no after
    faults = some_of(faults)
    for fault in faults:
        world = failed_world()
        if fault.effect in KILLS:
            run_and_be_killed(world, fail_over, fault)
        else:
            run_with(world, fail_over, FaultPlan(fault))
        see_that_one_machine_is_there(world, fault)
        world.close()
    counted(f"{len(faults)} failures and kills of a failover, one machine was there each time", cases=len(faults))
