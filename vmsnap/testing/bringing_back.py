"""The scenarios of the role `Hypervisor` that bring a duplicate back; part of `vmsnap.testing.hypervisor`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import pytest

from vmsnap.errors import AlreadyExists, HypervisorError
from vmsnap.model import Disk, Duplicate, VmDescription, VmState
from vmsnap.roles import CaptureRequest, Hypervisor, LoadedVm, LoadRequest
from vmsnap.testing.rigs import HypervisorRig, digest
from vmsnap.testing.sentences import Scenarios


@dataclass(frozen=True)
class Captured:
    """A whole capture: RAM, and copies of the disks that were made in the same pause."""

    description: VmDescription
    duplicate: Duplicate
    disks: tuple[Disk, ...]
    progress: int

    def request(self, disks: tuple[Disk, ...] | None = None, *, isolated: bool = False) -> LoadRequest:
        """What `load` takes."""
        return LoadRequest(
            definition=self.description.definition,
            images=self.duplicate.images,
            device_state=self.duplicate.device_state,
            disks=self.disks if disks is None else disks,
            isolated=isolated,
            details=self.duplicate.details,
        )


def capture(rig: HypervisorRig, name: str = "bk") -> Captured:
    """Capture the rig's VM, as the core does."""
    driver = rig.driver(rig.vm)
    description = driver.describe()
    request = CaptureRequest(name, 60.0)
    driver.prepare(request, driver.plan_capture(request))
    driver.pause()
    try:
        progress = rig.progress(rig.vm)
        disks = rig.copy_disks(description.disks, f"{name}-disks")
        duplicate = driver.duplicate()
    finally:
        driver.resume()
    return Captured(description, driver.finish_duplicate(duplicate, lambda _: None), disks, progress)


def load(rig: HypervisorRig, vm: str, request: LoadRequest) -> Hypervisor:
    """Load, and return a new instance that reaches the VM by the options that `load` gave."""
    loaded = rig.driver(vm).load(request)
    assert loaded.vm == vm
    return rig.driver(vm, loaded.options)


def runs_well(rig: HypervisorRig, vm: str, beyond: int) -> None:
    """See the guest count beyond a number with RAM and disks in agreement."""
    rig.eventually(lambda: rig.verdict(vm) != "" or rig.progress(vm) > beyond + 3, f"{vm} counts beyond {beyond}")
    assert rig.verdict(vm) == ""


class BringingBackScenarios(Scenarios):
    """Loading, switching disks, cutting the network, ending."""

    role = "Hypervisor"

    def test_40_a_loaded_vm_stands_at_the_captured_instant_and_goes_on_from_it(self, rig: HypervisorRig) -> None:
        """`load`: "Make this instance's VM exist, stopped at the captured instant, on the disks of the request." """
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request())
        assert loaded.state() is VmState.STOPPED
        time.sleep(rig.watch_seconds)
        assert rig.progress("vm002") == captured.progress
        original = rig.progress(rig.vm)
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        runs_well(rig, rig.vm, original)
        described = loaded.describe()
        assert [(disk.device, disk.address) for disk in described.disks] == [
            (disk.device, disk.address) for disk in captured.disks
        ]
        loaded.destroy()

    def test_41_one_duplicate_can_be_loaded_several_times(self, rig: HypervisorRig) -> None:
        """ "the files are left as they are, and may be shared by several loads"."""
        captured = capture(rig)
        before = [digest(image.path) for image in captured.duplicate.images]
        copies = [rig.copy_disks(captured.disks, f"copy{index}") for index in range(3)]
        drivers = [
            load(rig, f"copy{index}", captured.request(disks, isolated=True)) for index, disks in enumerate(copies)
        ]
        for index, driver in enumerate(drivers):
            assert rig.progress(f"copy{index}") == captured.progress
            driver.resume()
        for index, driver in enumerate(drivers):
            runs_well(rig, f"copy{index}", captured.progress)
            driver.destroy()
        assert [digest(image.path) for image in captured.duplicate.images] == before

    def test_42_a_finished_duplicate_needs_its_vm_no_more(self, rig: HypervisorRig) -> None:
        """`finish_duplicate`: "After it the duplicate needs the VM no more." """
        captured = capture(rig)
        rig.kill(rig.vm)
        loaded = load(rig, "vm002", captured.request())
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        loaded.destroy()

    def test_43_the_guest_tells_disks_of_another_instant(self, rig: HypervisorRig) -> None:
        """The oracle itself: RAM of one instant on disks of a later one is found by the guest."""
        captured = capture(rig)
        rig.eventually(lambda: rig.progress(rig.vm) > captured.progress + 5, "the guest goes on")
        driver = rig.driver(rig.vm)
        driver.pause()
        later = rig.copy_disks(captured.description.disks, "later")
        driver.resume()
        loaded = load(rig, "vm002", captured.request(later, isolated=True))
        loaded.resume()
        rig.eventually(lambda: rig.verdict("vm002") != "", "the guest finds RAM and disks of different instants")
        loaded.destroy()

    def test_44_an_existing_vm_is_not_overwritten(self, rig: HypervisorRig) -> None:
        """`load`: "AlreadyExists: a VM of that name (or at that address) exists"."""
        captured = capture(rig)
        with pytest.raises(AlreadyExists):
            rig.driver(rig.vm).load(captured.request())
        runs_well(rig, rig.vm, captured.progress)
        loaded = load(rig, "vm002", captured.request())
        with pytest.raises(AlreadyExists):
            load(rig, "vm002", captured.request(rig.copy_disks(captured.disks, "again")))
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        loaded.destroy()

    def test_45_a_load_that_fails_leaves_nothing(self, rig: HypervisorRig) -> None:
        """`load`: "All or nothing. … HypervisorError: it did not come up; nothing of it is left"."""
        captured = capture(rig)
        before = rig.traces()
        request = captured.request()
        nowhere = replace(captured.disks[0], address=str(rig.scratch / "nowhere"))
        bad = [
            replace(request, disks=(nowhere, *captured.disks[1:])),
            replace(request, disks=captured.disks[:-1]),
            replace(request, device_state=rig.scratch / "nowhere"),
            replace(request, images=tuple(replace(i, path=rig.scratch / "nowhere") for i in request.images)),
        ]
        for wrong in bad:
            with pytest.raises(HypervisorError):
                rig.driver("vm002").load(wrong)
            rig.eventually(lambda: rig.traces() == before, "nothing is left of the load that failed")
            assert rig.driver("vm002").state() is VmState.ABSENT

    def test_46_a_disk_of_another_vm_is_refused(self, rig: HypervisorRig) -> None:
        """`LoadRequest`: "none of them may belong to another VM"."""
        captured = capture(rig)
        before = rig.traces()
        for disks in (captured.description.disks, (captured.description.disks[0], *captured.disks[1:])):
            with pytest.raises(HypervisorError):
                rig.driver("vm002").load(captured.request(disks))
            rig.eventually(lambda: rig.traces() == before, "nothing is left of the refused load")
        runs_well(rig, rig.vm, captured.progress)

    def test_47_switched_disks_are_the_ones_that_it_writes(self, rig: HypervisorRig) -> None:
        """`switch_disks`: "Connect the loaded, stopped VM to `disks`, and ask the hypervisor afterwards"."""
        captured = capture(rig)
        own = rig.copy_disks(captured.disks, "own")
        loaded = load(rig, "vm002", captured.request(isolated=True))
        switched = loaded.switch_disks(own)
        assert [(disk.device, disk.address) for disk in switched] == [(disk.device, disk.address) for disk in own]
        assert loaded.describe().disks == switched
        before = [digest(disk.address) for disk in captured.disks]
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        loaded.pause()
        assert [digest(disk.address) for disk in captured.disks] == before, "it writes to the disks it had before"
        assert all(digest(new.address) != old for new, old in zip(own, before, strict=True))
        loaded.destroy()

    def test_48_switching_to_a_disk_of_another_vm_is_refused(self, rig: HypervisorRig) -> None:
        """**The original is out of reach**: no duplicate gets a disk that a VM has."""
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        with pytest.raises(HypervisorError):
            loaded.switch_disks(captured.description.disks)
        with pytest.raises(HypervisorError):
            loaded.switch_disks(captured.disks[:-1])
        assert [disk.address for disk in loaded.describe().disks] == [disk.address for disk in captured.disks]
        runs_well(rig, rig.vm, captured.progress)
        loaded.destroy()

    def test_49_no_packet_passes_a_cut_network(self, rig: HypervisorRig) -> None:
        """`cut_network`: "Let no packet pass between the VM and anything else, … and return the NICs, none
        connected."; idempotent."""
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request())
        if rig.packets("vm002") is None:
            pytest.skip("the rig's guest has no network")
        loaded.resume()
        rig.eventually(lambda: _sent(rig, "vm002") > 0 and _heard(rig, "vm002") > 0, "frames pass before the cut")
        for _ in range(2):
            nics = loaded.cut_network()
            assert nics and not any(nic.connected for nic in nics)
        assert not any(nic.connected for nic in loaded.describe().nics)
        rig.eventually(lambda: _silent(rig), "no frame passes after the cut")
        loaded.destroy()

    def test_50_an_isolated_vm_never_gets_a_packet(self, rig: HypervisorRig) -> None:
        """`LoadRequest.isolated`: from its first instant on, no packet in or out."""
        captured = capture(rig)
        heard = rig.packets(rig.foreign_vm)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        assert not any(nic.connected for nic in loaded.describe().nics)
        assert rig.progress("vm002") == captured.progress, "it ran before it was isolated"
        if heard is None:
            pytest.skip("the rig's guest has no network")
        already = rig.packets("vm002")
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        now = rig.packets("vm002")
        assert already is not None and now is not None
        assert now.received == already.received, "the isolated guest heard a frame"
        loaded.destroy()

    def test_51_an_orderly_shutdown_leaves_clean_disks(self, rig: HypervisorRig) -> None:
        """`shut_down`: "Ask the guest to shut down in order, and wait until it has." """
        captured = capture(rig)
        assert not rig.clean(captured.disks)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        loaded.shut_down(60.0)
        assert loaded.state() in (VmState.ENDED, VmState.ABSENT)
        assert rig.clean(captured.disks)
        loaded.destroy()

    def test_52_a_guest_that_does_not_shut_down_is_given_up(self, rig: HypervisorRig) -> None:
        """`shut_down`: "HypervisorError: the guest did not end in time"."""
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        loaded.resume()
        rig.ignore_shutdown("vm002")
        begin = time.monotonic()
        with pytest.raises(HypervisorError):
            loaded.shut_down(0.3)
        assert time.monotonic() - begin < 30.0
        assert loaded.state() is VmState.EXECUTING
        loaded.destroy()

    def test_53_a_guest_that_dies_has_not_shut_down(self, rig: HypervisorRig) -> None:
        """`shut_down`: "or ended in another way"."""
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        loaded.resume()
        rig.kill("vm002")
        with pytest.raises(HypervisorError):
            loaded.shut_down(5.0)
        loaded.destroy()

    def test_54_destroy_removes_all_but_the_disks_and_is_idempotent(self, rig: HypervisorRig) -> None:
        """`destroy`: "End a VM that `load` made, at once, and remove what `load` made for it (not its disks)." """
        captured = capture(rig)
        before = rig.traces()
        for killed in (False, True):
            loaded = load(rig, "vm002", captured.request())
            assert rig.traces() != before, "the oracle does not see a loaded VM"
            if killed:
                rig.kill("vm002")
            loaded.destroy()
            loaded.destroy()
            rig.eventually(lambda: rig.traces() == before, "nothing is left of the destroyed VM")
            assert loaded.state() is VmState.ABSENT
        assert all(os.access(disk.address, os.R_OK) for disk in captured.disks)

    def test_55_a_vm_that_it_did_not_load_is_not_destroyed(self, rig: HypervisorRig) -> None:
        """`destroy`: "Refuses VMs that it did not load, with `HypervisorError`." """
        for vm in (rig.vm, rig.foreign_vm):
            with pytest.raises(HypervisorError):
                rig.driver(vm).destroy()
            before = rig.progress(vm)
            rig.eventually(lambda vm=vm, before=before: rig.progress(vm) > before, f"{vm} goes on")  # type: ignore[misc]

    def test_56_a_loaded_vm_outlives_who_loaded_it(self, rig: HypervisorRig) -> None:
        """ "Loaded VMs are processes of their own that outlive the caller." """
        captured = capture(rig)
        loaded = _load_in_another_process(rig, captured.request())
        driver = rig.driver("vm002", loaded.options)
        assert driver.state() is VmState.STOPPED
        driver.resume()
        runs_well(rig, "vm002", captured.progress)
        driver.destroy()

    def test_57_what_is_owned_is_listed(self, rig: HypervisorRig) -> None:
        """`list_owned`: "everything of this driver on this host that carries our tag: duplicates, loaded VMs"."""
        assert not list(rig.driver(rig.vm).list_owned())
        captured = capture(rig, "bk")
        loaded = load(rig, "vm002", captured.request())
        owned = rig.driver("vm002", {}).list_owned()
        assert {entry.name for entry in owned} >= {"bk", "vm002"}
        assert not {entry.name for entry in owned} & {rig.vm, rig.foreign_vm}
        assert all(entry.driver == loaded.name and entry.tag and entry.kind for entry in owned)
        loaded.destroy()
        rig.driver(rig.vm).discard_duplicate("bk")
        assert not list(rig.driver(rig.vm).list_owned())

    def test_58_a_loaded_vm_can_be_captured_in_turn(self, rig: HypervisorRig) -> None:
        """A loaded VM is a VM: its capture can be loaded again."""
        first = capture(rig, "bk1")
        loaded = load(rig, "vm002", first.request(isolated=True))
        loaded.resume()
        runs_well(rig, "vm002", first.progress)
        request = CaptureRequest("bk2", 60.0)
        loaded.prepare(request, loaded.plan_capture(request))
        loaded.pause()
        progress = rig.progress("vm002")
        description = loaded.describe()
        disks = rig.copy_disks(description.disks, "second")
        duplicate = loaded.duplicate()
        loaded.resume()
        second = Captured(description, loaded.finish_duplicate(duplicate, lambda _: None), disks, progress)
        again = load(rig, "vm003", second.request(isolated=True))
        assert rig.progress("vm003") == progress
        again.resume()
        runs_well(rig, "vm003", progress)
        again.destroy()
        loaded.destroy()

    def test_59_switching_to_the_disks_that_it_has_is_no_change(self, rig: HypervisorRig) -> None:
        """`switch_disks`: "returns the disks as it has them now"; a restore loads a VM on its disks, and asks so."""
        captured = capture(rig)
        loaded = load(rig, "vm002", captured.request(isolated=True))
        switched = loaded.switch_disks(captured.disks)
        assert [(disk.device, disk.address) for disk in switched] == [
            (disk.device, disk.address) for disk in captured.disks
        ]
        assert loaded.state() is VmState.STOPPED and rig.progress("vm002") == captured.progress
        loaded.resume()
        runs_well(rig, "vm002", captured.progress)
        loaded.destroy()


def _sent(rig: HypervisorRig, vm: str) -> int:
    packets = rig.packets(vm)
    return packets.sent if packets is not None else 0


def _heard(rig: HypervisorRig, vm: str) -> int:
    packets = rig.packets(vm)
    return packets.received if packets is not None else 0


def _silent(rig: HypervisorRig) -> bool:
    """Whether the cut VM sent and heard nothing over a while in which the others did."""
    before, others = rig.packets("vm002"), _sent(rig, rig.foreign_vm)
    time.sleep(rig.watch_seconds)
    rig.eventually(lambda: _sent(rig, rig.foreign_vm) > others + 3, "the others go on sending")
    return rig.packets("vm002") == before


def _load_in_another_process(rig: HypervisorRig, request: LoadRequest) -> LoadedVm:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            loaded = rig.driver("vm002").load(request)
            os.write(writing, "\n".join(f"{key}={value}" for key, value in loaded.options.items()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    text = os.read(reading, 65536).decode()
    os.close(reading)
    assert os.waitstatus_to_exitcode(status) == 0, "the load in another process failed"
    return LoadedVm("vm002", dict(line.split("=", 1) for line in text.splitlines()))
