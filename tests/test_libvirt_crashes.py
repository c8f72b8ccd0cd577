"""A worker or libvirtd is killed anywhere in a live backup of a domain: the guest goes on, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.conftest import Counted
from tests.killed_verbs import LATER, LIVE_CALLS, Later, Scene
from tests.lab import serial as console
from tests.left_out import EXHAUSTIVE, some_of
from tests.libvirt_stage import Stage, staged
from tests.qemu_stage import until
from tests.workers import MAX_PAUSE_SECONDS, SLOW_MACHINE_SECONDS, kill_failovers_at, worker_that_waits_at

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

FOLLOWING = [later for later in LATER if EXHAUSTIVE or later.verb == "restore"]
"""What is done the same with QEMU (`tests/test_qemu_crashes.py`) is left out otherwise."""
PAUSED = ("pause", "snapshot", "duplicate", "resume")
"""Of the calls of a live backup, those with the guest standing still, and what makes it."""
BUSY_SECONDS = SLOW_MACHINE_SECONDS + 15
"""On a busy machine a libvirtd may be taken for gone, which takes 10 s, before the guest's own monitor is tried."""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as made:
        made.controller.backup("vm001", made.repository)
        yield made


def goes_on(stage: Stage, seconds: float) -> None:
    """The guest's own counter goes on within so many seconds."""
    machine = stage.machine
    machine.wait_for_count(machine.latest_count() + 20, timeout_seconds=seconds)


def let_go_on(worker: subprocess.Popen[str]) -> None:
    """The call at which it waits is made."""
    assert worker.stdin is not None
    worker.stdin.write("x")
    worker.stdin.flush()


def scene(stage: Stage) -> Scene:
    """What `tests.killed_verbs` needs."""
    return Scene(
        stage.controller, stage.repository, stage.place, "libvirt", stage.options, stage.at_rest,
        lambda: goes_on(stage, MAX_PAUSE_SECONDS + BUSY_SECONDS),
    )  # fmt: skip


def set_right(stage: Stage, rest: tuple[object, ...], call: str) -> None:
    """What a later command makes of it: all as it was before, and the domain runs."""
    scene(stage).set_right(rest, call)
    assert stage.libvirtd.virsh("domstate", "vm001").strip() == "running"


def test_a_worker_that_is_killed_at_any_instruction(stage: Stage, counted: Counted) -> None:
    rest = stage.at_rest()
    calls = some_of(LIVE_CALLS, 2)
    for call in calls:
        scene(stage).kill("backup", rest, call)
    assert stage.controller.backup("vm001", stage.repository).warnings == ()
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    counted(f"{len(calls)} kills ({', '.join(calls)}), the VM ran, nothing was left", cases=len(calls))


def test_libvirtd_that_is_killed_and_started_again_at_any_instruction_costs_the_backup_at_most(
    stage: Stage, counted: Counted
) -> None:
    rest, calls, kept = stage.at_rest(), some_of(LIVE_CALLS, 2), []
    for call in calls:
        stored = len(stage.repository.list())
        worker = worker_that_waits_at(
            stage.controller.folders.state_dir, str(stage.place / "repository"), call, max_pause_seconds=BUSY_SECONDS
        )
        stage.libvirtd.restart()
        told, _ = worker.communicate("x", timeout=120)
        goes_on(stage, 2 * BUSY_SECONDS)
        failed = worker.returncode != 0
        # In the pause what QEMU told is lost, and with it the proof of one instant.
        assert failed or call not in ("snapshot", "duplicate", "resume"), (call, told)
        kept += [] if failed else [call]
        assert len(stage.repository.list()) == stored + (not failed), (call, told)
        set_right(stage, rest, call)
    assert stage.controller.backup("vm001", stage.repository).warnings == ()
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []
    counted(
        f"{len(calls)} restarts of libvirtd in a live backup, which was stored all the same where they were before"
        f" {', '.join(kept)}",
        cases=len(calls),
    )


def test_without_any_libvirtd_a_guest_that_stands_still_is_made_to_run_by_its_own_monitor(stage: Stage) -> None:
    rest = stage.at_rest()
    for call in ("duplicate",):
        worker = worker_that_waits_at(
            stage.controller.folders.state_dir, str(stage.place / "repository"), call, max_pause_seconds=60
        )
        stage.libvirtd.kill()
        stopped, count = time.monotonic(), stage.machine.latest_count()
        let_go_on(worker)
        stage.machine.wait_for_count(count + 20, timeout_seconds=60 + SLOW_MACHINE_SECONDS)
        assert time.monotonic() - stopped < 55, "it did not wait for the guardian's deadline"
        stage.libvirtd.start()
        worker.communicate(timeout=120)
        assert worker.returncode != 0
        set_right(stage, rest, call)
    assert stage.controller.backup("vm001", stage.repository).warnings == ()
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)


def made_to_execute(stage: Stage) -> int:
    """How often a guardian has said that it made the VM execute."""
    return (stage.controller.folders.state_dir / "guardian.log").read_text().count("made to execute")


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP holds the process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_libvirtd_that_hangs_in_the_pause_keeps_the_guest_no_longer_than_a_worker_would(
    stage: Stage, counted: Counted
) -> None:
    """What was asked of it just before, such as to stop the guest, it does when it goes on; that is set right too."""
    rest = stage.at_rest()
    pauses = []
    for call in PAUSED:
        worker = worker_that_waits_at(
            stage.controller.folders.state_dir, str(stage.place / "repository"), call,
            max_pause_seconds=MAX_PAUSE_SECONDS,
        )  # fmt: skip
        acted = made_to_execute(stage)
        os.kill(stage.libvirtd.pid, signal.SIGSTOP)
        try:
            until(lambda: is_stopped(stage.libvirtd.pid), "libvirtd stands still")
            begun, count = time.monotonic(), stage.machine.latest_count()
            let_go_on(worker)
            stage.machine.wait_for_count(count + 5, timeout_seconds=MAX_PAUSE_SECONDS + SLOW_MACHINE_SECONDS)
            pauses.append(time.monotonic() - begun)
            assert is_stopped(stage.libvirtd.pid), "the guest goes on without it"
            worker.communicate(timeout=120)
            assert worker.returncode != 0, call
            # QEMU 7.2 goes on by itself when nobody reads its memory any more; others, and other ways, do not.
            until(lambda: made_to_execute(stage) > acted, "the guardian has told QEMU")  # noqa: B023 - called here
            assert is_stopped(stage.libvirtd.pid)
            goes_on(stage, SLOW_MACHINE_SECONDS)
        finally:
            os.kill(stage.libvirtd.pid, signal.SIGCONT)
        until(lambda: not stage.controller.journal.unfinished(), f"the guardian sets it right after {call}", 120)
        goes_on(stage, BUSY_SECONDS)
        set_right(stage, rest, call)
    assert stage.controller.backup("vm001", stage.repository).warnings == ()
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []
    counted(
        f"{len(PAUSED)} calls at which libvirtd hangs, the guest counted on after {max(pauses):.1f} s at most"
        f" (a pause of {MAX_PAUSE_SECONDS} s is allowed)",
        cases=len(PAUSED),
        pause_seconds=max(pauses),
    )


@pytest.mark.parametrize("later", FOLLOWING, ids=lambda later: later.verb)
def test_a_worker_that_is_killed_at_any_instruction_of_what_follows(
    stage: Stage, counted: Counted, later: Later
) -> None:
    kills = later.kill_at_each_call(scene(stage))
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []
    counted(f"{len(kills)} kills ({', '.join(kills)}), the VM ran, nothing was left or lost", cases=len(kills))


def test_a_worker_that_is_killed_at_any_instruction_of_a_failover_never_loses_the_duplicate(
    stage: Stage, counted: Counted
) -> None:
    """It is the last one here: the duplicate is the VM from then on."""
    controller, machine = stage.controller, stage.machine
    held = controller.backup("vm001", stage.repository, keep_duplicate=True)
    begun = len(machine.serial_text())
    machine.kill()
    kills = ("fence", "load", "switch_disks", "resume")
    kill_failovers_at(controller, held.duplicate, kills)
    until(lambda: len(console.checks(machine.serial_text()[begun:])) >= 2, "it counts on and checks itself")
    assert console.faults(machine.serial_text()[begun:]) == []
    assert stage.libvirtd.virsh("list", "--all", "--name").split() == ["vm001"]
    assert stage.libvirtd.virsh("domstate", "vm001").strip() == "running"
    made = controller.backup("vm001", stage.repository).backup
    assert not stage.repository.verify(made).findings
    counted(f"{len(kills)} kills ({', '.join(kills)}), one machine was there each time", cases=len(kills))
