"""What setting right is like when that goes wrong too: recovery is killed at each of its own calls, again and again;
and every call of a backup hangs once, or takes long, under a real guardian.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.conftest import Counted
from tests.left_out import EXHAUSTIVE, some_of
from tests.test_backup_failures import TWO_MECHANISMS
from tests.test_duplicate_failures import (
    CASES,
    KILLS,
    STORAGE,
    Case,
    fail_over,
    failed_world,
    run_and_be_killed,
    run_with,
    see_that_one_machine_is_there,
)
from tests.workers import SLOW_MACHINE_SECONDS
from tests.world import World
from vmsnap.controller import Controller
from vmsnap.errors import VmsnapError
from vmsnap.repository import Repository
from vmsnap.testing.faults import Effect, Fault, FaultPlan, single_faults

__all__ = ["failed_world"]

MAX_PAUSE_SECONDS = 0.5
HANGS = (Effect.HANG, Effect.HANG_AFTER)
SLOW = (Effect.SLOW, Effect.SLOW_AFTER)
SLOW_SECONDS = 2 * MAX_PAUSE_SECONDS


def backed_up(controller: Controller, repository: Repository) -> object:
    return controller.backup("vm001", repository)


def backed_up_frozen(controller: Controller, repository: Repository) -> object:
    return controller.backup("vm001", repository, freeze="overlay")


LIVE = Case("live", backed_up, lambda _: None)
FROZEN = Case("frozen", backed_up_frozen, lambda _: None)
FREEZE_CALLS = ("plan_freeze", "prepare_freeze", "freeze_disks", "check_frozen", "thaw_disks")


class AnyCall(FaultPlan):
    """Shows an effect at the call number `number`, whatever its method."""

    def __init__(self, number: int, effect: Effect) -> None:
        super().__init__()
        self._left = number
        self._effect = effect

    def count(self, method: str) -> Fault | None:
        super().count(method)
        self._left -= 1
        return Fault(method, 1, self._effect) if self._left == 0 else None


class Announced(FaultPlan):
    """Says on a pipe that a fault comes true."""

    def __init__(self, fault: Fault, pipe: int) -> None:
        super().__init__(fault, slow_seconds=SLOW_SECONDS)
        self._pipe = pipe

    def strike(self, fault: Fault, default: type[VmsnapError]) -> VmsnapError:
        os.write(self._pipe, b"x")
        return super().strike(fault, default)

    def dawdle(self, fault: Fault) -> None:
        os.write(self._pipe, b"x")
        super().dawdle(fault)


def world_of(*, guarded: bool) -> World:
    made = World(guarded=guarded, mechanisms=TWO_MECHANISMS)
    with made.controller() as controller:
        live = controller.backup("vm001", made.repository()).backup
    (made.folders.state_dir / "live").write_text(live)
    return made


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = world_of(guarded=False)
    yield made
    made.close()


@pytest.fixture
def guarded() -> Iterator[World]:
    made = world_of(guarded=True)
    yield made
    made.close()


def in_a_process(work: Callable[[], object]) -> int:
    """Do something in a process of its own; returns how it ended, as `os.wait` tells it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def recover_with(world: World, faults: FaultPlan | None = None) -> None:
    with world.controller(faults) as controller:
        assert controller.recover().kept == ()


def clear(world: World, case: Case) -> None:
    """See that recovery has nothing more to do, and that all is as it was before the run."""
    with world.controller() as controller:
        again = controller.recover()
        assert (again.resumed, again.removed, again.kept) == ((), (), ())
    case.take_away(world)
    assert not (world.folder / "clean").exists()
    assert not list(world.folder.glob("state/duplicates/*"))
    repository = world.repository()
    for manifest in repository.list():
        assert not repository.verify(manifest.backup).findings
        if manifest.backup != (world.folders.state_dir / "live").read_text():
            repository.forget(manifest.backup)
    world.see_that_all_is_well(backups=1)


def calls_of(world: World, case: Case) -> dict[str, int]:
    plan = FaultPlan()
    assert run_with(world, case.verb, plan)
    clear(world, case)
    # It is asked again and again while snapshots are taken, more often where that takes longer.
    return {**plan.counts, "check_frozen": min(plan.counts["check_frozen"], 1)}


def kill_recovery_until_it_gets_through(world: World, effect: Effect) -> int:
    """Kill it at its first call, the next one at its second; returns how many were killed."""
    number = 1
    while status := in_a_process(partial(recover_with, world, AnyCall(number, effect))):
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (effect, number)
        number += 1
    return number - 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [LIVE, FROZEN, *CASES], ids=lambda case: case.name)
def test_recovery_that_is_killed_at_each_of_its_calls_is_ended_by_the_next(
    world: World, case: Case, counted: Counted
) -> None:
    """A run is killed; then recovery at its first call, the next one at its second, until one gets through."""
    counts = {call: number for call, number in calls_of(world, case).items() if call not in STORAGE}
    faults = some_of(list(single_faults(counts, [Effect.KILL_AFTER])))
    kills = 0
    for fault in faults:
        for effect in KILLS:
            run_and_be_killed(world, case.verb, fault)
            kills += kill_recovery_until_it_gets_through(world, effect)
            clear(world, case)
    assert kills > (len(faults) if EXHAUSTIVE else len(faults) // 2)
    counted(
        f"{kills} kills of recovery, after {2 * len(faults)} kills of what it sets right; nothing was left or lost",
        cases=kills,
    )


@pytest.mark.timeout(900)
def test_recovery_of_a_failover_that_is_killed_at_each_of_its_calls_is_ended_by_the_next(
    failed_world: Callable[[], World], counted: Counted
) -> None:
    plan = FaultPlan()
    assert run_with(failed_world(), fail_over, plan)
    counts = {call: number for call, number in plan.counts.items() if call not in STORAGE}
    faults = some_of(list(single_faults(counts, [Effect.KILL])))  # a kill after a call is one before the next
    kills = 0
    for fault in faults:
        world = failed_world()
        run_and_be_killed(world, fail_over, fault)
        kills += kill_recovery_until_it_gets_through(world, Effect.KILL_AFTER)
        see_that_one_machine_is_there(world, fault)
        world.close()
    assert kills > len(faults) // 2
    counted(
        f"{kills} kills of recovery, after {len(faults)} kills of what it sets right; one machine was there each time",
        cases=kills,
    )


def backup_with(world: World, fault: Fault, freeze: str = "none", tries: int = 5) -> int:
    """Begin a backup in a process of its own, and see that the guest goes on when `fault` has come true; the process.

    It ends with 0 where the backup was made, else with 1.
    """
    told, say = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            plan = Announced(fault, say)
            with world.controller(plan) as controller:
                controller.backup("vm001", world.repository(plan), max_pause_seconds=MAX_PAUSE_SECONDS, freeze=freeze)
            status = 0
        except VmsnapError as error:
            status = 1 if "\n" not in str(error) else 2
        finally:
            os._exit(status)
    os.close(say)
    struck = os.read(told, 1) == b"x"
    os.close(told)
    if not struck:
        # On a busy machine the pause alone may pass its limit: then the guardian comes before the fault.
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (1, -signal.SIGKILL), fault
        assert tries > 1, fault
        recover_with(world)
        clear(world, LIVE)
        return backup_with(world, fault, freeze, tries - 1)
    assert world.counts_on(MAX_PAUSE_SECONDS + SLOW_MACHINE_SECONDS), fault
    return child


def faults_of_a_backup(world: World, effects: tuple[Effect, ...]) -> list[Fault]:
    counts = calls_of(world, LIVE)
    # Calls of the storage come when the guest runs again, and are alike.
    return list(single_faults({call: 1 if call in STORAGE else n for call, n in counts.items()}, effects))


@pytest.mark.timeout(900)
def test_whatever_call_of_a_backup_hangs_the_guest_goes_on(guarded: World, counted: Counted) -> None:
    faults = [(fault, "none") for fault in some_of(faults_of_a_backup(guarded, HANGS))]
    faults += [(Fault(call, 1, effect), "overlay") for call in FREEZE_CALLS for effect in HANGS]
    for fault, freeze in faults:
        child = backup_with(guarded, fault, freeze)
        os.kill(child, signal.SIGKILL)  # nobody has waited for it, so that it is there, if only as a zombie
        os.waitpid(child, 0)
        recover_with(guarded)
        clear(guarded, LIVE)
    counted(f"{len(faults)} calls that hang, the guest went on each time, nothing was left or lost", cases=len(faults))


@pytest.mark.timeout(900)
def test_whatever_call_of_a_backup_takes_long_it_costs_the_backup_at_most(guarded: World, counted: Counted) -> None:
    """Longer than the longest pause, that is. It costs the backup where the guardian is on watch, else nothing."""
    on_watch = {(method, effect) for method in ("pause", "snapshot", "duplicate", "resume") for effect in SLOW}
    all_faults = faults_of_a_backup(guarded, SLOW)
    others = [fault for fault in all_faults if (fault.method, fault.effect) not in on_watch]
    faults = [fault for fault in all_faults if fault not in others] + list(some_of(others))
    lost = []
    for fault in faults:
        ended = os.waitstatus_to_exitcode(os.waitpid(backup_with(guarded, fault), 0)[1])
        assert ended in (0, 1, -signal.SIGKILL), fault  # the guardian kills who keeps the guest waiting
        if ended:
            lost.append((fault.method, fault.effect))
        recover_with(guarded)
        clear(guarded, LIVE)
    assert on_watch <= set(lost)
    assert len(lost) - len(on_watch) < len(some_of(others)) // 3  # a busy machine may cost another one
    counted(
        f"{len(faults)} calls that take long, {len(lost)} backups failed by it, nothing was left or lost",
        cases=len(faults),
    )
