"""The log explains a night afterwards: what was done, how long it took, why it failed, who set it right."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from tests.workers import worker_that_waits_at
from tests.world import World
from vmsnap.cli.log import log
from vmsnap.cli.session import Session
from vmsnap.errors import VmsnapError
from vmsnap.oplog import LogLine, log_lines
from vmsnap.protocol import BACKUP_LIVE, RESTORE, VERIFY_BOOT
from vmsnap.testing.faults import Effect, Fault, FaultPlan


@pytest.fixture
def world() -> Iterator[World]:
    made = World(guarded=True)
    yield made
    made.close()


def lines_of(world: World) -> list[LogLine]:
    with world.controller() as controller:
        return list(log_lines(controller.journal))


def test_a_backup_has_a_line_for_each_instruction_and_names_what_it_stored(world: World) -> None:
    before_ns = time.time_ns()
    with world.controller() as controller:
        backup = controller.backup("vm001", world.repository()).backup
    lines = lines_of(world)
    assert [line.instruction for line in lines] == [step.value for step in BACKUP_LIVE.paths()[0]] + ["end"]
    assert [line.instruction for line in lines if line.status == "passed over"] == ["keep"]
    assert all(line.status == "done" for line in lines if line.instruction != "keep")
    assert {(line.vm, line.protocol) for line in lines} == {("vm001", BACKUP_LIVE.name)}
    assert [line for line in lines if backup in line.message] == [lines[6], lines[-1]]
    assert {line.backup for line in lines} == {backup}
    assert lines[6].instruction == "store"
    assert all(before_ns <= line.begun_ns <= time.time_ns() for line in lines)
    parts = [line.seconds for line in lines[:-1]]
    assert all(seconds is not None and seconds >= 0 for seconds in parts)
    assert sum(seconds or 0 for seconds in parts) <= (lines[-1].seconds or 0)


def test_a_failed_backup_says_where_why_and_how_it_was_set_right(world: World) -> None:
    faults = FaultPlan(Fault("duplicate", 1, Effect.BEFORE))
    with pytest.raises(VmsnapError) as failure, world.controller(faults) as controller:
        controller.backup("vm001", world.repository())
    lines = lines_of(world)
    failed = next(line for line in lines if line.instruction == "duplicate")
    assert (failed.status, failed.message) == ("failed", str(failure.value))
    # The guest first.
    after = [line.instruction for line in lines if line.begun_ns > failed.begun_ns and line.status == "done"]
    assert after[0] == "resume the VM"
    assert "delete the snapshots" in after
    assert (lines[-1].instruction, lines[-1].status) == ("end", "failed")


def test_a_killed_backup_shows_the_guardian_and_the_recovery(world: World) -> None:
    worker = worker_that_waits_at(world.folders.state_dir, world.url, "duplicate")
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 120
    while lines_of(world)[-1].status != "recovered":
        assert time.monotonic() < deadline, "the guardian did not recover"
        time.sleep(0.05)
    told = [(line.instruction, line.message) for line in lines_of(world)]
    assert ("guardian", "made the VM execute: the worker was gone or had given up") in told
    assert any(name == "recover" and message.startswith("removed duplicate") for name, message in told)


def test_what_follows_a_backup_names_it_though_it_fails(world: World) -> None:
    with world.controller() as controller:
        backup = controller.backup("vm001", world.repository()).backup
    fault = Fault("load", 1, Effect.BEFORE)
    with pytest.raises(VmsnapError), world.controller(FaultPlan(fault)) as controller:
        controller.restore(world.repository(), backup, "vm002")
    with pytest.raises(VmsnapError), world.controller(FaultPlan(fault)) as controller:
        controller.verify_boot(world.repository(), backup)
    ends = [line for line in lines_of(world) if line.instruction == "end"]
    assert {line.protocol for line in ends} == {BACKUP_LIVE.name, RESTORE.name, VERIFY_BOOT.name}
    assert {line.backup for line in lines_of(world)} == {backup}


def test_the_command_shows_it_to_people_and_to_programs(world: World) -> None:
    with pytest.raises(VmsnapError), world.controller(FaultPlan(Fault("pause", 1, Effect.BEFORE))) as controller:
        controller.backup("vm001", world.repository())
    with world.controller() as controller:
        controller.backup("vm001", world.repository())

    def called(*argv: str) -> str:
        return str(CliRunner().invoke(log, argv, obj=session, catch_exceptions=False).stdout)

    session = Session(state_dir=world.folders.state_dir, json=True)
    everything, failed = json.loads(called("vm001")), json.loads(called("--failed", "--since", "1d"))
    assert {line["operation"] for line in failed} < {line["operation"] for line in everything}
    assert [line["instruction"] for line in failed if line["status"] == "failed"] == ["pause", "end"]
    assert json.loads(called("vm002")) == []
    session.json = False
    assert [line.split()[-1] for line in called("--failed").splitlines() if "pause" in line]
    assert all(len(line) > 40 for line in called().splitlines())
