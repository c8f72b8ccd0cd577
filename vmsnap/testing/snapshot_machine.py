"""Any sequence of calls on a snapshot mechanism, as Hypothesis makes them up.

::

    class TestMyMachine(SnapshotMachine):
        rig = TestMySnapshots.rig

Several snapshots live at once, as far as `at_once` allows, the disks are written to in between, every step is taken by
a new instance now and then, and whatever is read is what the disks held at the instant. In the end nothing is left.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from vmsnap.model import Window
from vmsnap.roles import SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig, same
from vmsnap.testing.sentences import Scenarios
from vmsnap.testing.snapshot_life import Life, contents_of, scribble

_seeds = itertools.count(1000)


class SnapshotMachine(Scenarios):
    """Needs the fixture `rig` of `vmsnap.testing.snapshot.SnapshotContract`."""

    role = "SnapshotMechanism"
    at_once: ClassVar[int] = 3
    """How many snapshots a VM may have at the same time."""
    examples: ClassVar[int] = 15
    steps: ClassVar[int] = 20

    def test_60_any_sequence_of_calls_gives_what_the_disks_held(self, rig: SnapshotRig) -> None:
        """ "`delete` follows any of them", whatever else lives, and reading gives the instant's content till then."""

        class Machine(_Lives):
            used = rig
            at_once = self.at_once

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=self.steps,
                deadline=None,
                database=None,
                derandomize=True,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )


class _Lives(RuleBasedStateMachine):
    used: ClassVar[SnapshotRig]
    at_once: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.before = self.used.traces()
        self.mechanism = self.used.mechanism()
        self.lives: list[tuple[Life, int]] = []
        self.begun = 0

    def _instance(self, fresh: bool) -> SnapshotMechanism:
        return self.used.mechanism() if fresh else self.mechanism

    @rule(disk=st.integers(0, 1))
    def write(self, disk: int) -> None:
        # never the same twice: the disks outlive an example, and what is tried again must change them again
        scribble(self.used, self.used.disks()[disk], next(_seeds))

    @precondition(lambda self: len(self.lives) < self.at_once)
    @rule(fresh=st.booleans())
    def plan(self, fresh: bool) -> None:
        mechanism = self._instance(fresh)
        self.begun += 1
        plan = mechanism.plan(self.used.vm, self.used.disks(), f"vmsnap-machine-{self.begun}", Window.FREE)
        self.lives.append((Life(mechanism, plan), 0))

    @precondition(lambda self: self.lives)
    @rule(which=st.integers(0, 9), steps=st.integers(1, 4), fresh=st.booleans())
    def go_on(self, which: int, steps: int, fresh: bool) -> None:
        """Take the next steps of one life; mere chance would rarely get one as far as to be read."""
        for _ in range(steps):
            self._step(which % len(self.lives), self._instance(fresh))

    def _step(self, index: int, mechanism: SnapshotMechanism) -> None:
        """Take one step; read where there is none left."""
        life, done = self.lives[index]
        if done == 0:
            mechanism.prepare(life.plan)
        elif done == 1:
            self.used.pause()
            try:
                life.contents = tuple(self.used.content(disk) for disk in life.plan.disks)
                life.snapshots = mechanism.snapshot(life.plan)
            finally:
                self.used.resume()
        elif done == 2:
            mechanism.settle(life.snapshots)
        else:
            assert same(contents_of(mechanism, life), list(life.contents))
        self.lives[index] = (life, done + 1)

    @precondition(lambda self: self.lives)
    @rule(which=st.integers(0, 9), fresh=st.booleans(), twice=st.booleans())
    def delete(self, which: int, fresh: bool, twice: bool) -> None:
        life, _ = self.lives.pop(which % len(self.lives))
        for _ in range(1 + twice):
            life.end(self._instance(fresh))

    def teardown(self) -> None:
        # also what a failure has left is removed, so that Hypothesis can try it again
        try:
            for life, done in self.lives:
                assert done < 3 or same(contents_of(self.mechanism, life), list(life.contents))
        finally:
            for life, _ in self.lives:
                life.end(self.mechanism)
        assert self.used.traces() == self.before and not self.mechanism.list_owned()
