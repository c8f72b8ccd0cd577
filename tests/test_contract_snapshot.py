"""The contract suite for snapshot mechanisms catches mechanisms that break one sentence of the contract each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.test_file_mechanism import FileRig
from vmsnap.errors import SnapshotError, VmsnapError
from vmsnap.model import (
    ClonePlan,
    Disk,
    DiskSnapshot,
    Extent,
    Finding,
    Moment,
    OwnedResource,
    SnapshotPlan,
    Window,
)
from vmsnap.roles.filereader import FileReader
from vmsnap.testing.snapshot import SnapshotContract
from vmsnap_drivers.snapshots.file import FileMechanism

BAD: list[Any] = []


def caught_by(scenario: str, **arguments: Any) -> Callable[[type[FileMechanism]], type[FileMechanism]]:
    """Note which scenario has to catch this mechanism."""

    def note(driver: type[FileMechanism]) -> type[FileMechanism]:
        BAD.append(pytest.param(driver, scenario, arguments, id=f"{driver.__name__}-{scenario[5:7]}"))
        return driver

    return note


def files(plan: SnapshotPlan) -> list[Path]:
    return [Path(name) for name in plan.data["files"]]


@caught_by("test_01_handles_its_disks_and_no_others")
class HandlesAnything(FileMechanism):
    def handles(self, disk: Disk) -> bool:
        return True


@caught_by("test_01_handles_its_disks_and_no_others")
class HandlesByTrying(FileMechanism):
    def handles(self, disk: Disk) -> bool:
        return super().handles(disk) and bool(Path(disk.address + ".trial").write_text("x"))


@caught_by("test_02_a_plan_has_no_side_effects")
class PlanThatCreates(FileMechanism):
    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        found = super().plan(vm, disks, tag, window)
        files(found)[0].touch()
        return found

    def prepare(self, plan: SnapshotPlan) -> None:
        files(plan)[0].unlink()
        super().prepare(plan)


@caught_by("test_03_everything_survives_being_kept")
class PlanThatCannotBeKept(FileMechanism):
    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        found = super().plan(vm, disks, tag, window)
        return replace(found, data={**found.data, "folder": Path("/")})


@caught_by("test_04_every_name_that_is_made_carries_the_tag")
@caught_by("test_31_a_killed_process_leaves_nothing_that_delete_does_not_remove", step="prepare")
class OwnsNothing(FileMechanism):
    def list_owned(self) -> Sequence[OwnedResource]:
        return ()


@caught_by("test_05_doctor_changes_nothing")
class DoctorThatTries(FileMechanism):
    def doctor(self) -> Sequence[Finding]:
        (self.context.state_dir.parent / "trial").touch()
        return super().doctor()


@caught_by("test_10_a_snapshot_is_what_the_disks_held_at_the_instant")
class ContentOfALaterInstant(FileMechanism):
    def settle(self, snapshots: Sequence[DiskSnapshot]) -> None:
        for snapshot in snapshots:
            Path(snapshot.data["file"]).write_bytes(Path(snapshot.disk.address).read_bytes())


@caught_by("test_11_what_was_written_between_prepare_and_snapshot_is_in")
@caught_by("test_12_several_disks_show_one_instant")
class ContentOfAnEarlierInstant(FileMechanism):
    def prepare(self, plan: SnapshotPlan) -> None:
        super().prepare(plan)
        for disk, path in zip(plan.disks, files(plan), strict=True):
            path.write_bytes(Path(disk.address).read_bytes())

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        return tuple(
            DiskSnapshot(plan, disk, Moment.now("snapshot"), {"file": str(path), "way": "copy"})
            for disk, path in zip(plan.disks, files(plan), strict=True)
        )


@caught_by("test_13_moments_lie_between_call_and_return")
class MomentOfThePlan(FileMechanism):
    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        self.planned = Moment.now("plan")
        return super().plan(vm, disks, tag, window)

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        return tuple(replace(snapshot, instant=self.planned) for snapshot in super().snapshot(plan))


@caught_by("test_14_the_disks_are_not_changed")
class MarksTheOriginal(FileMechanism):
    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        taken = super().snapshot(plan)
        with Path(plan.disks[0].address).open("r+b") as image:
            image.write(b"marked")
        return taken


class GapReader(FileReader):
    def extents(self) -> Iterator[Extent]:
        for index, extent in enumerate(super().extents()):
            if index != 1:
                yield extent


class FalseZeroReader(FileReader):
    def extents(self) -> Iterator[Extent]:
        for extent in super().extents():
            yield replace(extent, zero=True)


class OverlapReader(FileReader):
    def extents(self) -> Iterator[Extent]:
        yield Extent(0, 4096)
        yield from super().extents()


class EarlyEndReader(FileReader):
    def extents(self) -> Iterator[Extent]:
        found = list(super().extents())
        yield from [*found[:-1], replace(found[-1], length=found[-1].length - 4096)]


class OnceReader(FileReader):
    asked = False

    def extents(self) -> Iterator[Extent]:
        if not self.asked:
            self.asked = True
            yield from super().extents()


class ShortReader(FileReader):
    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer[: (len(buffer) + 1) // 2])


class PastTheEndReader(FileReader):
    def read_into(self, offset: int, buffer: memoryview) -> None:
        with contextlib.suppress(SnapshotError):
            super().read_into(offset, buffer)


def reading_by(kind: type[FileReader], name: str) -> type[FileMechanism]:
    def reader(self: FileMechanism, snapshot: DiskSnapshot) -> FileReader:
        return kind(Path(snapshot.data["file"]), snapshot.disk.size_bytes)

    return type(name, (FileMechanism,), {"reader": reader})


for bad_reader in (GapReader, FalseZeroReader, OverlapReader, EarlyEndReader, OnceReader):
    caught_by("test_20_extents_cover_the_disk_exactly_and_zeros_are_zeros")(reading_by(bad_reader, bad_reader.__name__))
for bad_reader in (ShortReader, PastTheEndReader):
    caught_by("test_21_any_range_can_be_read")(reading_by(bad_reader, bad_reader.__name__))


@caught_by("test_22_readers_of_all_disks_work_at_once")
class OneReaderAtATime(FileMechanism):
    last: FileReader | None = None

    def reader(self, snapshot: DiskSnapshot) -> FileReader:
        if self.last is not None:
            self.last.close()
        self.last = super().reader(snapshot)
        return self.last


@caught_by("test_23_a_lost_snapshot_is_said_to_be_lost")
class ReadsTheOriginalInstead(FileMechanism):
    def reader(self, snapshot: DiskSnapshot) -> FileReader:
        try:
            return super().reader(snapshot)
        except SnapshotError:
            return FileReader(Path(snapshot.disk.address), snapshot.disk.size_bytes)


@caught_by("test_24_another_process_can_read")
class RemembersInItself(FileMechanism):
    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        self.known = super().snapshot(plan)
        return self.known

    def reader(self, snapshot: DiskSnapshot) -> FileReader:
        if snapshot not in getattr(self, "known", ()):
            raise SnapshotError("never heard of it")
        return super().reader(snapshot)


@caught_by("test_27_health_is_told_at_any_time_and_changes_nothing")
class HealthOfWhatIsGone(FileMechanism):
    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        return [] if files(plan)[0].exists() else [Finding("the snapshot", "note", "it is lost", "take another")]


@caught_by("test_27_health_is_told_at_any_time_and_changes_nothing")
class HealthWithoutACure(FileMechanism):
    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        return [Finding("the snapshot", "note", "it fills up")] if files(plan)[0].exists() else []


@caught_by("test_27_health_is_told_at_any_time_and_changes_nothing")
class HealthThatTries(FileMechanism):
    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        (self.context.state_dir.parent / "trial").touch()
        return ()


@caught_by("test_30_delete_leaves_nothing_after_any_step", step="prepare", fresh=False)
class DeleteLeavesTheLast(FileMechanism):
    def delete(self, plan: SnapshotPlan) -> None:
        for path in files(plan)[:-1]:
            path.unlink(missing_ok=True)


@caught_by("test_30_delete_leaves_nothing_after_any_step", step="plan", fresh=True)
class DeleteInsists(FileMechanism):
    def delete(self, plan: SnapshotPlan) -> None:
        if not files(plan)[0].exists():
            raise SnapshotError("nothing is there")
        super().delete(plan)


@caught_by("test_30_delete_leaves_nothing_after_any_step", step="settle", fresh=True)
class DeletesOnlyItsOwn(FileMechanism):
    made = False

    def prepare(self, plan: SnapshotPlan) -> None:
        self.made = True
        super().prepare(plan)

    def delete(self, plan: SnapshotPlan) -> None:
        if self.made:
            super().delete(plan)


@caught_by("test_30_delete_leaves_nothing_after_any_step", step="reader", fresh=False)
class DeleteTakesTheDiskAlong(FileMechanism):
    def delete(self, plan: SnapshotPlan) -> None:
        super().delete(plan)
        Path(plan.disks[0].address).write_bytes(bytes(plan.disks[0].size_bytes))


@caught_by("test_31_a_killed_process_leaves_nothing_that_delete_does_not_remove", step="snapshot")
class MakesMoreThanItNamed(FileMechanism):
    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        files(plan)[0].with_suffix(f".{os.getpid()}").touch()
        return super().snapshot(plan)


@caught_by("test_32_delete_touches_nothing_that_does_not_stand_in_the_plan")
class DeletesByPrefix(FileMechanism):
    def delete(self, plan: SnapshotPlan) -> None:
        for path in files(plan)[0].parent.glob(f"{plan.tag}*"):
            path.unlink()


@caught_by("test_33_many_rounds_leave_nothing")
class KeepsALog(FileMechanism):
    def delete(self, plan: SnapshotPlan) -> None:
        super().delete(plan)
        with (files(plan)[0].parent / f"{plan.tag}.log").open("a") as log:
            log.write("deleted\n")


@caught_by("test_25_changed_extents_name_every_change")
class MarksWithoutARecord(FileMechanism):
    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        return tuple(replace(snapshot, mark="now") for snapshot in super().snapshot(plan))


class KnowsChanges(FileMechanism):
    """A stand-in for storage that records changes itself: keeps whole copies beside the disks, and compares."""

    changes = True

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        taken = []
        for snapshot in super().snapshot(plan):
            kept = self.copy_of(snapshot.disk, plan.tag)
            kept.write_bytes(Path(snapshot.disk.address).read_bytes())
            taken.append(replace(snapshot, mark=plan.tag))
        return tuple(taken)

    def copy_of(self, disk: Disk, tag: str) -> Path:
        return self.context.state_dir / f"{disk.device}.{tag}"

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        old, new = self.copy_of(snapshot.disk, since), self.copy_of(snapshot.disk, snapshot.plan.tag)
        if not since or not old.is_file() or old.stat().st_size != new.stat().st_size:
            raise SnapshotError("that is no mark of this disk")
        return self.differences(old.read_bytes(), new.read_bytes())

    def differences(self, old: bytes, new: bytes) -> Iterator[Extent]:
        for at in range(0, len(new), 4096):
            if old[at : at + 4096] != new[at : at + 4096]:
                yield Extent(at, min(4096, len(new) - at))


class MarksBearTheDisk(KnowsChanges):
    """As it should be: a mark is of one disk."""

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        return tuple(replace(taken, mark=f"{taken.disk.device}.{taken.mark}") for taken in super().snapshot(plan))

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        device, _, tag = since.partition(".")
        if device != snapshot.disk.device:
            raise SnapshotError("that is no mark of this disk")
        return super().changed_extents(snapshot, tag)


caught_by("test_25_changed_extents_name_every_change")(KnowsChanges)


@caught_by("test_25_changed_extents_name_every_change")
class ForgetsAChange(MarksBearTheDisk):
    def differences(self, old: bytes, new: bytes) -> Iterator[Extent]:
        yield from list(super().differences(old, new))[1:]


@caught_by("test_25_changed_extents_name_every_change")
class LeavesTheDisk(MarksBearTheDisk):
    def differences(self, old: bytes, new: bytes) -> Iterator[Extent]:
        yield Extent(0, len(new) + 4096)


@caught_by("test_26_a_record_of_changes_goes_on_until_another_is_kept_in_its_stead")
class RecordsSinceTheLastOnly(MarksBearTheDisk):
    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        for disk in plan.disks:
            for kept in self.context.state_dir.glob(f"{disk.device}.*"):
                kept.unlink()
        return super().snapshot(plan)


@caught_by("test_26_a_record_of_changes_goes_on_until_another_is_kept_in_its_stead")
class KeepsOneOnly(MarksBearTheDisk):
    def keep_mark(self, snapshot: DiskSnapshot, instead_of: str = "") -> None:
        for kept in self.context.state_dir.glob(f"{snapshot.disk.device}.*"):
            if kept != self.copy_of(snapshot.disk, snapshot.plan.tag):
                kept.unlink()


@caught_by("test_40_a_clone_is_writable_and_leaves_everything_else_alone")
class CloneIsTheSnapshot(FileMechanism):
    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        return replace(snapshot.disk, address=snapshot.data["file"])


@caught_by("test_40_a_clone_is_writable_and_leaves_everything_else_alone")
class CloneIsAHardLink(FileMechanism):
    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        path = Path(plan.data["file"])
        path.hardlink_to(snapshot.data["file"])
        return replace(snapshot.disk, address=str(path))


@caught_by("test_41_a_lasting_clone_outlives_snapshot_and_vm")
class DeletesClonesToo(FileMechanism):
    def delete(self, plan: SnapshotPlan) -> None:
        super().delete(plan)
        for owned in self.list_owned():
            if owned.tag == plan.tag:
                Path(owned.name).unlink()


@caught_by("test_42_the_reader_of_a_clone_reads_what_its_vm_wrote")
class ReadsTheSnapshotInstead(FileMechanism):
    def clone_reader(self, plan: ClonePlan, disk: Disk) -> FileReader:
        index = [found.device for found in plan.snapshot.disks].index(plan.device)
        return FileReader(Path(plan.snapshot.data["files"][index]), disk.size_bytes)


@caught_by("test_43_delete_clone_removes_the_clone_and_nothing_else", lasting=False, killed=False)
class PlanThatMakesTheFile(FileMechanism):
    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        plan = super().plan_clone(snapshot, name, folder, lasting=lasting)
        Path(plan.data["file"]).touch()
        return plan


@caught_by("test_43_delete_clone_removes_the_clone_and_nothing_else", lasting=True, killed=True)
class DeletesOnlyItsOwnClones(FileMechanism):
    made: ClassVar[set[tuple[int, str]]] = set()

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        self.made.add((os.getpid(), plan.data["file"]))
        return super().clone(plan, snapshot)

    def delete_clone(self, plan: ClonePlan) -> None:
        if (os.getpid(), plan.data["file"]) in self.made:
            super().delete_clone(plan)


@caught_by("test_43_delete_clone_removes_the_clone_and_nothing_else", lasting=False, killed=False)
class DeletesClonesByPrefix(FileMechanism):
    def delete_clone(self, plan: ClonePlan) -> None:
        for owned in self.list_owned():
            if owned.kind == "clone" and f"~{plan.name[:3]}" in owned.name:
                Path(owned.name).unlink()


@pytest.mark.parametrize(("driver", "scenario", "arguments"), BAD)
def test_the_suite_catches(
    driver: type[FileMechanism], scenario: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    rig = FileRig(tmp_path, {"way": "copy"}, driver)
    with pytest.raises((AssertionError, VmsnapError, OSError, TypeError, pytest.fail.Exception)):
        getattr(SnapshotContract(), scenario)(rig, **arguments)


def test_the_suite_lets_a_right_record_of_changes_pass(tmp_path: Path) -> None:
    SnapshotContract().test_25_changed_extents_name_every_change(FileRig(tmp_path, {"way": "copy"}, MarksBearTheDisk))


def test_every_scenario_catches_somebody() -> None:
    scenarios = {name for name in dir(SnapshotContract) if name.startswith("test_")}
    assert scenarios == {param.values[1] for param in BAD}
