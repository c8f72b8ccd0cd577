"""Failover of a real guest, on both QEMUs: the machine held in memory goes on in place of the one that failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import available_qemus
from tests.lab import serial as console
from tests.left_out import some_of
from tests.qemu_stage import Stage, staged, until
from tests.workers import kill_failovers_at
from vmsnap.errors import Busy, UnknownDuplicate
from vmsnap.model import VmState

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

BUILDS = [pytest.param(build, id=f"qemu-{build.version}") for build in available_qemus()]
KILLED_AT = ["fence", "load", "switch_disks", "resume"]


@pytest.fixture(scope="module", params=some_of(BUILDS, 2))
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with staged(request.param) as made:
        yield made


def said_since(stage: Stage, begun: int) -> str:
    """What the guest has said since its console had said so much."""
    return stage.machine.serial_text()[begun:]


def goes_on(stage: Stage, begun: int) -> list[int]:
    """The counts of a guest that went on, once it has found RAM and disks in agreement, twice."""
    until(lambda: len(console.checks(said_since(stage, begun))) >= 2, "it counts on and checks itself")
    text = said_since(stage, begun)
    assert console.faults(text) == []
    return console.counts(text)


def test_a_duplicate_takes_the_place_of_the_killed_original_and_never_of_one_that_lives(stage: Stage) -> None:
    machine, controller = stage.machine, stage.controller
    before = machine.latest_count()
    held = controller.backup("vm001", stage.repository, keep_duplicate=True)
    after = machine.wait_for_count(machine.latest_count() + 20)
    stops = stage.stops()

    with pytest.raises(Busy, match="VM 'vm001' is running"):
        controller.failover("vm001")
    assert controller.vm("vm001").state == VmState.EXECUTING.value
    machine.wait_for_count(machine.latest_count() + 20)
    assert machine.faults() == [] and stage.stops() == stops
    assert [each.duplicate for each in controller.duplicates()] == [held.duplicate]
    assert stage.bridge.repeated() == set()

    stage.kill_vm()
    begun = len(machine.serial_text())
    result = controller.failover("vm001")
    assert result.duplicate == held.duplicate and result.backup == held.backup
    assert "has ended, nobody listens on" in result.fenced and "nobody writes to its 2 disks" in result.fenced
    counts = goes_on(stage, begun)
    assert before <= counts[0] <= after + 20, "it goes on from the instant, on the same console"
    until(lambda: bool(stage.bridge.repeated()), "its packets are on the bridge")
    assert stage.bridge.members() == {stage.bridge.tap}

    row = controller.vm("vm001")
    assert row.state == VmState.EXECUTING.value and row.options["qmp"] == str(machine.qmp_socket)
    assert controller.duplicates() == []
    with pytest.raises(UnknownDuplicate):
        controller.failover("vm001")

    # It is the VM now: it is backed up in turn, and replaced while it lives where that is asked for.
    again = controller.backup("vm001", stage.repository, keep_duplicate=True)
    old, begun = stage.pid(), len(machine.serial_text())
    result = controller.failover("vm001", fence=True)
    assert result.duplicate == again.duplicate and f"its process {old} was killed and has ended" in result.fenced
    assert goes_on(stage, begun)
    assert stage.pid() != old


def test_a_worker_that_is_killed_at_any_instruction_never_loses_the_duplicate(stage: Stage) -> None:
    controller, machine = stage.controller, stage.machine
    held = controller.backup("vm001", stage.repository, keep_duplicate=True)
    stage.kill_vm()
    begun = len(machine.serial_text())
    kill_failovers_at(controller, held.duplicate, KILLED_AT)
    assert goes_on(stage, begun)
    driver = controller.drivers.hypervisor("qemu", "vm001", controller.vm("vm001").options)
    driver.destroy()
    driver.close()
