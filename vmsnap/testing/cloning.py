"""The scenarios of the role `SnapshotMechanism` that clone; part of `vmsnap.testing.snapshot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmsnap.errors import SnapshotError
from vmsnap.model import ClonePlan, Disk, from_json, to_json
from vmsnap.roles import SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig, read_all, same
from vmsnap.testing.sentences import Scenarios
from vmsnap.testing.snapshot_life import (
    BLOCK,
    Life,
    contents_of,
    in_a_process_that_is_killed,
    live,
    scribble,
)


class CloningScenarios(Scenarios):
    """Writable disks for a duplicate."""

    role = "SnapshotMechanism"

    def test_40_a_clone_is_writable_and_leaves_everything_else_alone(self, rig: SnapshotRig) -> None:
        """`clone`: "Whatever is written to the clone never reaches the snapshot, the original or another clone." """
        life = live(rig)
        if refuses_to_clone(rig, life):
            return
        mechanism = life.mechanism
        clones, others = clone_all(rig, life, "bk001"), clone_all(rig, life, "bk002")
        disks = [clone.disk for clone in (*clones, *others)]
        assert len({disk.address for disk in (*disks, *life.plan.disks)}) == 3 * len(clones)
        for clone, disk, content in zip(clones, life.plan.disks, life.contents, strict=True):
            assert clone.disk.device == disk.device and clone.disk.size_bytes == disk.size_bytes
            assert not clone.disk.read_only
            assert same(rig.content(clone.disk), content)
            scribble(rig, clone.disk, seed=5)
            assert rig.content(clone.disk) != content
            assert same(rig.content(disk), content)
        assert same(contents_of(mechanism, life), list(life.contents))
        assert same([rig.content(clone.disk) for clone in others], list(life.contents))
        written = [rig.content(clone.disk) for clone in clones]
        for disk in rig.disks():
            scribble(rig, disk, seed=6)
        assert same([rig.content(clone.disk) for clone in clones], written)
        delete_all(mechanism, [*clones, *others])
        life.end()

    def test_41_a_lasting_clone_outlives_snapshot_and_vm(self, rig: SnapshotRig) -> None:
        """`clone`: lasting, "it survives their end by kill -9, and `delete` of the snapshot"."""
        before = traces(rig)
        life = live(rig)
        if refuses_to_clone(rig, life):
            return
        clones = clone_all(rig, life, "bk001", lasting=True)
        scribble(rig, clones[0].disk, seed=8)
        written = [rig.content(clone.disk) for clone in clones]
        life.end()
        rig.end_vm()
        mechanism = rig.mechanism()
        assert same([rig.content(clone.disk) for clone in clones], written)
        assert same(clone_contents(mechanism, clones), written)
        scribble(rig, clones[1].disk, seed=9)
        delete_all(mechanism, clones)
        assert not traces(rig) - before and not mechanism.list_owned()

    def test_42_the_reader_of_a_clone_reads_what_its_vm_wrote(self, rig: SnapshotRig) -> None:
        """`clone_reader`: "Open the clone's present content, what its VM wrote included"; another instance can."""
        life = live(rig)
        if refuses_to_clone(rig, life):
            return
        clones = clone_all(rig, life, "bk001")
        assert same(clone_contents(life.mechanism, clones), list(life.contents))
        for clone in clones:
            scribble(rig, clone.disk, seed=5)
            rig.write(clone.disk, 0, bytes(4 * BLOCK))
        written = [rig.content(clone.disk) for clone in clones]
        kept = [Clone(from_json(to_json(clone.plan), ClonePlan), clone.disk) for clone in clones]
        assert same(clone_contents(rig.mechanism(), kept), written)
        assert not any(written[0][: 4 * BLOCK])
        delete_all(life.mechanism, clones)
        life.end()

    @pytest.mark.parametrize("lasting", [False, True])
    @pytest.mark.parametrize("killed", [False, True])
    def test_43_delete_clone_removes_the_clone_and_nothing_else(
        self, rig: SnapshotRig, lasting: bool, killed: bool
    ) -> None:
        """`delete_clone`: "Remove all that was made for `plan`, whatever of it exists; idempotent, in any process." """
        life = live(rig)
        if refuses_to_clone(rig, life):
            return
        before = traces(rig)
        others = clone_all(rig, life, "bk0")
        with_others = traces(rig)
        folder = clone_folder(rig, "bk00")
        plans = [life.mechanism.plan_clone(taken, "bk00", folder, lasting=lasting) for taken in life.snapshots]
        assert traces(rig) == with_others and not list(folder.iterdir()), "planning makes something"
        if killed:
            in_a_process_that_is_killed(lambda: rig.mechanism().clone(plans[0], life.snapshots[0]))
        else:
            life.mechanism.clone(plans[0], life.snapshots[0])
        assert traces(rig) != with_others or any(folder.iterdir()), "the oracle does not see a clone"
        mechanism = rig.mechanism()
        for _ in range(2):
            for plan in plans:  # the second one was never made
                mechanism.delete_clone(from_json(to_json(plan), ClonePlan))
            assert traces(rig) == with_others and not list(folder.iterdir())
        assert same([rig.content(clone.disk) for clone in others], list(life.contents))
        delete_all(mechanism, others)
        assert traces(rig) == before
        life.end()
        delete_all(mechanism, others)


@dataclass(frozen=True)
class Clone:
    """One clone and what it was planned to be."""

    plan: ClonePlan
    disk: Disk


def refuses_to_clone(rig: SnapshotRig, life: Life) -> bool:
    """Whether the mechanism has no clones; sees that it says so then, and ends the snapshot."""
    if life.mechanism.clones:
        return False
    with pytest.raises(SnapshotError):
        life.mechanism.plan_clone(life.snapshots[0], "bk001", rig.scratch, lasting=False)
    life.end()
    return True


def clone_folder(rig: SnapshotRig, name: str) -> Path:
    """The folder of a duplicate, as the core makes it."""
    folder = rig.scratch / f"clones-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def traces(rig: SnapshotRig) -> frozenset[str]:
    """The rig's traces without the folders that `clone_folder` made."""
    return frozenset(trace for trace in rig.traces() if not Path(trace).name.startswith("clones-"))


def clone_all(rig: SnapshotRig, life: Life, name: str, *, lasting: bool = False) -> list[Clone]:
    """Clone every disk of a snapshot."""
    folder = clone_folder(rig, name)
    plans = [life.mechanism.plan_clone(snapshot, name, folder, lasting=lasting) for snapshot in life.snapshots]
    return [
        Clone(plan, life.mechanism.clone(plan, snapshot)) for plan, snapshot in zip(plans, life.snapshots, strict=True)
    ]


def clone_contents(mechanism: SnapshotMechanism, clones: Sequence[Clone]) -> list[bytes]:
    """All clones, as the mechanism gives them."""
    found = []
    for clone in clones:
        with mechanism.clone_reader(clone.plan, clone.disk) as reader:
            found.append(read_all(reader))
    return found


def delete_all(mechanism: SnapshotMechanism, clones: Sequence[Clone]) -> None:
    """Delete clones; does nothing for those that are gone."""
    for clone in clones:
        mechanism.delete_clone(clone.plan)
