"""A Hypothesis state machine over duplicates: backups of both modes that hold one or do not, failures of their calls,
discards, VMs that die and are failed over, in any order. After every step one machine is there, whoever owns a file is
known, and what was promised is whole.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.left_out import EXHAUSTIVE
from tests.test_protocol_machine import faults_among
from tests.world import World
from vmsnap.errors import VmsnapError
from vmsnap.testing.faults import Fault, FaultPlan
from vmsnap.testing.rigs import eventually
from vmsnap_drivers.hypervisors.simulated import record
from vmsnap_drivers.hypervisors.simulated.control import ask

CALLS = [
    "plan_capture", "prepare_disks", "snapshot", "finish_duplicate", "plan_clone", "clone", "load", "switch_disks",
    "cut_network", "resume", "state", "shut_down", "destroy", "clone_reader", "put", "delete_clone", "delete_snapshots",
    "discard_duplicate",
]  # fmt: skip
FAILOVER_CALLS = ["fence", "load", "switch_disks", "resume", "state", "describe", "destroy", "discard_duplicate"]


class Duplicates(RuleBasedStateMachine):
    """The model: which backups were promised, and which duplicate is held."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.promised: set[str] = set()
        self.held = ""
        self.disks_of_before: set[str] = set()

    def teardown(self) -> None:
        self.world.close()

    @rule(faults=faults_among(CALLS), mode=st.sampled_from(["live", "consistent"]), keep=st.booleans())
    def back_up(self, faults: list[Fault], mode: str, keep: bool) -> None:
        plan = FaultPlan(*faults)
        try:
            with self.world.controller(plan) as controller:
                result = controller.backup("vm001", self.world.repository(plan), mode=mode, keep_duplicate=keep)
            self.promised.add(result.backup)
            if keep:
                self.held = result.duplicate
        except VmsnapError:
            assert plan.struck, "a backup without a fault does not fail"
        self._recover()
        with self.world.controller() as controller:
            names = [found.duplicate for found in controller.duplicates()]
        # One that was handed over before a later call failed is held all the same.
        assert names == list(filter(None, [self.held])) or (keep and plan.struck and len(names) == 1), names
        self.held = names[-1] if names else ""

    @precondition(lambda self: self.held)
    @rule()
    def discard(self) -> None:
        with self.world.controller() as controller:
            controller.discard_duplicate(self.held)
        self.held = ""

    @precondition(lambda self: self.held)
    @rule(faults=faults_among(FAILOVER_CALLS), fence=st.booleans())
    def die_and_fail_over(self, faults: list[Fault], fence: bool) -> None:
        plan = FaultPlan(*faults)
        if not fence:
            os.kill(self.world.status()["pid"], signal.SIGKILL)
            eventually(lambda: not record.alive(self.world.socket), "the VM is dead")
        with self.world.controller() as controller:
            self.disks_of_before |= {disk.address for disk in controller.table.get("vm001").disks}
        try:
            with self.world.controller(plan) as controller:
                controller.failover("vm001", fence=fence)
        except VmsnapError:
            assert plan.struck, "a failover without a fault does not fail"
        self._recover()
        with self.world.controller() as controller:
            if controller.duplicates():
                controller.failover("vm001", fence=fence)
        self.held = ""

    @invariant()
    def one_machine_is_there_and_the_table_is_true(self) -> None:
        status = self.world.status()
        assert status["state"] == "executing" and ask(self.world.socket, "check") == {"fault": ""}
        assert self.world.counts_on()
        with self.world.controller() as controller:
            assert controller.journal.unfinished() == []
            rows = {row.vm: row for row in controller.vms()}
            assert rows.keys() == {"vm001", *filter(None, [self.held])}
            assert {disk.address for disk in rows["vm001"].disks} == {disk["path"] for disk in status["disks"]}
            assert (rows["vm001"].state, rows["vm001"].resume_flag) == ("executing", False)

    @invariant()
    def whoever_owns_a_file_is_known(self) -> None:
        owned = self.world.files_at_rest | self.disks_of_before
        with self.world.controller() as controller:
            owned |= {disk.address for row in controller.vms() for disk in row.disks}
        owned |= {str(Path(path).parent) for path in owned}
        images = str(self.world.folders.memory_dir / self.held) if self.held else "nothing"
        left = {path for path in self.world.files() - owned if not path.startswith(images)}
        assert not left

    @invariant()
    def what_was_promised_is_there_and_what_is_there_is_whole(self) -> None:
        repository = self.world.repository()
        assert self.promised <= {manifest.backup for manifest in repository.list()}
        assert not repository.check(read_data=True).damaged

    def _recover(self) -> None:
        with self.world.controller() as controller:
            assert controller.recover().kept == ()


TestDuplicates = Duplicates.TestCase
TestDuplicates.settings = settings(
    max_examples=12 if EXHAUSTIVE else 5,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
