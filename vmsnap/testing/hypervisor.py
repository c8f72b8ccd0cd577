"""The contract suite of the role `Hypervisor`.

A driver joins by inheriting `HypervisorContract` and giving it one fixture::

    class TestMyHypervisor(HypervisorContract):
        @pytest.fixture
        def rig(self, tmp_path):
            with MyRig(tmp_path) as rig:
                yield rig

Each scenario is a sentence of the contract, which its docstring quotes or says in other words. Scenarios below 30 ask
and capture; those from 30 on hold disks (`vmsnap.testing.freezing`), those from 40 on bring back
(`vmsnap.testing.bringing_back`), those from 60 on take a failed VM's place (`vmsnap.testing.taking_over`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from vmsnap.errors import HypervisorError, UnknownVm, UsageError, VmGone, VmsnapError
from vmsnap.model import CapturePlan, Duplicate, VmDescription, VmState, from_json, to_json
from vmsnap.roles import CaptureRequest, Hypervisor
from vmsnap.testing.bringing_back import BringingBackScenarios
from vmsnap.testing.freezing import FreezingScenarios
from vmsnap.testing.rigs import HypervisorRig, digest
from vmsnap.testing.sentences import Scenarios
from vmsnap.testing.taking_over import TakingOverScenarios

MAX_PAUSE_SECONDS = 5.0
IN_ORDER = ("prepare", "pause", "duplicate", "resume", "finish_duplicate")
CALLS = (*IN_ORDER, "abandon", "discard_duplicate", "describe")


@dataclass
class Session:
    """One capture, taken step by step, any step at any time."""

    driver: Hypervisor
    name: str
    plan: CapturePlan | None = None
    duplicate: Duplicate | None = None
    copied: list[int] = field(default_factory=list)

    @property
    def request(self) -> CaptureRequest:
        """What is asked for."""
        return CaptureRequest(self.name, MAX_PAUSE_SECONDS)

    def step(self, call: str) -> Any:
        """Take one step."""
        if call == "prepare":
            self.plan = self.driver.plan_capture(self.request)
            return self.driver.prepare(self.request, self.plan)
        if call == "duplicate":
            self.duplicate = self.driver.duplicate()
            return self.duplicate
        if call == "finish_duplicate":
            if self.duplicate is not None:
                self.duplicate = self.driver.finish_duplicate(self.duplicate, self.copied.append)
            return self.duplicate
        if call == "discard_duplicate":
            return self.driver.discard_duplicate(self.name)
        return getattr(self.driver, call)()

    def steps(self, *calls: str) -> Session:
        """Take these steps."""
        for call in calls:
            self.step(call)
        return self


STAGES = {
    "nothing": (),
    "prepared": ("prepare",),
    "paused": ("prepare", "pause"),
    "duplicated": ("prepare", "pause", "duplicate"),
    "resumed": ("prepare", "pause", "duplicate", "resume"),
}
"""How far a capture can have come when it is given up."""


def goes_on(rig: HypervisorRig, vm: str) -> None:
    """See the guest count on."""
    before = rig.progress(vm)
    rig.eventually(lambda: rig.progress(vm) > before, f"the guest of {vm} counts on")


def stands_still(rig: HypervisorRig, vm: str) -> None:
    """See the guest not count."""
    before = rig.progress(vm)
    time.sleep(rig.watch_seconds)
    assert rig.progress(vm) == before, f"the guest of {vm} counts while it should stand still"


class AskingScenarios(Scenarios):
    """What can be asked, and that asking changes nothing."""

    role = "Hypervisor"

    def test_01_describe_tells_memory_disks_and_nics_in_a_fixed_order(self, rig: HypervisorRig) -> None:
        """`describe`: "Ask the hypervisor for the definition, memory regions, disks and NICs; disks in the
        hypervisor's own order." """
        driver = rig.driver(rig.vm)
        first, second = driver.describe(), rig.driver(rig.vm).describe()
        assert first.vm == rig.vm and first.hypervisor == driver.name and first.state is VmState.EXECUTING
        assert not first.refusals
        assert 0 < first.memory_bytes <= sum(region.size_bytes for region in first.memory)
        assert first.disks and first.disks == second.disks and first.memory == second.memory
        assert len({disk.device for disk in first.disks}) == len(first.disks)
        assert all(disk.size_bytes > 0 and disk.address for disk in first.disks)

    def test_02_a_vm_that_nobody_has_is_unknown_and_absent(self, rig: HypervisorRig) -> None:
        """ "UnknownVm: no such VM"; `state`: "A VM that is unknown or gone is `ABSENT`, not an error." """
        driver = rig.driver("nobody")
        with pytest.raises(UnknownVm):
            driver.describe()
        assert driver.state() is VmState.ABSENT

    def test_03_the_description_survives_being_kept(self, rig: HypervisorRig) -> None:
        """ "all that a later `load` needs included": it goes through the manifest as JSON."""
        description = rig.driver(rig.vm).describe()
        assert from_json(to_json(description), VmDescription) == description

    def test_04_asking_changes_nothing(self, rig: HypervisorRig) -> None:
        """`doctor`: "Changes nothing."; `plan_capture`: "No side effects on the VM." """
        before = rig.traces()
        for vm in (rig.vm, "nobody"):
            driver = rig.driver(vm)
            for finding in driver.doctor():
                assert finding.severity in ("ok", "note", "missing") and "\n" not in finding.message
            assert set(driver.list_vms()) <= {rig.vm, rig.foreign_vm}
            assert {seen.vm for seen in driver.see_vms()} == set(driver.list_vms())
            driver.list_owned()
            driver.state()
            driver.close()
        driver = rig.driver(rig.vm)
        driver.plan_capture(CaptureRequest("bk", MAX_PAUSE_SECONDS))
        assert rig.traces() == before
        assert driver.state() is VmState.EXECUTING
        goes_on(rig, rig.vm)

    def test_05_a_killed_vm_is_gone(self, rig: HypervisorRig) -> None:
        """ "VmGone: it could not be reached, or ended" (or, where nothing of it is left, UnknownVm)."""
        driver = rig.driver(rig.vm)
        assert driver.state() is VmState.EXECUTING
        rig.kill(rig.vm)
        for instance in (driver, rig.driver(rig.vm)):
            with pytest.raises((VmGone, UnknownVm)):
                instance.describe()
            assert instance.state() is VmState.ABSENT

    def test_06_close_is_idempotent_and_leaves_the_vm(self, rig: HypervisorRig) -> None:
        """`close`: "Let go of the connection; idempotent. The VM and its duplicates stay as they are." """
        driver = rig.driver(rig.vm)
        driver.describe()
        driver.close()
        driver.close()
        goes_on(rig, rig.vm)


class CapturingScenarios(Scenarios):
    """Pausing, duplicating, resuming, giving up."""

    role = "Hypervisor"

    def test_10_pause_stops_the_guest_and_its_disks(self, rig: HypervisorRig) -> None:
        """`pause`: "Stop the vCPUs of a VM that executes"; "no further [write] comes until `resume`"."""
        driver = rig.driver(rig.vm)
        disks = driver.describe().disks
        driver.pause()
        before = [digest(disk.address) for disk in disks]
        stands_still(rig, rig.vm)
        assert [digest(disk.address) for disk in disks] == before, "the disks change while the guest is paused"
        assert driver.state() is VmState.STOPPED
        driver.resume()

    def test_11_pause_leaves_a_stopped_vm_stopped(self, rig: HypervisorRig) -> None:
        """`pause`: "(or leave a stopped one stopped)"."""
        rig.driver(rig.vm).pause()
        rig.driver(rig.vm).pause()
        stands_still(rig, rig.vm)
        assert rig.driver(rig.vm).state() is VmState.STOPPED

    def test_12_what_completed_is_on_the_disks_when_pause_returns(self, rig: HypervisorRig) -> None:
        """**Drained.** "When `pause` returns, every write that the guest saw completed is in its disks' files" """
        driver = rig.driver(rig.vm)
        for _ in range(5):
            driver.pause()
            assert rig.undrained(rig.vm) == ""
            driver.resume()
            goes_on(rig, rig.vm)

    def test_13_moments_are_in_order(self, rig: HypervisorRig) -> None:
        """The evidence of one instant: pause ≤ duplicate ≤ resume, all between the calls, by one clock."""
        session = Session(rig.driver(rig.vm), "bk")
        session.step("prepare")
        begin = time.monotonic_ns()
        stopped = session.step("pause")
        instant = session.step("duplicate").instant
        executing = session.step("resume")
        moments = [begin, stopped.monotonic_ns, instant.monotonic_ns, executing.monotonic_ns, time.monotonic_ns()]
        assert moments == sorted(moments)

    @pytest.mark.parametrize("stage", STAGES)
    def test_14_resume_works_from_every_stage(self, rig: HypervisorRig, stage: str) -> None:
        """**The guest goes on.** "`resume` makes the VM execute from whatever state `prepare`, `pause` or `duplicate`
        left it in", here "called from … another one", and "It is idempotent." """
        Session(rig.driver(rig.vm), "bk").steps(*STAGES[stage])
        for _ in range(3):
            rescuer = rig.driver(rig.vm)
            rescuer.resume()
            assert rescuer.state() is VmState.EXECUTING
            goes_on(rig, rig.vm)
            rescuer.close()

    @pytest.mark.parametrize("stage", STAGES)
    def test_15_a_killed_capture_is_undone_from_another_process(self, rig: HypervisorRig, stage: str) -> None:
        """ "however they ended, called from this process or another one (the guardian's): it first undoes what stands
        in the way"; `abandon`: "also from another process"."""
        before = rig.traces()
        _in_a_process_that_is_killed(lambda: Session(rig.driver(rig.vm), "bk").steps(*STAGES[stage]))
        rescuer = rig.driver(rig.vm)
        rescuer.resume()
        goes_on(rig, rig.vm)
        rescuer.abandon()
        goes_on(rig, rig.vm)
        rig.eventually(lambda: rig.traces() == before, "nothing is left of the killed capture")

    def test_16_a_vm_that_ran_before_the_duplicate_is_no_instant(self, rig: HypervisorRig) -> None:
        """**One instant.** "If the VM ran in between for any other reason, `duplicate` or `resume` raises." """
        session = Session(rig.driver(rig.vm), "bk").steps("prepare", "pause")
        rig.resume_past_driver(rig.vm)
        goes_on(rig, rig.vm)
        with pytest.raises(HypervisorError):
            session.steps("duplicate", "resume")
        session.steps("abandon", "resume")
        goes_on(rig, rig.vm)

    def test_17_a_vm_that_ran_after_the_duplicate_is_no_instant(self, rig: HypervisorRig) -> None:
        """The same after `duplicate`: the disks may be read until `resume`."""
        session = Session(rig.driver(rig.vm), "bk").steps("prepare", "pause", "duplicate")
        rig.resume_past_driver(rig.vm)
        goes_on(rig, rig.vm)
        with pytest.raises(HypervisorError):
            session.step("resume")
        goes_on(rig, rig.vm)

    def test_18_the_images_show_the_paused_instant_although_the_guest_goes_on(self, rig: HypervisorRig) -> None:
        """`duplicate`: "Fix memory, vCPU and device state at this instant, by copy on write"."""
        session = Session(rig.driver(rig.vm), "bk").steps("prepare", "pause")
        paused_at = rig.progress(rig.vm)
        session.steps("duplicate", "resume")
        rig.eventually(lambda: rig.progress(rig.vm) > paused_at + 3, "the guest goes on")
        duplicate = session.step("finish_duplicate")
        assert rig.image_progress(duplicate) in (paused_at, None)
        assert rig.verdict(rig.vm) == ""

    def test_19_a_finished_duplicate_is_complete_and_private(self, rig: HypervisorRig) -> None:
        """`finish_duplicate`: "Wait until the images and the device state are complete"; `Duplicate`: "Everything
        lies under `folder` (0700 …)"."""
        session = Session(rig.driver(rig.vm), "bk").steps("prepare", "pause", "duplicate", "resume")
        duplicate = session.step("finish_duplicate")
        assert session.copied == sorted(session.copied)
        assert duplicate.name == "bk" and duplicate.images
        assert duplicate.folder.stat().st_mode & 0o777 == 0o700
        for path in (duplicate.device_state, *(image.path for image in duplicate.images)):
            assert path.is_relative_to(duplicate.folder) and path.stat().st_mode & 0o077 == 0
        for image in duplicate.images:
            assert image.path.stat().st_size == image.size_bytes
        contents = [digest(image.path) for image in duplicate.images]
        goes_on(rig, rig.vm)
        assert [digest(image.path) for image in duplicate.images] == contents, "it changes after it was finished"
        assert from_json(to_json(duplicate), Duplicate) == duplicate

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("other_instance", [False, True], ids=["same", "other"])
    def test_20_abandon_leaves_nothing_at_any_stage(self, rig: HypervisorRig, stage: str, other_instance: bool) -> None:
        """`abandon`: "Give up a capture at any stage … remove the files of an unfinished duplicate. … Idempotent;
        also from another process." """
        before = rig.traces()
        session = Session(rig.driver(rig.vm), "bk").steps(*STAGES[stage])
        driver = rig.driver(rig.vm) if other_instance else session.driver
        driver.abandon()
        driver.abandon()
        driver.resume()
        goes_on(rig, rig.vm)
        rig.eventually(lambda: rig.traces() == before, "nothing is left of the abandoned capture")

    def test_21_abandon_leaves_the_execution_state_alone(self, rig: HypervisorRig) -> None:
        """`abandon`: "Leaves the execution state alone (`resume` follows where needed)." """
        session = Session(rig.driver(rig.vm), "bk").steps("prepare", "pause", "duplicate")
        if session.driver.state() is VmState.STOPPED:
            session.step("abandon")
            stands_still(rig, rig.vm)
        session.steps("abandon", "resume", "abandon")
        goes_on(rig, rig.vm)

    def test_22_after_an_abandoned_capture_the_next_one_works(self, rig: HypervisorRig) -> None:
        """Giving up leaves the VM as capturable as before, under the same name too."""
        driver = rig.driver(rig.vm)
        for stage in STAGES.values():
            Session(driver, "bk").steps(*stage, "abandon", "resume")
        session = Session(driver, "bk").steps("prepare", "pause")
        paused_at = rig.progress(rig.vm)
        duplicate = session.steps("duplicate", "resume").step("finish_duplicate")
        assert rig.image_progress(duplicate) in (paused_at, None)

    def test_23_a_finished_duplicate_survives_a_later_abandon(self, rig: HypervisorRig) -> None:
        """`abandon` removes "the files of an *unfinished* duplicate"."""
        driver = rig.driver(rig.vm)
        Session(driver, "kept").steps("prepare", "pause", "duplicate", "resume", "finish_duplicate")
        kept = rig.traces()
        Session(driver, "bk").steps("prepare", "pause", "duplicate", "abandon", "resume")
        rig.eventually(lambda: rig.traces() == kept, "the finished duplicate is there, the other is gone")

    def test_24_discard_removes_the_named_duplicate_alone(self, rig: HypervisorRig) -> None:
        """`discard_duplicate`: "Remove the duplicate of that name from host memory; succeeds where there is none." """
        before = rig.traces()
        first = Session(rig.driver(rig.vm), "bk1")
        first.steps("prepare", "pause", "duplicate", "resume", "finish_duplicate")
        only_first = rig.traces()
        Session(rig.driver(rig.vm), "bk2").steps("prepare", "pause", "duplicate", "resume", "finish_duplicate")
        assert {owned.name for owned in rig.driver(rig.vm).list_owned()} >= {"bk1", "bk2"}
        rig.driver(rig.vm).discard_duplicate("bk2")
        rig.driver(rig.vm).discard_duplicate("bk2")
        rig.eventually(lambda: rig.traces() == only_first, "the first is there, the second is gone")
        rig.driver(rig.vm).discard_duplicate("bk1")
        rig.eventually(lambda: rig.traces() == before, "nothing is left")
        assert not list(rig.driver(rig.vm).list_owned())

    def test_25_names_never_leave_their_folder(self, rig: HypervisorRig) -> None:
        """Names from outside are refused, with `UsageError`, before anything is touched."""
        precious = rig.context.memory_dir.parent / f"{rig.context.memory_dir.name}-precious"
        precious.mkdir()
        try:
            for name in (f"../{precious.name}", "/tmp", "..", ".", "a/b", ""):
                with pytest.raises(UsageError):
                    rig.driver(rig.vm).discard_duplicate(name)
            assert precious.is_dir()
        finally:
            precious.rmdir()

    @pytest.mark.parametrize("stage", ["prepared", "paused", "duplicated"])
    def test_26_a_vm_that_dies_during_its_capture_is_gone(self, rig: HypervisorRig, stage: str) -> None:
        """`resume`: "VmGone: there is no VM any more that could execute"; `abandon` still cleans up."""
        session = Session(rig.driver(rig.vm), "bk").steps(*STAGES[stage])
        rig.kill(rig.vm)
        if stage == "paused":
            with pytest.raises(HypervisorError):
                session.step("duplicate")
        with pytest.raises(VmGone):
            session.step("resume")
        session.step("abandon")
        assert not [owned for owned in rig.driver(rig.vm).list_owned() if owned.name == "bk"]

    def test_27_any_order_of_calls_can_be_given_up(self, rig: HypervisorRig) -> None:
        """Whatever was called in whatever order: errors are ours, `abandon` and `resume` make the guest go on, and
        nothing is left."""
        from hypothesis import HealthCheck, example, given, settings
        from hypothesis import strategies as st

        before = rig.traces()
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

        # the right order with calls left out, and others put in: mere chance would rarely get as far as a duplicate
        left_out = st.sets(st.sampled_from(IN_ORDER), max_size=3)
        put_in = st.lists(st.tuples(st.integers(0, len(IN_ORDER)), st.sampled_from(CALLS)), max_size=3)

        @settings(
            max_examples=rig.examples,
            deadline=None,
            suppress_health_check=checks,
            database=None,
            derandomize=True,
        )
        @given(left_out, put_in)
        def try_order(left_out: set[str], put_in: list[tuple[int, str]]) -> None:
            calls = [call for call in IN_ORDER if call not in left_out]
            for position, call in put_in:
                calls.insert(position, call)
            session = Session(rig.driver(rig.vm), "bk")
            for call in calls:
                with contextlib.suppress(VmsnapError):
                    session.step(call)
            for call in ("abandon", "resume", "discard_duplicate"):
                session.step(call)
            session.driver.close()
            goes_on(rig, rig.vm)
            rig.eventually(lambda: rig.traces() == before, f"nothing is left after {calls}")

        for call in IN_ORDER:
            try_order = example({call}, [])(try_order)
        try_order()
        assert rig.verdict(rig.vm) == ""


class HypervisorContract(
    AskingScenarios, CapturingScenarios, FreezingScenarios, BringingBackScenarios, TakingOverScenarios
):
    """All scenarios of the role."""

    @pytest.fixture
    def rig(self) -> HypervisorRig:
        """The driver's rig; to be overridden."""
        raise TypeError(f"{type(self).__name__} has no fixture 'rig'")


def _in_a_process_that_is_killed(work: Any) -> None:
    """Do `work` in a process that dies by SIGKILL as soon as it is done."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the capture failed before the process could be killed"
