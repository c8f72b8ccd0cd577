"""A driver's crash points: the core works with the rig's VM, and its process is killed at each call of the driver.

::

    class TestMyCrashes(HypervisorCrashes):
        rig = TestMyHypervisor.rig

The driver must be installed, since the guardian, in a process of its own, finds it by its entry point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from vmsnap.testing.crashing import MAX_PAUSE_SECONDS, CrashStage
from vmsnap.testing.crashing_verbs import VerbCrashes
from vmsnap.testing.faults import Effect
from vmsnap.testing.rigs import HypervisorRig

CALLS = ("plan_capture", "prepare", "pause", "duplicate", "resume", "finish_duplicate")
"""The calls that carry out a live backup."""


class HypervisorCrashes(VerbCrashes):
    """Needs the fixture `rig` of `vmsnap.testing.hypervisor.HypervisorContract`."""

    effects: ClassVar[Sequence[Effect]] = (Effect.KILL, Effect.KILL_AFTER)
    """When the process of a live backup is killed: before the driver is called, after it, or both."""

    @pytest.mark.parametrize("call", CALLS)
    def test_killed_at_this_call_the_guest_goes_on_and_nothing_is_left(self, rig: HypervisorRig, call: str) -> None:
        """The guardian makes the guest run, recovery removes the rest, the next backup works."""
        stage = CrashStage(rig, self.mechanisms)
        stage.back_up()
        before = stage.beside_the_core()
        for effect in self.effects:
            what = stage.see_it_killed(
                call,
                effect,
                lambda doomed: doomed.backup(rig.vm, stage.repository(), max_pause_seconds=MAX_PAUSE_SECONDS),
            )
            stage.see_the_guest_go_on(what)
            stage.recover(what, before)
            again = stage.back_up()
            assert not stage.repository().verify(again.backup).findings
        assert rig.verdict(rig.vm) == ""
