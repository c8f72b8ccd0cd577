"""The scenarios of the role `Hypervisor` in which it holds disks at an instant while the guest goes on; part of
`vmsnap.testing.hypervisor`. Of a driver with `freezes` = False they ask only that it refuses.
"""

from __future__ import annotations

import pytest

from vmsnap.errors import CannotCapture, VmsnapError
from vmsnap.model import Disk, FreezePlan, from_json, to_json
from vmsnap.roles import Hypervisor
from vmsnap.testing.rigs import HypervisorRig, digest
from vmsnap.testing.sentences import Scenarios

TAG = "vmsnap-freeze"


class FreezingScenarios(Scenarios):
    """Freezing and thawing."""

    role = "Hypervisor"

    def test_30_frozen_disks_stay_as_they_are_and_what_was_written_meanwhile_comes_to_them(
        self, rig: HypervisorRig
    ) -> None:
        """`plan_freeze`: "What the guest writes to a disk that is held goes elsewhere, so that the disk's own bytes
        stay as they are"; `thaw_disks`: "Bring what the guest wrote meanwhile into its disks, connect it to them, and
        remove all that was made for `plan`"; `freeze_disks`: "failed, or the guest executes"."""
        before, driver = rig.traces(), rig.driver(rig.vm)
        plan = _planned(rig, driver)
        if plan is None:
            return
        driver.prepare_freeze(plan)
        with pytest.raises(VmsnapError):
            driver.freeze_disks(plan)
        driver.thaw_disks(plan)
        rig.eventually(lambda: rig.traces() == before, "nothing is left of a freeze that failed")
        driver.prepare_freeze(plan)
        paused = driver.pause()
        moment = driver.freeze_disks(plan)
        resumed = driver.resume()
        assert paused.monotonic_ns <= moment.monotonic_ns <= resumed.monotonic_ns
        held = [digest(disk.address) for disk in plan.disks]
        for _ in range(2):
            _count_on(rig)
            driver.check_frozen(plan)
        assert [digest(disk.address) for disk in plan.disks] == held
        assert {owned.name for owned in driver.list_owned() if owned.tag == TAG}
        driver.thaw_disks(plan)
        _count_on(rig)
        assert rig.verdict(rig.vm) == ""
        with pytest.raises(VmsnapError):
            driver.check_frozen(plan)
        rig.eventually(lambda: rig.traces() == before, "nothing is left of a freeze")
        assert not [owned for owned in driver.list_owned() if owned.tag == TAG]
        driver.close()

    def test_31_disks_are_thawed_from_any_step_and_by_any_process(self, rig: HypervisorRig) -> None:
        """`thaw_disks`: "whatever of it exists, from whatever step"; "Idempotent, in any process."; all that it needs
        stands in the plan, which was kept as JSON."""
        before, driver = rig.traces(), rig.driver(rig.vm)
        plan = _planned(rig, driver)
        if plan is None:
            return
        for step in ("planned", "prepared", "frozen", "frozen, the guest running"):
            if step != "planned":
                driver.prepare_freeze(plan)
            if step.startswith("frozen"):
                driver.pause()
                driver.freeze_disks(plan)
            if step.endswith("running"):
                driver.resume()
                _count_on(rig)
            driver.close()
            other = rig.driver(rig.vm)
            for _ in range(2):
                other.thaw_disks(from_json(to_json(plan), FreezePlan))
            other.resume()
            _count_on(rig)
            assert rig.verdict(rig.vm) == "", step
            other.close()
            rig.eventually(lambda: rig.traces() == before, f"nothing is left of disks that were {step}")


def _planned(rig: HypervisorRig, driver: Hypervisor) -> FreezePlan | None:
    """A plan for what can be held; None where that is nothing, and the driver says so."""
    disks: list[Disk] = [disk for disk in driver.describe().disks if disk.format == "raw" and not disk.read_only]
    if driver.freezes:
        return driver.plan_freeze(disks, TAG) if disks else None
    with pytest.raises(CannotCapture):
        driver.plan_freeze(disks, TAG)
    return None


def _count_on(rig: HypervisorRig) -> None:
    before = rig.progress(rig.vm)
    rig.eventually(lambda: rig.progress(rig.vm) > before + 2, "the guest counts on")
