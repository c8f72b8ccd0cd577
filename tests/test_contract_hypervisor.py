"""The contract suite for hypervisors catches drivers that break one sentence of the contract each."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_simulated_contract import SimulatedRig, simulated_rig
from vmsnap.errors import AlreadyExists, HypervisorError, VmGone, VmsnapError
from vmsnap.model import (
    CapturePlan,
    Disk,
    Duplicate,
    Finding,
    FreezePlan,
    Moment,
    Nic,
    OwnedResource,
    VmDescription,
    VmState,
)
from vmsnap.roles import CaptureRequest, LoadedVm, LoadRequest
from vmsnap.testing.hypervisor import HypervisorContract
from vmsnap_drivers.hypervisors.simulated import SimulatedHypervisor, lifecycle, record
from vmsnap_drivers.hypervisors.simulated.duplicates import DuplicateFolder, duplicates_in
from vmsnap_drivers.hypervisors.simulated.layout import PAGE, Slots, read_disk

BAD: list[Any] = []


def caught_by(scenario: str, **arguments: Any) -> Callable[[type[SimulatedHypervisor]], type[SimulatedHypervisor]]:
    """Note which scenario has to catch this driver."""

    def note(driver: type[SimulatedHypervisor]) -> type[SimulatedHypervisor]:
        BAD.append(pytest.param(driver, scenario, arguments, id=f"{driver.__name__}-{scenario[5:7]}"))
        return driver

    return note


@caught_by("test_01_describe_tells_memory_disks_and_nics_in_a_fixed_order")
class DisksInAnyOrder(SimulatedHypervisor):
    turned = False

    def describe(self) -> VmDescription:
        found = super().describe()
        type(self).turned = not self.turned
        return replace(found, disks=found.disks[::-1]) if self.turned else found


@caught_by("test_02_a_vm_that_nobody_has_is_unknown_and_absent")
class UnknownVmIsStopped(SimulatedHypervisor):
    def state(self) -> VmState:
        found = super().state()
        return VmState.STOPPED if found is VmState.ABSENT else found


@caught_by("test_03_the_description_survives_being_kept")
class DefinitionThatCannotBeKept(SimulatedHypervisor):
    def describe(self) -> VmDescription:
        return replace(super().describe(), definition={"path": Path("/")})


@caught_by("test_04_asking_changes_nothing")
class DoctorThatRepairs(SimulatedHypervisor):
    def doctor(self) -> Sequence[Finding]:
        (self.context.state_dir / "repaired").touch()
        return super().doctor()


@caught_by("test_04_asking_changes_nothing")
class PlanThatReserves(SimulatedHypervisor):
    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        (self.context.memory_dir / request.duplicate).mkdir()
        return super().plan_capture(request)


@caught_by("test_05_a_killed_vm_is_gone")
class RemembersTheDescription(SimulatedHypervisor):
    known: VmDescription | None = None

    def describe(self) -> VmDescription:
        try:
            type(self).known = super().describe()
        except VmsnapError:
            if self.known is None:
                raise
        assert self.known is not None
        return self.known

    def state(self) -> VmState:
        with contextlib.suppress(VmsnapError):
            self.describe()
        return super().state()


@caught_by("test_10_pause_stops_the_guest_and_its_disks")
class PauseThatDoesNotStop(SimulatedHypervisor):
    def pause(self) -> Moment:
        moment = super().pause()
        self._call("resume")
        return moment


@caught_by("test_10_pause_stops_the_guest_and_its_disks")
class StateIsAlwaysExecuting(SimulatedHypervisor):
    def state(self) -> VmState:
        super().state()
        return VmState.EXECUTING


@caught_by("test_11_pause_leaves_a_stopped_vm_stopped")
class PauseThatToggles(SimulatedHypervisor):
    def pause(self) -> Moment:
        if self.state() is VmState.STOPPED:
            return self.resume()
        return super().pause()


@caught_by("test_12_what_completed_is_on_the_disks_when_pause_returns")
class PauseThatLeavesWritesInACache(SimulatedHypervisor):
    cached: tuple[int, bytes] = (0, b"")

    def pause(self) -> Moment:
        moment = super().pause()
        disk = self.describe().disks[0]
        content = read_disk(Path(disk.address))
        assert content is not None
        at = Slots.of(disk.size_bytes).offset(content.latest)
        with Path(disk.address).open("r+b") as file:
            file.seek(at)
            self.cached = (at, file.read(PAGE))
            file.seek(at)
            file.write(bytes(PAGE))
        return moment

    def resume(self) -> Moment:
        if self.cached[1]:
            with Path(self.describe().disks[0].address).open("r+b") as file:
                file.seek(self.cached[0])
                file.write(self.cached[1])
        return super().resume()


@caught_by("test_13_moments_are_in_order")
class MomentOfTheAnswer(SimulatedHypervisor):
    def duplicate(self) -> Duplicate:
        found = super().duplicate()
        self.late = Moment.now("late", "simulated")
        return replace(found, instant=replace(self.late, monotonic_ns=self.late.monotonic_ns + 10**9))


@caught_by("test_14_resume_works_from_every_stage", stage="paused")
class ResumeThatDoesNothing(SimulatedHypervisor):
    def resume(self) -> Moment:
        return Moment.now("resume")


@caught_by("test_14_resume_works_from_every_stage", stage="nothing")
class ResumeRefusesAnExecutingVm(SimulatedHypervisor):
    def resume(self) -> Moment:
        if self.state() is VmState.EXECUTING:
            raise HypervisorError("it executes")
        return super().resume()


@caught_by("test_14_resume_works_from_every_stage", stage="duplicated")
@caught_by("test_15_a_killed_capture_is_undone_from_another_process", stage="paused")
class ResumesOnlyWhatItPaused(SimulatedHypervisor):
    def resume(self) -> Moment:
        return super().resume() if self._epoch is not None else Moment.now("resume")


@caught_by("test_15_a_killed_capture_is_undone_from_another_process", stage="duplicated")
@caught_by("test_20_abandon_leaves_nothing_at_any_stage", stage="prepared", other_instance=True)
class AbandonsOnlyItsOwn(SimulatedHypervisor):
    def abandon(self) -> None:
        if self._request is not None:
            super().abandon()


@caught_by("test_16_a_vm_that_ran_before_the_duplicate_is_no_instant")
@caught_by("test_17_a_vm_that_ran_after_the_duplicate_is_no_instant")
class DoesNotCareWhoResumed(SimulatedHypervisor):
    def duplicate(self) -> Duplicate:
        if self.state() is VmState.EXECUTING:
            super().pause()
        return super().duplicate()

    def resume(self) -> Moment:
        self._epoch = None
        return super().resume()


@caught_by("test_18_the_images_show_the_paused_instant_although_the_guest_goes_on")
@caught_by("test_40_a_loaded_vm_stands_at_the_captured_instant_and_goes_on_from_it")
class DuplicateOfALaterInstant(SimulatedHypervisor):
    def duplicate(self) -> Duplicate:
        before = self._call("status")["counter"]
        self._call("resume")
        while self._call("status")["counter"] < before + 2:
            pass
        super().pause()
        return super().duplicate()


@caught_by("test_19_a_finished_duplicate_is_complete_and_private")
class ImagesForEverybody(SimulatedHypervisor):
    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        finished = super().finish_duplicate(duplicate, progress)
        finished.images[0].path.chmod(0o644)
        return finished


@caught_by("test_19_a_finished_duplicate_is_complete_and_private")
class DoesNotWaitForTheCopy(SimulatedHypervisor):
    def duplicate(self) -> Duplicate:
        self._call("inject", call="copy", effect="slow", seconds=0.2)
        return super().duplicate()

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        return duplicate


@caught_by("test_20_abandon_leaves_nothing_at_any_stage", stage="duplicated", other_instance=False)
@caught_by("test_22_after_an_abandoned_capture_the_next_one_works")
class AbandonLeavesFiles(SimulatedHypervisor):
    def abandon(self) -> None:
        self._request, self._epoch = None, None
        self._call("abandon")


@caught_by("test_20_abandon_leaves_nothing_at_any_stage", stage="duplicated", other_instance=False)
class AbandonLeavesTheCopyingProcess(SimulatedHypervisor):
    def duplicate(self) -> Duplicate:
        self._call("inject", call="copy", effect="slow", seconds=30)
        return super().duplicate()

    def abandon(self) -> None:
        self._request, self._epoch = None, None
        for duplicate, _ in duplicates_in(self.context.memory_dir):
            for path in duplicate.path.iterdir():
                path.unlink()
            duplicate.path.rmdir()


@caught_by("test_21_abandon_leaves_the_execution_state_alone")
class AbandonResumes(SimulatedHypervisor):
    def abandon(self) -> None:
        super().abandon()
        super().resume()


@caught_by("test_23_a_finished_duplicate_survives_a_later_abandon")
class AbandonRemovesEverything(SimulatedHypervisor):
    def abandon(self) -> None:
        super().abandon()
        for duplicate, _ in duplicates_in(self.context.memory_dir):
            duplicate.remove(5.0)


@caught_by("test_24_discard_removes_the_named_duplicate_alone")
class DiscardRemovesNeighbours(SimulatedHypervisor):
    def discard_duplicate(self, name: str) -> None:
        for duplicate, _ in duplicates_in(self.context.memory_dir):
            duplicate.remove(5.0)


@caught_by("test_24_discard_removes_the_named_duplicate_alone")
class DiscardInsistsOnSomething(SimulatedHypervisor):
    def discard_duplicate(self, name: str) -> None:
        if not (self.context.memory_dir / name).exists():
            raise HypervisorError("nothing is there")
        super().discard_duplicate(name)


@caught_by("test_25_names_never_leave_their_folder")
class TakesAnyName(SimulatedHypervisor):
    def discard_duplicate(self, name: str) -> None:
        DuplicateFolder(self.context.memory_dir / name).remove(5.0)


@caught_by("test_26_a_vm_that_dies_during_its_capture_is_gone", stage="paused")
class ResumesTheDead(SimulatedHypervisor):
    def resume(self) -> Moment:
        with contextlib.suppress(VmGone):
            return super().resume()
        return Moment.now("resume")


@caught_by("test_27_any_order_of_calls_can_be_given_up")
class ThinksThatFinishedMeansResumed(SimulatedHypervisor):
    finished = False

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        self.finished = True
        return super().finish_duplicate(duplicate, progress)

    def resume(self) -> Moment:
        return Moment.now("resume") if self.finished else super().resume()


@caught_by("test_40_a_loaded_vm_stands_at_the_captured_instant_and_goes_on_from_it")
class LoadThatStarts(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        loaded = super().load(request)
        self._call("resume")
        return loaded


@caught_by("test_41_one_duplicate_can_be_loaded_several_times")
class LoadThatWritesToTheImage(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        loaded = super().load(request)
        with request.images[0].path.open("r+b") as image:
            image.seek(-1, os.SEEK_END)
            image.write(b"x")
        return loaded


@caught_by("test_42_a_finished_duplicate_needs_its_vm_no_more")
class LoadThatAsksTheOriginal(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        SimulatedHypervisor(SimulatedRig.vm, self.context, {}).describe()
        return super().load(request)


@caught_by("test_44_an_existing_vm_is_not_overwritten")
class LoadThatOverwrites(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        try:
            return super().load(request)
        except AlreadyExists:
            lifecycle.end_process(self.socket, 5.0)
            return super().load(request)


@caught_by("test_45_a_load_that_fails_leaves_nothing")
class FailedLoadLeavesSomething(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        (self.context.state_dir / "loading").touch()
        loaded = super().load(request)
        (self.context.state_dir / "loading").unlink()
        return loaded


@caught_by("test_46_a_disk_of_another_vm_is_refused")
class TakesDisksOfOthers(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        return super().load(replace(request, disks=tuple(replace(disk, read_only=True) for disk in _free(request))))


def _free(request: LoadRequest) -> tuple[Disk, ...]:
    """Copies: what a driver would do that does not look at locks."""
    free = []
    for disk in request.disks:
        path = Path(disk.address + ".unlocked")
        path.write_bytes(Path(disk.address).read_bytes())
        free.append(replace(disk, address=str(path)))
    return tuple(free)


@caught_by("test_47_switched_disks_are_the_ones_that_it_writes")
class SwitchThatLies(SimulatedHypervisor):
    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        return tuple(disks)


@caught_by("test_59_switching_to_the_disks_that_it_has_is_no_change")
class SwitchThatFindsItsOwnDisksInUse(SimulatedHypervisor):
    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        if {disk.address for disk in disks} == {disk.address for disk in self.describe().disks}:
            raise HypervisorError(f"{disks[0].address} is in use")
        return super().switch_disks(disks)


@caught_by("test_48_switching_to_a_disk_of_another_vm_is_refused")
class SwitchThatHidesItsFailure(SimulatedHypervisor):
    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        with contextlib.suppress(HypervisorError):
            return super().switch_disks(disks)
        return tuple(disks)


@caught_by("test_49_no_packet_passes_a_cut_network")
class CutThatLies(SimulatedHypervisor):
    cut = False

    def cut_network(self) -> tuple[Nic, ...]:
        type(self).cut = True
        return self.describe().nics

    def describe(self) -> VmDescription:
        found = super().describe()
        nics = tuple(replace(nic, connected=nic.connected and not self.cut) for nic in found.nics)
        return replace(found, nics=nics)


@caught_by("test_50_an_isolated_vm_never_gets_a_packet")
class IsolatesTooLate(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        loaded = super().load(replace(request, isolated=False))
        if request.isolated:
            self._call("resume")
            before = self._call("status")["nic"]["sent"]
            while self._call("status")["nic"]["sent"] == before:
                pass
            self._call("pause")
            self._call("cut_network")
        return loaded


@caught_by("test_50_an_isolated_vm_never_gets_a_packet")
class DoesNotIsolate(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        return super().load(replace(request, isolated=False))


@caught_by("test_51_an_orderly_shutdown_leaves_clean_disks")
class PullsThePlug(SimulatedHypervisor):
    def shut_down(self, timeout_seconds: float) -> None:
        lifecycle.end_process(self.socket, timeout_seconds)


@caught_by("test_52_a_guest_that_does_not_shut_down_is_given_up")
class DoesNotWaitForTheShutdown(SimulatedHypervisor):
    def shut_down(self, timeout_seconds: float) -> None:
        self._call("shut_down")


@caught_by("test_53_a_guest_that_dies_has_not_shut_down")
class TakesDeathForShutdown(SimulatedHypervisor):
    def shut_down(self, timeout_seconds: float) -> None:
        with contextlib.suppress(VmGone):
            super().shut_down(timeout_seconds)


@caught_by("test_54_destroy_removes_all_but_the_disks_and_is_idempotent")
class DestroyLeavesFiles(SimulatedHypervisor):
    def destroy(self) -> None:
        found = record.read(self.socket)
        if found is not None and record.alive(self.socket):
            os.kill(found.pid, signal.SIGKILL)


@caught_by("test_54_destroy_removes_all_but_the_disks_and_is_idempotent")
class DestroyRemovesDisks(SimulatedHypervisor):
    def destroy(self) -> None:
        with contextlib.suppress(VmsnapError):
            for disk in self.describe().disks:
                Path(disk.address).unlink()
        super().destroy()


@caught_by("test_55_a_vm_that_it_did_not_load_is_not_destroyed")
class DestroysAnything(SimulatedHypervisor):
    def destroy(self) -> None:
        lifecycle.end_process(self.socket, 5.0)


@caught_by("test_56_a_loaded_vm_outlives_who_loaded_it")
class DiesWithItsCaller(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        loaded = super().load(request)
        if os.getppid() == RIG_PROCESS:
            lifecycle.end_process(self.socket, 5.0)
        return loaded


RIG_PROCESS = os.getpid()


@caught_by("test_57_what_is_owned_is_listed")
class OwnsNothing(SimulatedHypervisor):
    def list_owned(self) -> Sequence[OwnedResource]:
        return ()


@caught_by("test_60_a_vm_that_lives_is_not_fenced")
class FencesAnything(SimulatedHypervisor):
    def fence(self, *, kill: bool = False) -> str:
        return "it is surely dead"


@caught_by("test_60_a_vm_that_lives_is_not_fenced")
class TakesStandingStillForDeath(SimulatedHypervisor):
    def fence(self, *, kill: bool = False) -> str:
        return "it stands still" if self.state() is VmState.STOPPED else super().fence(kill=kill)


@caught_by("test_61_a_killed_vm_is_shown_to_be_gone")
class NeverSure(SimulatedHypervisor):
    def fence(self, *, kill: bool = False) -> str:
        if not kill:
            self.describe()
        return super().fence(kill=kill)


@caught_by("test_62_with_kill_it_is_dead_and_nobody_else_is", paused=False)
class KillsOnlyWhatItLoaded(SimulatedHypervisor):
    def fence(self, *, kill: bool = False) -> str:
        if kill:
            self.destroy()
        return super().fence()


@caught_by("test_62_with_kill_it_is_dead_and_nobody_else_is", paused=True)
class KillsAll(SimulatedHypervisor):
    def fence(self, *, kill: bool = False) -> str:
        for vm in self.list_vms() if kill else ():
            lifecycle.kill_process(lifecycle.socket_of(self.context.state_dir, vm), 5.0)
        return super().fence(kill=kill)


@caught_by("test_63_a_duplicate_takes_the_place_of_a_killed_vm")
class TakesThePlaceUnplugged(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        return super().load(replace(request, isolated=request.isolated or request.takeover))


@caught_by("test_63_a_duplicate_takes_the_place_of_a_killed_vm")
class TakesThePlaceWithANewMac(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        nic = {**request.definition["nic"], "mac": "52:54:00:00:00:00"}
        return super().load(replace(request, definition={**request.definition, "nic": nic}))


@caught_by("test_63_a_duplicate_takes_the_place_of_a_killed_vm")
class StumblesOverStaleSockets(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        if self.socket.exists():
            raise HypervisorError(f"{self.socket} exists")
        return super().load(request)


@caught_by("test_64_the_place_of_a_vm_that_lives_is_not_taken")
class TakesAnyPlace(SimulatedHypervisor):
    def load(self, request: LoadRequest) -> LoadedVm:
        if request.takeover:
            lifecycle.kill_process(self.socket, 5.0)
        return super().load(request)


@caught_by("test_65_life_is_shown_by_a_guest_that_works_and_by_no_other")
class SeesLifeEverywhere(SimulatedHypervisor):
    def await_life(self, seconds: float) -> str:
        with contextlib.suppress(HypervisorError):
            return super().await_life(seconds)
        return "it breathes"


@caught_by("test_66_a_loaded_vm_needs_the_names_of_its_images_no_more")
class LooksAtTheImagesAgain(SimulatedHypervisor):
    def resume(self) -> Moment:
        found = record.read(self.socket)
        if found is not None and found.loaded and not list(duplicates_in(self.context.memory_dir)):
            raise HypervisorError("the images are gone")
        return super().resume()


@caught_by("test_30_frozen_disks_stay_as_they_are_and_what_was_written_meanwhile_comes_to_them")
class FreezeThatDoesNothing(SimulatedHypervisor):
    def freeze_disks(self, plan: FreezePlan) -> Moment:
        if self.state() is VmState.EXECUTING:
            raise HypervisorError("it executes")
        return Moment.now("freeze")

    def check_frozen(self, plan: FreezePlan) -> None:
        if not Path(plan.data["files"][0]).exists():
            raise HypervisorError("it is thawed")


@caught_by("test_30_frozen_disks_stay_as_they_are_and_what_was_written_meanwhile_comes_to_them")
class ThawThatDropsWhatWasWritten(SimulatedHypervisor):
    def thaw_disks(self, plan: FreezePlan) -> None:
        self.pause()
        for name in plan.data["files"]:
            if Path(name).exists():
                with Path(name).open("r+b") as file:
                    size_bytes = file.seek(0, os.SEEK_END)
                    file.truncate(0)
                    file.truncate(size_bytes)
        super().thaw_disks(plan)
        self._call("check")  # the guest misses its last record only until it writes the next
        self.resume()


@caught_by("test_31_disks_are_thawed_from_any_step_and_by_any_process")
class ThawsOnlyItsOwn(SimulatedHypervisor):
    own = False

    def prepare_freeze(self, plan: FreezePlan) -> None:
        self.own = True
        super().prepare_freeze(plan)

    def thaw_disks(self, plan: FreezePlan) -> None:
        if self.own:
            super().thaw_disks(plan)


@pytest.mark.parametrize(("driver", "scenario", "arguments"), BAD)
def test_the_suite_catches(driver: type[SimulatedHypervisor], scenario: str, arguments: dict[str, Any]) -> None:
    for rig in simulated_rig(driver):
        rig.patience_seconds = 0.5
        with pytest.raises((AssertionError, VmsnapError, OSError, TypeError, pytest.fail.Exception)):
            getattr(HypervisorContract(), scenario)(rig, **arguments)


def test_every_scenario_catches_somebody() -> None:
    """Scenarios that no bad driver is for have a reason here."""
    others = {
        "test_06_close_is_idempotent_and_leaves_the_vm": "said by every other scenario too, as instances are dropped",
        "test_43_the_guest_tells_disks_of_another_instant": "tests the oracle",
        "test_58_a_loaded_vm_can_be_captured_in_turn": "test 18 and 40 once more, on a loaded VM",
    }
    scenarios = {name for name in dir(HypervisorContract) if name.startswith("test_")}
    assert scenarios - {param.values[1] for param in BAD} == set(others)
