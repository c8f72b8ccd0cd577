"""A driver's crash points: the core itself backs up the rig's VM, and its process is killed at each call of the driver.

::

    class TestMyCrashes(HypervisorCrashes):
        rig = TestMyHypervisor.rig

The driver must be installed, since the guardian, in a process of its own, finds it by its entry point.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import pytest

from vmsnap.controller import Controller, Drivers
from vmsnap.host import HostFolders
from vmsnap.places import create_repository, open_repository
from vmsnap.roles import DriverContext, Hypervisor
from vmsnap.testing.faults import Effect, Fault, FaultPlan, FaultyHypervisor
from vmsnap.testing.rigs import HypervisorRig

CALLS = ("plan_capture", "prepare", "pause", "duplicate", "resume", "finish_duplicate")
MAX_PAUSE_SECONDS = 20.0
"""Generous: what is seen is that the guest goes on, and not how soon."""


class _Faulty(Drivers):
    def __init__(self, context: DriverContext, faults: FaultPlan) -> None:
        super().__init__(context)
        self._faults = faults

    def hypervisor(self, name: str, vm: str, options: Mapping[str, str]) -> Hypervisor:
        return FaultyHypervisor(super().hypervisor(name, vm, options), self._faults)


class HypervisorCrashes:
    """Needs the fixture `rig` of `vmsnap.testing.hypervisor.HypervisorContract`."""

    effects: ClassVar[Sequence[Effect]] = (Effect.KILL, Effect.KILL_AFTER)
    """When the process is killed: before the driver is called, after it, or both."""
    mechanisms: ClassVar[Mapping[str, str]] = {}
    """The snapshot mechanism for each disk; without it the first one that handles it."""

    @pytest.mark.parametrize("call", CALLS)
    def test_killed_at_this_call_the_guest_goes_on_and_nothing_is_left(self, rig: HypervisorRig, call: str) -> None:
        """The guardian makes the guest run, recovery removes the rest, the next backup works."""
        folders = HostFolders(state_dir=rig.context.state_dir, memory_dir=rig.context.memory_dir)
        url = str(rig.scratch / "repository")
        create_repository(url)
        with Controller(folders) as controller:
            controller.add_vm(rig.vm, rig.driver(rig.vm).name, rig.options, self.mechanisms)
            controller.backup(rig.vm, open_repository(url), max_pause_seconds=MAX_PAUSE_SECONDS)
        before = _beside_the_core(rig)
        for effect in self.effects:
            plan = FaultPlan(Fault(call, 1, effect))

            def back_up(plan: FaultPlan = plan) -> None:
                with Controller(folders, drivers=_Faulty(folders.context(), plan)) as doomed:
                    doomed.backup(rig.vm, open_repository(url), max_pause_seconds=MAX_PAUSE_SECONDS)

            _see_it_killed(back_up, f"{effect.value} {call}")
            at = rig.progress(rig.vm)
            rig.eventually(lambda at=at: rig.progress(rig.vm) > at, f"the guest goes on after {effect.value} {call}")  # type: ignore[misc]
            with Controller(folders) as controller:
                assert controller.recover().kept == ()
                assert controller.journal.unfinished() == []
                rig.eventually(lambda: _beside_the_core(rig) == before, f"nothing is left after {effect.value} {call}")
                again = controller.backup(rig.vm, open_repository(url), max_pause_seconds=MAX_PAUSE_SECONDS)
            assert not open_repository(url).verify(again.backup).findings
        assert rig.verdict(rig.vm) == ""


def _beside_the_core(rig: HypervisorRig) -> frozenset[str]:
    """The rig's traces without the core's own: its database, its logs and its locks."""
    own = (str(rig.context.state_dir / "vmsnap.db"), str(rig.context.state_dir / "locks"))
    return frozenset(trace for trace in rig.traces() if not trace.startswith(own))


def _see_it_killed(work: Callable[[], object], what: str) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the backup was not killed: {what}"
