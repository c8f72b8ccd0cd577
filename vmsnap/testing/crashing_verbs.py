"""The crash points of the verbs that bring a captured machine to life; part of `vmsnap.testing.crashes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from vmsnap.controller.results import RestoreResult
from vmsnap.model import Disk, VmState
from vmsnap.testing.crashing import MAX_PAUSE_SECONDS, TIMEOUT_SECONDS, CrashStage
from vmsnap.testing.faults import Effect
from vmsnap.testing.rigs import HypervisorRig

RESTORE_CALLS = ("load", "switch_disks", "cut_network", "resume")
"""The calls that carry out a restore."""
RUN_CALLS = ("load", "switch_disks", "cut_network", "resume", "shut_down", "destroy")
"""The calls by which a duplicate is run and shut down."""
FAILOVER_CALLS = ("fence", "load", "switch_disks", "resume")
"""The calls that carry out a failover."""
COPY = "vm002"


class VerbCrashes:
    """A restore, a consistent backup, a consolidation and a failover, each killed at each of its calls.

    Needs the fixture `rig`. The mechanism of the disks must have clones.
    """

    verb_effects: ClassVar[Sequence[Effect]] = (Effect.KILL_AFTER,)
    """When the process is killed: after the driver was called, which nobody had time to note; or before it too."""
    mechanisms: ClassVar[Mapping[str, str]] = {}
    """The snapshot mechanism for each disk; without it the first one that handles it."""

    @pytest.mark.parametrize("call", RESTORE_CALLS)
    def test_a_restore_that_is_killed_leaves_nothing_and_works_again(self, rig: HypervisorRig, call: str) -> None:
        """What was loaded is destroyed and its disks are removed; the guest that was backed up does not notice."""
        stage = CrashStage(rig, self.mechanisms)
        backup, target = stage.back_up().backup, rig.scratch / COPY
        before = stage.beside_the_core()
        for effect in self.verb_effects:
            what = stage.see_it_killed(
                call,
                effect,
                lambda doomed: doomed.restore(stage.repository(), backup, COPY, run=True, isolated=True, target=target),
            )
            stage.recover(what, before)
            assert not target.exists() or list(target.iterdir()) == [], f"disks are left after {what}"
            stage.see_the_guest_go_on(what)
        with stage.controller() as controller:
            restored = controller.restore(stage.repository(), backup, COPY, run=True, isolated=True, target=target)
        _see_it_work(rig, restored)
        assert rig.verdict(rig.vm) == ""

    @pytest.mark.parametrize("call", RUN_CALLS)
    def test_a_consistent_backup_that_is_killed_leaves_nothing_and_works_again(
        self, rig: HypervisorRig, call: str
    ) -> None:
        """The duplicate and its clones are removed; the guest goes on all the while."""
        stage = CrashStage(rig, self.mechanisms)
        stage.back_up()
        before = stage.beside_the_core()
        for effect in self.verb_effects:
            what = stage.see_it_killed(
                call,
                effect,
                lambda doomed: doomed.backup(
                    rig.vm,
                    stage.repository(),
                    mode="consistent",
                    max_pause_seconds=MAX_PAUSE_SECONDS,
                    timeout_seconds=TIMEOUT_SECONDS,
                ),
                # the first one is that of the VM itself
                number=2 if call == "resume" else 1,
            )
            stage.see_the_guest_go_on(what)
            stage.recover(what, before)
        made = stage.back_up(mode="consistent", timeout_seconds=TIMEOUT_SECONDS)
        assert made.mode == "consistent" and not stage.repository().verify(made.backup).findings
        assert rig.verdict(rig.vm) == ""

    @pytest.mark.parametrize("call", RUN_CALLS)
    def test_a_consolidation_that_is_killed_leaves_nothing_and_works_again(self, rig: HypervisorRig, call: str) -> None:
        """No disk of it is taken for a clean one; the next one's are clean."""
        stage = CrashStage(rig, self.mechanisms)
        backup, target = stage.back_up().backup, rig.scratch / "clean"
        before = stage.beside_the_core()
        for effect in self.verb_effects:
            what = stage.see_it_killed(
                call,
                effect,
                lambda doomed: doomed.consolidate(stage.repository(), backup, target, timeout_seconds=TIMEOUT_SECONDS),
            )
            stage.recover(what, before)
            assert not target.exists() or list(target.iterdir()) == [], f"disks are left after {what}"
        with stage.controller() as controller:
            made = controller.consolidate(stage.repository(), backup, target, timeout_seconds=TIMEOUT_SECONDS)
        disks = [Disk(row.device, row.address, Path(row.address).stat().st_size) for row in made.disks]
        assert disks and rig.clean(disks)
        assert rig.verdict(rig.vm) == ""

    @pytest.mark.parametrize("call", FAILOVER_CALLS)
    def test_a_failover_that_is_killed_loses_no_duplicate(self, rig: HypervisorRig, call: str) -> None:
        """Either the duplicate runs in the VM's place after recovery, or it is held as before and the next failover
        works; the guest goes on from the captured instant in both."""
        stage = CrashStage(rig, self.mechanisms)
        for effect in self.verb_effects:
            stage.back_up(keep_duplicate=True)
            rig.kill(rig.vm)
            what = stage.see_it_killed(call, effect, lambda doomed: doomed.failover(rig.vm))
            stage.recover(what)
            with stage.controller() as controller:
                held = controller.duplicates()
                if held:
                    controller.failover(rig.vm)
                else:
                    assert call == "resume", f"the duplicate is lost after {what}"
                assert controller.duplicates() == []
                driver = controller.drivers.hypervisor(rig.driver(rig.vm).name, rig.vm, rig.options)
                assert driver.state() is VmState.EXECUTING
                driver.close()
            stage.see_the_guest_go_on(what)
            assert rig.verdict(rig.vm) == ""
        rig.driver(rig.vm, rig.options).destroy()


def _see_it_work(rig: HypervisorRig, restored: RestoreResult) -> None:
    driver = rig.driver(restored.vm, restored.options)
    at = rig.progress(restored.vm)
    rig.eventually(lambda: rig.progress(restored.vm) > at, "the restored guest counts")
    assert rig.verdict(restored.vm) == ""
    driver.destroy()
