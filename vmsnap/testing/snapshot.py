"""The contract suite of the role `SnapshotMechanism`.

A mechanism joins by inheriting `SnapshotContract` and giving it one fixture, `rig`, that yields a
`vmsnap.testing.rigs.SnapshotRig`. Each scenario is a sentence of the contract, which its docstring quotes or says in
other words; those from 40 on clone (`vmsnap.testing.cloning`).
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from vmsnap.errors import SnapshotError
from vmsnap.model import DiskSnapshot, SnapshotPlan, Window, from_json, to_json
from vmsnap.testing.cloning import CloningScenarios, clone_all
from vmsnap.testing.rigs import SnapshotRig, read_all, same
from vmsnap.testing.snapshot_life import (
    BLOCK,
    STEPS,
    Life,
    contents_of,
    in_a_process_that_is_killed,
    keep_marks,
    live,
    scribble,
    see_that_changes_are_named,
)

__all__ = ["BLOCK", "STEPS", "Life", "SnapshotContract", "clone_all", "contents_of", "live", "scribble"]


class SnapshotContract(CloningScenarios):
    """All scenarios of the role."""

    @pytest.fixture
    def rig(self) -> SnapshotRig:
        """The mechanism's rig; to be overridden."""
        raise TypeError(f"{type(self).__name__} has no fixture 'rig'")

    # -- planning

    def test_01_handles_its_disks_and_no_others(self, rig: SnapshotRig) -> None:
        """`handles`: "Quick, no side effects, never raises." """
        mechanism, before = rig.mechanism(), rig.traces()
        mechanism.check_usable()
        for disk in rig.disks():
            assert mechanism.handles(disk)
            for wrong in ("", "/nowhere/at/all", "\0", "iscsi://nobody/iqn.x/1", "relative", "/" + "x" * 5000):
                assert not mechanism.handles(replace(disk, address=wrong, handle={}))
        assert rig.traces() == before

    def test_02_a_plan_has_no_side_effects(self, rig: SnapshotRig) -> None:
        """ "`plan` has no side effects and its result holds the names of all that will be made"."""
        before = rig.traces()
        life = live(rig, "plan")
        assert rig.traces() == before
        assert life.plan.disks == rig.disks() and life.plan.mechanism == life.mechanism.name
        assert life.plan.vm == rig.vm

    def test_03_everything_survives_being_kept(self, rig: SnapshotRig) -> None:
        """ "Plain data: it is written to the journal before `SnapshotMechanism.prepare`"."""
        life = live(rig)
        assert from_json(to_json(life.plan), SnapshotPlan) == life.plan
        for snapshot in life.snapshots:
            assert from_json(to_json(snapshot), DiskSnapshot) == snapshot
        life.end()

    def test_04_every_name_that_is_made_carries_the_tag(self, rig: SnapshotRig) -> None:
        """ "`tag` … is unique and is part of every name"; two plans at once do not meet."""
        lives = [live(rig, tag=f"vmsnap-twin-{index}") for index in range(2)]
        owned = lives[0].mechanism.list_owned()
        for life in lives:
            mine = [entry for entry in owned if entry.tag == life.plan.tag]
            assert mine and all(entry.driver == life.mechanism.name for entry in mine)
            assert all(life.plan.tag in entry.name for entry in mine)
        for life in lives:
            assert same(contents_of(rig.mechanism(), life), list(life.contents))
            life.end()
        assert not rig.mechanism().list_owned()

    def test_05_doctor_changes_nothing(self, rig: SnapshotRig) -> None:
        """`doctor`: "Changes nothing." """
        before = rig.traces()
        for finding in rig.mechanism().doctor():
            assert finding.severity in ("ok", "note", "missing") and "\n" not in finding.message
        assert rig.traces() == before

    # -- the instant

    def test_10_a_snapshot_is_what_the_disks_held_at_the_instant(self, rig: SnapshotRig) -> None:
        """**One point in time.** "writes that the guest completed before the call are in, writes that it begins after
        the return are not"."""
        for disk in rig.disks():
            scribble(rig, disk)
        life = live(rig, "snapshot")
        for disk in rig.disks():
            scribble(rig, disk, seed=2)
        life.mechanism.settle(life.snapshots)
        assert [snapshot.disk for snapshot in life.snapshots] == list(life.plan.disks)
        assert same(contents_of(life.mechanism, life), list(life.contents))
        assert [rig.content(disk) for disk in rig.disks()] != list(life.contents), "the oracle's writer does not write"
        life.end()

    def test_11_what_was_written_between_prepare_and_snapshot_is_in(self, rig: SnapshotRig) -> None:
        """`prepare`: "The guest runs." What it writes then belongs to the snapshot."""
        life = live(rig, "prepare")
        for disk in rig.disks():
            scribble(rig, disk, seed=3)
        rig.pause()
        contents = [rig.content(disk) for disk in rig.disks()]
        life.snapshots = life.mechanism.snapshot(life.plan)
        rig.resume()
        life.mechanism.settle(life.snapshots)
        assert same(contents_of(life.mechanism, life), contents)
        life.end()

    def test_12_several_disks_show_one_instant(self, rig: SnapshotRig) -> None:
        """ "fixes all disks of the plan at one instant between its call and its return", with a writer that writes to
        all disks in turn whenever it may."""
        written = [itertools.count(1) for _ in rig.disks()]
        running, ended = threading.Event(), threading.Event()
        gate = threading.Lock()

        def write() -> None:
            while not ended.is_set():
                for disk, numbers in zip(rig.disks(), written, strict=True):
                    with gate:
                        rig.write(disk, 0, next(numbers).to_bytes(8, "little") * (BLOCK // 8))
                running.set()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            mechanism = rig.mechanism()
            plan = mechanism.plan(rig.vm, rig.disks(), "vmsnap-instant", Window.FREE)
            mechanism.prepare(plan)
            assert running.wait(10)
            with gate:
                rig.pause()
                contents = [rig.content(disk) for disk in rig.disks()]
                life = Life(mechanism, plan, mechanism.snapshot(plan))
                rig.resume()
            running.clear()
            assert running.wait(10)
            mechanism.settle(life.snapshots)
            assert same(contents_of(mechanism, life), contents)
        finally:
            ended.set()
            writer.join()
        mechanism.delete(plan)

    def test_13_moments_lie_between_call_and_return(self, rig: SnapshotRig) -> None:
        """The evidence: each disk's `instant`, by this host's clock."""
        life = live(rig, "prepare")
        rig.pause()
        begin = time.monotonic_ns()
        life.snapshots = life.mechanism.snapshot(life.plan)
        end = time.monotonic_ns()
        rig.resume()
        assert all(begin <= snapshot.instant.monotonic_ns <= end for snapshot in life.snapshots)
        life.end()

    def test_14_the_disks_are_not_changed(self, rig: SnapshotRig) -> None:
        """**The guest is never harmed.** Its disks hold what it wrote, before, during and after."""
        contents = [rig.content(disk) for disk in rig.disks()]
        life = live(rig, "reader")
        assert same([rig.content(disk) for disk in rig.disks()], contents)
        life.end()
        assert same([rig.content(disk) for disk in rig.disks()], contents)
        scribble(rig, rig.disks()[0])
        assert rig.content(rig.disks()[0]) != contents[0]

    # -- reading

    def test_20_extents_cover_the_disk_exactly_and_zeros_are_zeros(self, rig: SnapshotRig) -> None:
        """`extents`: "the whole disk from 0 to `size_bytes`, without gap or overlap, in ascending order. A range is
        marked `zero` only where it surely reads as zeros." """
        life = live(rig)
        for snapshot, content in zip(life.snapshots, life.contents, strict=True):
            with life.mechanism.reader(snapshot) as reader:
                assert reader.size_bytes == snapshot.disk.size_bytes == len(content)
                at = 0
                extents = list(reader.extents())
                for extent in extents:
                    assert extent.offset == at and extent.length > 0
                    at += extent.length
                    if extent.zero:
                        assert not any(content[extent.offset : at]), f"{extent} is not zero"
                assert at == reader.size_bytes
                assert list(reader.extents()) == extents
        life.end()

    def test_21_any_range_can_be_read(self, rig: SnapshotRig) -> None:
        """`read_into`: "Fill all of `buffer` … from `offset`", also at odd offsets, over zeros, and to the end."""
        life = live(rig)
        chance = random.Random(4)
        with life.mechanism.reader(life.snapshots[0]) as reader:
            size, content = reader.size_bytes, life.contents[0]
            ranges = [(0, 0), (0, 1), (size - 1, 1), (0, size), (size, 0), (1, BLOCK)]
            ranges += [(chance.randrange(size // 2), chance.randrange(size // 2)) for _ in range(20)]
            for offset, length in ranges:
                buffer = bytearray(b"\xff" * length)
                reader.read_into(offset, memoryview(buffer))
                assert same(buffer, content[offset : offset + length])
            for offset, length in ((size, 1), (size - 1, 2), (-1, 1), (size * 2, 1)):
                with pytest.raises(SnapshotError):
                    reader.read_into(offset, memoryview(bytearray(length)))
        life.end()

    def test_22_readers_of_all_disks_work_at_once(self, rig: SnapshotRig) -> None:
        """`reader`: "Several readers at once are allowed, one a disk." """
        life = live(rig)
        readers = [life.mechanism.reader(snapshot) for snapshot in life.snapshots]
        for at in range(0, min(reader.size_bytes for reader in readers), 16 * BLOCK):
            for reader, content in zip(readers, life.contents, strict=True):
                buffer = bytearray(min(16 * BLOCK, reader.size_bytes - at))
                reader.read_into(at, memoryview(buffer))
                assert same(buffer, content[at : at + len(buffer)])
        for reader in readers:
            reader.close()
            reader.close()
        life.end()

    def test_23_a_lost_snapshot_is_said_to_be_lost(self, rig: SnapshotRig) -> None:
        """ "the snapshot is lost (`SnapshotError` on reading), not a write of the guest"."""
        life = live(rig)
        rig.lose(life.plan.disks[0], life.mechanism)
        with pytest.raises(SnapshotError), rig.mechanism().reader(life.snapshots[0]) as reader:
            read_all(reader)
        scribble(rig, rig.disks()[0])
        life.end()

    def test_24_another_process_can_read(self, rig: SnapshotRig) -> None:
        """A snapshot is plain data: a fresh instance reads it."""
        life = live(rig)
        life.mechanism.close()
        kept = Life(rig.mechanism(), life.plan, tuple(from_json(to_json(s), DiskSnapshot) for s in life.snapshots))
        assert same(contents_of(kept.mechanism, kept), list(life.contents))
        kept.mechanism.delete(life.plan)

    def test_27_health_is_told_at_any_time_and_changes_nothing(self, rig: SnapshotRig) -> None:
        """`health`: "by a thread of its own while readers read"; "Changes nothing; nothing to tell is nothing, also of
        a plan that has no snapshots any more." Each finding is a line, with what helps."""
        life = live(rig, "plan")
        mechanism, before = life.mechanism, rig.traces()
        assert not mechanism.health(life.plan) and rig.traces() == before
        life = live(rig, mechanism=mechanism, plan=life.plan)
        before = rig.traces()
        with ThreadPoolExecutor(1) as thread, mechanism.reader(life.snapshots[0]) as reader:
            told = [thread.submit(mechanism.health, life.plan) for _ in range(20)]
            assert same(read_all(reader), life.contents[0])
            for finding in (finding for each in told for finding in each.result(60)):
                assert finding.severity == "note" and finding.subject and finding.message and finding.cure
                assert "\n" not in f"{finding.subject}{finding.message}{finding.cure}"
        assert rig.traces() == before
        life.end()
        assert not mechanism.health(life.plan)

    # -- removing

    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
    def test_30_delete_leaves_nothing_after_any_step(self, rig: SnapshotRig, step: str, fresh: bool) -> None:
        """`delete`: "Remove all that was made for `plan`, whatever of it exists, from whatever step; idempotent." """
        before = rig.traces()
        contents = [rig.content(disk) for disk in rig.disks()]
        life = live(rig, step)
        mechanism = rig.mechanism() if fresh else life.mechanism
        for _ in range(2):
            life.end(mechanism)
            assert rig.traces() == before
        assert not mechanism.list_owned()
        assert same([rig.content(disk) for disk in rig.disks()], contents)

    @pytest.mark.parametrize("step", ["prepare", "snapshot", "settle"])
    def test_31_a_killed_process_leaves_nothing_that_delete_does_not_remove(self, rig: SnapshotRig, step: str) -> None:
        """ "`delete(plan)` is therefore enough, in any process, after any crash"."""
        before = rig.traces()
        tag = f"vmsnap-crash-{step}"
        plan = rig.mechanism().plan(rig.vm, rig.disks(), tag, Window.FREE)
        in_a_process_that_is_killed(lambda: live(rig, step, plan=plan))
        mechanism = rig.mechanism()
        # a mechanism may have nothing to make before the snapshot itself
        assert (step == "prepare" and rig.traces() == before) or tag in {entry.tag for entry in mechanism.list_owned()}
        mechanism.delete(plan)
        assert rig.traces() == before and not mechanism.list_owned()

    def test_32_delete_touches_nothing_that_does_not_stand_in_the_plan(self, rig: SnapshotRig) -> None:
        """**Deletes** "touch nothing that does not stand in the plan": tags that begin alike are not the same."""
        kept = live(rig, tag="vmsnap-one-1")
        with_kept = rig.traces()
        gone = live(rig, tag="vmsnap-one")
        other = live(rig, tag="vmsnap-one-11")
        rig.mechanism().delete(gone.plan)
        rig.mechanism().delete(other.plan)
        assert rig.traces() == with_kept
        assert same(contents_of(rig.mechanism(), kept), list(kept.contents))
        rig.mechanism().delete(kept.plan)

    def test_33_many_rounds_leave_nothing(self, rig: SnapshotRig) -> None:
        """Backups come every hour for years."""
        before = rig.traces()
        for seed in range(5):
            scribble(rig, rig.disks()[0], seed)
            life = live(rig, "reader")
            assert same(contents_of(life.mechanism, life), list(life.contents))
            life.end()
            assert rig.traces() == before

    # -- changes

    def test_25_changed_extents_name_every_change(self, rig: SnapshotRig) -> None:
        """`changed_extents`: "what is not named is not read", and what cannot be said is an error."""
        first = live(rig)
        keep_marks(first)
        first.end()
        if not first.mechanism.changes:
            assert {snapshot.mark for snapshot in first.snapshots} == {""}
            with pytest.raises(SnapshotError):
                list(first.mechanism.changed_extents(first.snapshots[0], "any"))
            return
        for disk in rig.disks():
            scribble(rig, disk, seed=7)
            rig.write(disk, 0, bytes(BLOCK))
        second = live(rig)
        mechanism = rig.mechanism()
        see_that_changes_are_named(mechanism, first, second)
        for mark in (first.snapshots[1].mark, "no mark of anything", ""):
            with pytest.raises(SnapshotError):
                list(mechanism.changed_extents(second.snapshots[0], mark))
        second.end()
        mechanism.forget_marks(rig.vm)

    def test_26_a_record_of_changes_goes_on_until_another_is_kept_in_its_stead(self, rig: SnapshotRig) -> None:
        """`keep_mark`: "a backup that fails loses nothing", and backups into another repository neither."""
        first = live(rig)
        keep_marks(first)
        first.end()
        if not first.mechanism.changes:
            return
        chance = random.Random(8)

        def go_on() -> Life:
            for disk in rig.disks():
                scribble(rig, disk, seed=chance.randrange(1 << 30))
            return live(rig)

        go_on().end()  # it failed: nothing is kept
        elsewhere = go_on()
        see_that_changes_are_named(rig.mechanism(), first, elsewhere)
        keep_marks(elsewhere)
        elsewhere.end()
        second = go_on()
        for older in (first, elsewhere):
            see_that_changes_are_named(rig.mechanism(), older, second)
        keep_marks(second, first)
        keep_marks(second, first)
        second.end()
        last = go_on()
        for older in (elsewhere, second):
            see_that_changes_are_named(rig.mechanism(), older, last)
        last.end()
        rig.mechanism().forget_marks(rig.vm)
        rig.mechanism().forget_marks(rig.vm)
        assert not rig.mechanism().list_owned()
