"""A Hypothesis state machine over the protocols, on a simulated VM: backups, restores, failures, and an operator who
pauses and resumes the VM in between, in any order. After every step the VM does what it did before, nothing is left,
and what is listed is whole.
"""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.left_out import EXHAUSTIVE
from tests.test_backup_failures import ORDERS, back_up
from tests.world import World
from vmsnap.errors import VmsnapError
from vmsnap.model import VmState
from vmsnap.protocol import Instruction
from vmsnap.testing.faults import Effect, Fault, FaultPlan
from vmsnap_drivers.hypervisors.simulated.control import ask

BACKUP_CALLS = [
    "describe", "plan_capture", "plan", "prepare_disks", "prepare", "pause", "snapshot", "duplicate", "settle",
    "finish_duplicate", "reader", "extents", "read_into", "put", "abandon", "delete_snapshots", "discard_duplicate",
]  # fmt: skip
RESTORE_CALLS = ["load", "switch_disks", "resume", "state", "destroy", "get"]


def faults_among(calls: list[str]) -> st.SearchStrategy[list[Fault]]:
    fault = st.builds(Fault, st.sampled_from(calls), st.integers(1, 2), st.sampled_from([Effect.BEFORE, Effect.AFTER]))
    return st.lists(fault, max_size=3)


class Protocols(RuleBasedStateMachine):
    """The model: whether the VM executes, and which backups were promised."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.executes = True
        self.promised: set[str] = set()

    def teardown(self) -> None:
        self.world.close()

    @rule(faults=faults_among(BACKUP_CALLS), order=st.sampled_from(ORDERS))
    def back_up(self, faults: list[Fault], order: tuple[Instruction, ...]) -> None:
        plan = FaultPlan(*faults)
        try:
            with self.world.controller(plan) as controller:
                self.promised.add(back_up(controller, self.world.repository(plan), self.world, order))
        except VmsnapError:
            assert plan.struck, "a backup without a fault does not fail"
        self._recover()

    @precondition(lambda self: self.promised)
    @rule(data=st.data(), faults=faults_among(RESTORE_CALLS), isolated=st.booleans())
    def restore(self, data: st.DataObject, faults: list[Fault], isolated: bool) -> None:
        backup = data.draw(st.sampled_from(sorted(self.promised)))
        plan = FaultPlan(*faults)
        try:
            with self.world.controller(plan) as controller:
                repository = self.world.repository(plan)
                controller.restore(repository, backup, "vm002", run=True, isolated=isolated)
        except VmsnapError:
            assert plan.struck, "a restore without a fault does not fail"
            self._recover()
        else:
            self._see_and_take_away(isolated)
        assert not (self.world.folders.state_dir / "vms" / "vm002").exists()

    @precondition(lambda self: self.executes)
    @rule()
    def operator_pauses(self) -> None:
        ask(self.world.socket, "pause")
        self.executes = False

    @precondition(lambda self: not self.executes)
    @rule()
    def operator_resumes(self) -> None:
        ask(self.world.socket, "resume")
        self.executes = True

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        backup = data.draw(st.sampled_from(sorted(self.promised)))
        self.world.repository().forget(backup)
        self.promised.remove(backup)

    @invariant()
    def the_vm_does_what_it_did(self) -> None:
        status = self.world.status()
        assert status["state"] == ("executing" if self.executes else "stopped")
        assert not status["fault"]
        assert not self.executes or self.world.counts_on()

    @invariant()
    def nothing_is_left(self) -> None:
        assert self.world.files() == self.world.files_at_rest
        with self.world.controller() as controller:
            assert controller.journal.unfinished() == []
            assert [row.vm for row in controller.vms()] == ["vm001"]

    @invariant()
    def what_was_promised_is_there_and_what_is_there_is_whole(self) -> None:
        repository = self.world.repository()
        listed = {manifest.backup for manifest in repository.list()}
        # A commit whose answer was lost is a backup that nobody was promised.
        assert self.promised <= listed
        assert not repository.check(read_data=True).damaged

    def _recover(self) -> None:
        with self.world.controller() as controller:
            assert controller.recover().kept == ()

    def _see_and_take_away(self, isolated: bool) -> None:
        with self.world.controller() as controller:
            row = controller.table.get("vm002")
            driver = controller.drivers.hypervisor("simulated", "vm002", row.options)
            assert driver.state() is VmState.EXECUTING
            socket = Path(row.options["socket"])
            assert not ask(socket, "check")["fault"]
            assert ask(socket, "status")["nic"]["connected"] is not isolated
            driver.destroy()
            controller.remove_vm("vm002")
        for disk in row.disks:
            Path(disk.address).unlink()
        Path(row.disks[0].address).parent.rmdir()


TestProtocols = Protocols.TestCase
TestProtocols.settings = settings(
    max_examples=25 if EXHAUSTIVE else 10,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
