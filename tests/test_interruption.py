"""Ctrl-C, SIGTERM and kill -9 at any moment of a backup: the VM runs, and nothing is left or `recover` removes it."""

from __future__ import annotations

import itertools
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.left_out import some_of
from tests.workers import MAX_PAUSE_SECONDS, SLOW_MACHINE_SECONDS, worker_that_waits_at
from tests.world import World
from vmsnap.errors import VmsnapError

CALLS = [
    "describe", "plan_capture", "plan", "prepare_disks", "prepare", "pause", "snapshot", "duplicate", "resume",
    "settle", "finish_duplicate", "reader", "delete_snapshots", "discard_duplicate",
]  # fmt: skip


@pytest.fixture
def world() -> Iterator[World]:
    made = World(guarded=True)
    yield made
    made.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", CALLS)
def test_a_signal_stops_the_backup_the_vm_runs_and_nothing_is_left(
    world: World, call: str, number: signal.Signals
) -> None:
    worker = worker_that_waits_at(world.folders.state_dir, world.url, call)
    worker.send_signal(number)
    # In the window the signal waits for its end, so the worker must be let go on.
    told = worker.communicate("x", timeout=120)[0]
    assert worker.returncode == 130, told
    assert f"ERROR stopped by {number.name}" in told
    world.see_that_all_is_well()


@pytest.mark.parametrize("call", some_of(CALLS, 2))
def test_killed_at_any_call_the_vm_runs_again_and_recover_removes_the_rest(world: World, call: str) -> None:
    worker = worker_that_waits_at(world.folders.state_dir, world.url, call)
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 60
    while world.status()["state"] != "executing":
        assert time.monotonic() < deadline, "the guardian did not resume the VM"
        time.sleep(0.01)
    with world.controller() as controller:
        assert controller.recover().kept == ()
        again = controller.recover()
        assert (again.resumed, again.removed, again.kept) == ((), (), ())
    world.see_that_all_is_well()


def test_the_next_backup_recovers_by_itself_what_a_killed_one_left(world: World) -> None:
    worker = worker_that_waits_at(world.folders.state_dir, world.url, "finish_duplicate")
    worker.kill()
    worker.wait()
    with world.controller() as controller:
        assert controller.journal.unfinished()
        assert controller.backup("vm001", world.repository()).warnings == ()
    world.see_that_all_is_well(backups=1)


def test_a_worker_that_hangs_in_the_pause_is_killed_and_the_vm_runs_within_the_limit(world: World) -> None:
    worker = worker_that_waits_at(world.folders.state_dir, world.url, "duplicate", max_pause_seconds=MAX_PAUSE_SECONDS)
    begun = time.monotonic()
    assert worker.wait(timeout=120) == -signal.SIGKILL
    while world.status()["state"] != "executing":
        assert time.monotonic() - begun < MAX_PAUSE_SECONDS + SLOW_MACHINE_SECONDS
        time.sleep(0.01)
    with world.controller() as controller:
        controller.recover()
    world.see_that_all_is_well(backups=0)


def ended_by_further_signals(worker: subprocess.Popen[str]) -> int:
    """The exit code of a worker that nobody lets go on, as somebody presses Ctrl-C again and again: one that comes
    right behind another may reach a thread that waits, one that comes when the verb has ended kills its Python.
    """
    deadline = time.monotonic() + 120
    while worker.poll() is None:
        assert time.monotonic() < deadline, "signals do not end it"
        worker.send_signal(signal.SIGINT)
        time.sleep(0.1)
    return worker.wait()


@pytest.mark.parametrize("call", some_of(CALLS, 2))
def test_a_second_signal_ends_it_at_once_and_recover_does_the_rest(world: World, call: str) -> None:
    worker = worker_that_waits_at(world.folders.state_dir, world.url, call)
    assert ended_by_further_signals(worker) in (130, -signal.SIGINT)
    with world.controller() as controller:
        assert controller.recover().kept == ()
    world.see_that_all_is_well()


@pytest.mark.parametrize(("call", "cleaning"), [("prepare", "abandon"), ("settle", "delete_snapshots")])
def test_a_second_signal_ends_the_cleaning_up_after_the_first(world: World, call: str, cleaning: str) -> None:
    worker = worker_that_waits_at(world.folders.state_dir, world.url, f"{call},{cleaning}")
    worker.send_signal(signal.SIGINT)
    assert any(line.strip() == "HERE" for line in worker.stdout or ()), "it does not clean up so"
    assert ended_by_further_signals(worker) in (130, -signal.SIGINT)
    with world.controller() as controller:
        assert controller.recover().kept == ()
    world.see_that_all_is_well()


@pytest.mark.parametrize("seconds", [-86400, 86400], ids=["back", "ahead"])
def test_a_clock_that_is_set_at_every_moment_costs_the_backup_at_most(
    world: World, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """It jumps by minutes whenever it is looked at; deadlines and the order of moments are not by it."""
    real, looks = time.time_ns, itertools.count(1)

    def jumping() -> int:
        return real() + next(looks) * seconds * 10**9 // 1000

    monkeypatch.setattr(time, "time_ns", jumping)
    monkeypatch.setattr(time, "time", lambda: jumping() / 1e9)
    with world.controller() as controller:
        try:
            controller.backup("vm001", world.repository())
        except VmsnapError as e:
            assert "\n" not in str(e)
    assert next(looks) > 10
    monkeypatch.undo()
    with world.controller() as controller:
        assert controller.recover().kept == ()
        assert controller.backup("vm001", world.repository()).warnings == ()
    world.see_that_all_is_well()
