"""What setting right is like when that goes wrong too: recovery is killed at each of its own calls, again and again;
and every call of a backup hangs once, under a real guardian.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.conftest import Counted
from tests.test_duplicate_failures import CASES, KILLS, STORAGE, Case, run_and_be_killed, run_with
from tests.workers import SLOW_MACHINE_SECONDS
from tests.world import World
from vmsnap.controller import Controller
from vmsnap.errors import VmsnapError
from vmsnap.repository import Repository
from vmsnap.testing.faults import Effect, Fault, FaultPlan, single_faults

MAX_PAUSE_SECONDS = 1.0
HANGS = (Effect.HANG, Effect.HANG_AFTER)


def backed_up(controller: Controller, repository: Repository) -> object:
    return controller.backup("vm001", repository)


LIVE = Case("live", backed_up, lambda _: None)


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
        super().__init__(fault)
        self._pipe = pipe

    def strike(self, fault: Fault, default: type[VmsnapError]) -> VmsnapError:
        os.write(self._pipe, b"x")
        return super().strike(fault, default)


def world_of(*, guarded: bool) -> World:
    made = World(guarded=guarded)
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
    return dict(plan.counts)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [LIVE, *CASES], ids=lambda case: case.name)
def test_recovery_that_is_killed_at_each_of_its_calls_is_ended_by_the_next(
    world: World, case: Case, counted: Counted
) -> None:
    """A run is killed; then recovery at its first call, the next one at its second, until one gets through."""
    counts = {call: number for call, number in calls_of(world, case).items() if call not in STORAGE}
    faults = list(single_faults(counts, [Effect.KILL_AFTER]))
    kills = 0
    for fault in faults:
        for effect in KILLS:
            run_and_be_killed(world, case.verb, fault)
            number = 1
            while status := in_a_process(partial(recover_with, world, AnyCall(number, effect))):
                assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (fault, effect, number)
                number += 1
                kills += 1
            clear(world, case)
    assert kills > len(faults)
    counted(f"{kills} kills of recovery, after {2 * len(faults)} kills of what it sets right; nothing was left or lost")


@pytest.mark.timeout(900)
def test_whatever_call_of_a_backup_hangs_the_guest_goes_on(guarded: World, counted: Counted) -> None:
    counts = calls_of(guarded, LIVE)
    # Calls of the storage come when the guest runs again, and are alike.
    counts = {call: 1 if call in STORAGE else number for call, number in counts.items()}
    faults = list(single_faults(counts, HANGS))
    for fault in faults:
        told, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                plan = Announced(fault, say)
                with guarded.controller(plan) as controller:
                    repository = guarded.repository(plan)
                    controller.backup("vm001", repository, max_pause_seconds=MAX_PAUSE_SECONDS)
            finally:
                os._exit(1)
        os.close(say)
        assert os.read(told, 1) == b"x", fault
        os.close(told)
        assert guarded.counts_on(MAX_PAUSE_SECONDS + SLOW_MACHINE_SECONDS), fault
        os.kill(child, signal.SIGKILL)  # nobody has waited for it, so that it is there, if only as a zombie
        os.waitpid(child, 0)
        recover_with(guarded)
        clear(guarded, LIVE)
    counted(f"{len(faults)} calls that hang, the guest went on each time, nothing was left or lost")
