"""Every order of instructions and every failure of every call of a live backup, on real simulated VMs.

A run that goes well is counted first; then each of its calls to a driver fails once, before it was done and after.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Counted
from tests.left_out import some_of
from tests.world import World
from vmsnap.controller import Controller
from vmsnap.controller.backup import BackupOrder, LiveBackup
from vmsnap.controller.progress import silent
from vmsnap.errors import VmsnapError
from vmsnap.protocol import BACKUP_LIVE, BACKUP_LIVE_FROZEN, Instruction
from vmsnap.repository import Repository
from vmsnap.testing.faults import Effect, Fault, FaultPlan, single_faults
from vmsnap_drivers.hypervisors.simulated.control import ask

ORDERS = [
    (Instruction.SNAPSHOT, Instruction.DUPLICATE),
    (Instruction.DUPLICATE, Instruction.SNAPSHOT),
    (Instruction.FREEZE, Instruction.DUPLICATE),
    (Instruction.DUPLICATE, Instruction.FREEZE),
]
"""Those with ``freeze`` are of backups whose disks are frozen."""


TWO_MECHANISMS = {"disk1": "second"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Its two disks have a mechanism each."""
    made = World(mechanisms=TWO_MECHANISMS)
    yield made
    made.close()


def back_up(controller: Controller, repository: Repository, world: World, prefer: tuple[Instruction, ...] = ()) -> str:
    return (
        LiveBackup(
            BackupOrder("vm001", freeze=Instruction.FREEZE in prefer),
            repository,
            controller.drivers,
            controller.journal,
            controller.table,
            start_guardian=world.start_guardian,
            interruption=controller.interruption,
            progress=silent,
            prefer=prefer,
        )
        .run()
        .backup
    )


def run_with(world: World, faults: FaultPlan, prefer: tuple[Instruction, ...] = ()) -> bool:
    """One backup with faults; True if it gave a backup. Whatever it left in the journal is recovered."""
    try:
        with world.controller(faults) as controller:
            back_up(controller, world.repository(faults), world, prefer)
        succeeded = True
    except VmsnapError as error:
        assert "\n" not in str(error)
        succeeded = False
    with world.controller() as controller:
        left = bool(controller.journal.unfinished())
        if left:
            assert controller.recover().kept == ()
        again = controller.recover()
        assert (again.resumed, again.removed, again.kept) == ((), (), ())
    return succeeded


def clear(world: World) -> None:
    repository = world.repository()
    for manifest in repository.list():
        repository.forget(manifest.backup)


def calls_of_a_good_run(world: World, order: tuple[Instruction, ...]) -> FaultPlan:
    plan = FaultPlan()
    assert run_with(world, plan, order)
    world.see_that_all_is_well(backups=1)
    clear(world)
    # It is asked again and again while snapshots are taken, more often where that takes longer.
    plan.counts["check_frozen"] = min(plan.counts["check_frozen"], 1)
    return plan


def test_the_orders_tried_here_are_all_orders_of_the_protocol() -> None:
    steps = {path[3:5] for protocol in (BACKUP_LIVE, BACKUP_LIVE_FROZEN) for path in protocol.paths()}
    assert steps == set(ORDERS)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order[0].value}, {order[1].value}")
def test_whatever_single_call_of_a_backup_fails_the_vm_runs_and_nothing_is_left(
    world: World, order: tuple[Instruction, ...], counted: Counted
) -> None:
    faults = list(single_faults(calls_of_a_good_run(world, order).counts, [Effect.BEFORE, Effect.AFTER]))
    assert len(faults) >= 50
    faults = some_of(faults)
    failed = 0
    for fault in faults:
        plan = FaultPlan(fault)
        succeeded = run_with(world, plan, order)
        assert plan.struck, fault
        failed += not succeeded
        listed = len(world.repository().list())
        # Only the answer to the commit itself can be lost without the backup being lost.
        assert listed == 1 or (listed == 0 and not succeeded), fault
        world.see_that_all_is_well()
        clear(world)
    assert failed > len(faults) // 2
    counted(
        f"{len(faults)} single failures, {failed} of the backups failed, nothing was left or lost", cases=len(faults)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_whatever_calls_fail_together_the_vm_runs_and_nothing_is_left(
    world: World, data: st.DataObject, order: tuple[Instruction, ...]
) -> None:
    """Several failures in one run, those of the compensations among them; recovery comes without any."""
    methods = [
        "describe", "plan_capture", "prepare", "prepare_disks", "pause", "snapshot", "duplicate", "resume", "settle",
        "finish_duplicate", "reader", "read_into", "put", "get", "list",
        "abandon", "delete_snapshots", "discard_duplicate",
        "plan_freeze", "prepare_freeze", "freeze_disks", "check_frozen", "thaw_disks",
    ]  # fmt: skip
    faults = data.draw(
        st.lists(
            st.builds(
                Fault, st.sampled_from(methods), st.integers(1, 3), st.sampled_from([Effect.BEFORE, Effect.AFTER])
            ),
            min_size=1,
            max_size=5,
        )
    )
    # A hypervisor that never obeys "resume" is the guardian's case.
    plan = FaultPlan(*[fault for fault in faults if fault.method != "resume" or fault.number == 1])
    run_with(world, plan, order)
    world.see_that_all_is_well()
    clear(world)


def test_a_vm_that_was_stopped_stays_stopped_and_has_no_pause(world: World) -> None:
    ask(world.socket, "pause")
    try:
        with world.controller() as controller:
            result = controller.backup("vm001", world.repository())
        assert result.pause_seconds == 0
        assert world.status()["state"] == "stopped"
        assert not world.repository().manifest(result.backup).resume_flag
    finally:
        ask(world.socket, "resume")
        with world.controller() as controller:
            controller.vm("vm001")
    world.see_that_all_is_well()
    clear(world)
