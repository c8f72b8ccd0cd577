"""The life of one snapshot, as the scenarios of the role `SnapshotMechanism` live it."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from vmsnap.model import Disk, DiskSnapshot, SnapshotPlan, Window, from_json, to_json
from vmsnap.roles import DiskReader, SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig, read_all, same

BLOCK = 4096
STEPS = ("plan", "prepare", "snapshot", "settle", "reader")
"""The life of a snapshot; `delete` may follow any of them."""
_tags = itertools.count(1)


@dataclass
class Life:
    """One snapshot, brought as far as wanted, with what the disks held at its instant."""

    mechanism: SnapshotMechanism
    plan: SnapshotPlan
    snapshots: tuple[DiskSnapshot, ...] = ()
    contents: tuple[bytes, ...] = ()
    readers: list[DiskReader] = field(default_factory=list)

    def end(self, mechanism: SnapshotMechanism | None = None) -> None:
        """Delete the snapshot, its readers still open, as a core that failed does; then close them."""
        (mechanism or self.mechanism).delete(from_json(to_json(self.plan), SnapshotPlan))
        for reader in self.readers:
            reader.close()


def live(
    rig: SnapshotRig,
    until: str = "settle",
    mechanism: SnapshotMechanism | None = None,
    tag: str = "",
    plan: SnapshotPlan | None = None,
) -> Life:
    """Live a snapshot's life up to a step, the writer paused as a guest would be."""
    mechanism = mechanism or rig.mechanism()
    if plan is None:
        plan = mechanism.plan(rig.vm, rig.disks(), tag or f"vmsnap-{os.getpid()}-{next(_tags)}", Window.FREE)
    life = Life(mechanism, plan)
    wanted = STEPS[: STEPS.index(until) + 1]
    if "prepare" in wanted:
        mechanism.prepare(plan)
    if "snapshot" in wanted:
        rig.pause()
        try:
            life.contents = tuple(rig.content(disk) for disk in plan.disks)
            life.snapshots = mechanism.snapshot(plan)
        finally:
            rig.resume()
    if "settle" in wanted:
        mechanism.settle(life.snapshots)
    if "reader" in wanted:
        for snapshot in life.snapshots:
            life.readers.append(mechanism.reader(snapshot))
            life.readers[-1].read_into(0, memoryview(bytearray(BLOCK)))
    return life


def scribble(rig: SnapshotRig, disk: Disk, seed: int = 1) -> None:
    """Write here and there over the whole disk: over data, and where nothing was."""
    chance = random.Random(seed)
    for _ in range(40):
        block = chance.randrange(disk.size_bytes // BLOCK)
        rig.write(disk, block * BLOCK, chance.randbytes(BLOCK))


def keep_marks(life: Life, instead_of: Life | None = None) -> None:
    """Do what follows the commit of a backup."""
    for index, snapshot in enumerate(life.snapshots):
        life.mechanism.keep_mark(snapshot, instead_of.snapshots[index].mark if instead_of else "")


def see_that_changes_are_named(mechanism: SnapshotMechanism, older: Life, newer: Life) -> None:
    """The older content, brought up to date where `changed_extents` says so, is the newer one."""
    for before, after, old, new in zip(older.snapshots, newer.snapshots, older.contents, newer.contents, strict=True):
        brought_up = bytearray(old)
        for extent in mechanism.changed_extents(after, before.mark):
            end = extent.offset + extent.length
            assert 0 <= extent.offset <= end <= after.disk.size_bytes
            brought_up[extent.offset : end] = new[extent.offset : end]
        assert same(bytes(brought_up), new)


def contents_of(mechanism: SnapshotMechanism, life: Life) -> list[bytes]:
    """All disks of a snapshot, as the mechanism gives them."""
    found = []
    for snapshot in life.snapshots:
        with mechanism.reader(snapshot) as reader:
            found.append(read_all(reader))
    return found


def in_a_process_that_is_killed(work: Callable[[], object]) -> None:
    """Do `work` in a process that dies by SIGKILL as soon as it is done."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it failed before the process could be killed"
