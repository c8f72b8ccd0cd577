"""The scenarios of the role `Hypervisor` in which a VM has failed and another one takes its place; part of
`vmsnap.testing.hypervisor`.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from vmsnap.errors import AlreadyExists, Busy, HypervisorError
from vmsnap.model import VmState
from vmsnap.testing.bringing_back import capture, load, runs_well
from vmsnap.testing.rigs import HypervisorRig
from vmsnap.testing.sentences import Scenarios


class TakingOverScenarios(Scenarios):
    """Fencing, taking a place, showing life."""

    role = "Hypervisor"

    def test_60_a_vm_that_lives_is_not_fenced(self, rig: HypervisorRig) -> None:
        """`fence`: "Busy: it lives, and `kill` was not given", whether its guest executes or stands still."""
        driver = rig.driver(rig.vm)
        with pytest.raises(Busy):
            driver.fence()
        driver.pause()
        with pytest.raises(Busy):
            rig.driver(rig.vm).fence()
        driver.resume()
        before = rig.progress(rig.vm)
        rig.eventually(lambda: rig.progress(rig.vm) > before, "the guest counts on")

    def test_61_a_killed_vm_is_shown_to_be_gone(self, rig: HypervisorRig) -> None:
        """`fence`: "Prove that this VM does not run, and return one line that says how it was shown"; idempotent, by
        any instance."""
        known = rig.driver(rig.vm)
        known.describe()
        rig.kill(rig.vm)
        for driver in (known, rig.driver(rig.vm), known):
            line = driver.fence()
            assert line and "\n" not in line
        assert rig.driver(rig.vm).state() is VmState.ABSENT

    @pytest.mark.parametrize("paused", [False, True])
    def test_62_with_kill_it_is_dead_and_nobody_else_is(self, rig: HypervisorRig, paused: bool) -> None:
        """`fence`: "With `kill` a VM that lives is killed at once, also one that vmsnap did not load, and its end is
        waited for." """
        if paused:
            rig.driver(rig.vm).pause()
        assert "\n" not in rig.driver(rig.vm).fence(kill=True)
        assert rig.driver(rig.vm).state() is VmState.ABSENT
        assert rig.driver(rig.vm).fence(kill=True)
        before = rig.progress(rig.foreign_vm)
        rig.eventually(lambda: rig.progress(rig.foreign_vm) > before, "the other VM goes on")

    def test_63_a_duplicate_takes_the_place_of_a_killed_vm(self, rig: HypervisorRig) -> None:
        """`LoadRequest.takeover`: "it comes up under that one's name, address … and MACs, and what the dead process
        left there … is replaced"; its network is connected."""
        captured = capture(rig)
        rig.kill(rig.vm)
        driver = rig.driver(rig.vm)
        driver.fence()
        loaded = load(rig, rig.vm, replace(captured.request(), takeover=True))
        described = loaded.describe()
        assert loaded.state() is VmState.STOPPED and rig.progress(rig.vm) == captured.progress
        assert [(nic.mac, nic.connected) for nic in described.nics] == [
            (nic.mac, nic.connected) for nic in captured.description.nics
        ]
        assert [disk.address for disk in described.disks] == [disk.address for disk in captured.disks]
        loaded.resume()
        runs_well(rig, rig.vm, captured.progress)
        assert rig.driver(rig.vm, rig.options).state() is VmState.EXECUTING
        loaded.destroy()

    def test_64_the_place_of_a_vm_that_lives_is_not_taken(self, rig: HypervisorRig) -> None:
        """`load`: "AlreadyExists: … with `takeover` one that lives"."""
        captured = capture(rig)
        with pytest.raises(AlreadyExists):
            rig.driver(rig.vm).load(replace(captured.request(), takeover=True))
        runs_well(rig, rig.vm, captured.progress)

    def test_65_life_is_shown_by_a_guest_that_works_and_by_no_other(self, rig: HypervisorRig) -> None:
        """`await_life`: "Wait until the resumed guest has shown life …"; "HypervisorError: it died, faulted, or does
        not execute"."""
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        with pytest.raises(HypervisorError):
            loaded.await_life(0.2)
        loaded.resume()
        line = loaded.await_life(rig.life_seconds)
        assert line and "\n" not in line
        rig.kill("vm002")
        begin = time.monotonic()
        with pytest.raises(HypervisorError):
            loaded.await_life(rig.patience_seconds)
        assert time.monotonic() - begin < rig.patience_seconds
        loaded.destroy()

    def test_66_a_loaded_vm_needs_the_names_of_its_images_no_more(self, rig: HypervisorRig) -> None:
        """`LoadRequest`: "the caller may unlink them once `load` has returned"."""
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        rig.driver(rig.vm).discard_duplicate("bk")
        assert not captured.duplicate.images[0].path.exists()
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        loaded.destroy()
