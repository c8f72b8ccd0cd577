"""Snapshots and pools that fill up, on real volumes: what is done about it, and what is told before they are lost."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thick, make_thin, volume_group, volumes
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, DiskSnapshot, Finding, SnapshotPlan, Window
from vmsnap.roles import DriverContext
from vmsnap.testing.rigs import eventually, read_all
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.snapshots.lvm import LvmMechanism
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.names import names_of
from vmsnap_drivers.snapshots.lvm.watch import Watch

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("group"), "vg", 112) as name:
        yield name


@pytest.fixture
def thin(group: str) -> Iterator[tuple[Disk, Disk]]:
    """Two disks in a pool of 32 MiB."""
    make_pool(group, "pool", 32)
    yield make_thin(group, "pool", "thin-0", 16), make_thin(group, "pool", "thin-1", 16)
    lvm("lvremove", "--force", f"{group}/pool")


@pytest.fixture
def thick(group: str) -> Iterator[Disk]:
    yield make_thick(group, "disk-0", 8)
    if left := [name for name in volumes() if "/vmsnap-" in name]:
        lvm("lvremove", "--force", *left)
    lvm("lvremove", "--force", f"{group}/disk-0")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("lvm watch")]
    while _made:
        _made.pop().close()
    assert not left, "a snapshot that is deleted is not watched"


_made: list[LvmMechanism] = []


def mechanism_with(folder: Path, **options: str) -> LvmMechanism:
    _made.append(LvmMechanism(DriverContext(folder, folder), {"pause_seconds": "60", **options}))
    return _made[-1]


def taken_of(mechanism: LvmMechanism, *disks: Disk, tag: str = "vmsnap-t") -> tuple[DiskSnapshot, ...]:
    """Snapshots that exist, and no more."""
    plan = mechanism.plan("vm001", disks, tag, Window.FREE)
    mechanism.prepare(plan)
    for disk in disks:
        sync(disk.address)
    return mechanism.snapshot(plan)


def fill(disk: Disk, offset: int, size_bytes: int) -> None:
    write(disk.address, offset, os.urandom(size_bytes))
    sync(disk.address)


def watch_of(plan: SnapshotPlan, limit_percent: int) -> Watch:
    """A watch that looks when it is told to, with a limit of its own."""
    return Watch(Lvm(LocalRunner()), plan, True, limit_percent)


def ours(kind: str = "") -> set[str]:
    return {name for name in volumes() if "/vmsnap-" in name and name.endswith(kind)}


def test_a_pool_is_relieved_of_marks_first_and_of_its_snapshots_where_that_is_not_enough(
    folder: Path, thin: tuple[Disk, Disk]
) -> None:
    mechanism = mechanism_with(folder, marks="1")
    first, second = thin
    fill(first, 0, 6 * MIB)
    before = taken_of(mechanism, *thin, tag="vmsnap-s")
    for snapshot in before:
        mechanism.keep_mark(snapshot)
    mechanism.delete(before[0].plan)
    assert len(ours(".mark")) == 2
    fill(first, 0, 6 * MIB)  # 6 of 32 MiB are a mark's alone
    taken = taken_of(mechanism, *thin)
    mechanism.settle(taken)
    fill(second, 0, 8 * MIB)  # 20 of 32 MiB
    watch = watch_of(taken[0].plan, 60)
    snapshots = {"vg/vmsnap-t.0", "vg/vmsnap-t.1"}

    watch.look()
    assert ours() == snapshots, "the marks go, and nothing else: the other disk's turn sees the same pool"
    watch.look()
    assert ours() == snapshots
    (told,) = watch.threats()
    assert told.subject == "kept snapshots in thin pool vg/pool" and told.message.startswith("2 were removed")
    for snapshot in taken:
        with mechanism.reader(snapshot) as reader:
            assert len(read_all(reader)) == snapshot.disk.size_bytes

    fill(first, 0, 6 * MIB)  # 20 of 32 MiB again, and no marks
    watch.look()
    assert ours() == set()
    for names in names_of(taken[0].plan):
        assert "thin pool vg/pool is full to 6" in watch.given_up(names)
    mechanism.delete(taken[0].plan)


def test_a_mark_that_is_in_use_does_not_keep_a_full_pool_from_being_relieved(
    folder: Path, thin: tuple[Disk, Disk]
) -> None:
    mechanism, (disk, _) = mechanism_with(folder, marks="1"), thin
    (snapshot,) = taken_of(mechanism, disk)
    mechanism.keep_mark(snapshot)
    (mark,) = ours(".mark")
    lvm("lvchange", "--activate", "y", "--ignoreactivationskip", mark)
    fill(disk, 0, 8 * MIB)
    watch = watch_of(snapshot.plan, 20)
    with Path(f"/dev/{mark}").open("rb"):
        watch.look()
        assert "in use" in watch.problem(names_of(snapshot.plan)[0])
        assert len(ours()) == 2
        watch.look()
        assert ours() == {mark}
    mechanism.forget_marks("vm001")
    mechanism.delete(snapshot.plan)
    assert ours() == set()


def test_a_pool_is_told_of_before_its_snapshots_are_given_up(folder: Path, thin: tuple[Disk, Disk]) -> None:
    mechanism, (disk, _) = mechanism_with(folder), thin
    (snapshot,) = taken_of(mechanism, disk)
    watch = watch_of(snapshot.plan, 40)
    watch.look()
    assert not watch.threats()
    fill(disk, 0, 12 * MIB)  # 37.5 percent
    watch.look()
    (told,) = watch.threats()
    assert told.subject == "thin pool vg/pool" and "lvextend" in told.cure
    assert told.message.startswith("38% of its data") and "from 40% on the snapshots of /dev/vg/thin-0" in told.message
    assert ours() == {"vg/vmsnap-t.0"}
    fill(disk, 12 * MIB, 2 * MIB)
    watch.look()
    assert watch.given_up(names_of(snapshot.plan)[0]).startswith("thin pool vg/pool is full to 44%")
    assert ours() == set()
    mechanism.delete(snapshot.plan)


# What thawing writes into frozen disks comes before `settle`.


def test_a_thick_snapshot_is_extended_from_the_moment_at_which_it_exists(folder: Path, thick: Disk) -> None:
    mechanism = mechanism_with(folder, snapshot_size="2M")
    before = Path(thick.address).read_bytes()
    (snapshot,) = taken_of(mechanism, thick)
    fill(thick, 0, 3 * MIB // 2)
    options = ["--noheadings", "--units", "m", "--nosuffix", "--options", "lv_size"]
    eventually(lambda: float(lvm("lvs", *options, "vg/vmsnap-t.0")) > 3, "it is extended", 60)
    fill(thick, 3 * MIB // 2, MIB)
    mechanism.settle([snapshot])
    with mechanism.reader(snapshot) as reader:
        assert read_all(reader) == before
    mechanism.delete(snapshot.plan)


def test_a_thin_snapshot_that_is_given_up_before_it_is_settled_says_why(folder: Path, thin: tuple[Disk, Disk]) -> None:
    mechanism, (disk, _) = mechanism_with(folder, pool_limit="20"), thin
    (snapshot,) = taken_of(mechanism, disk)
    fill(disk, 0, 8 * MIB)
    eventually(lambda: not ours(), "it is given up", 60)
    with pytest.raises(SnapshotError, match=r"the snapshot vg/vmsnap-t\.0 is lost: thin pool vg/pool is full to 25%"):
        mechanism.settle([snapshot])
    mechanism.delete(snapshot.plan)


def test_metadata_that_fills_up_is_seen_like_data(folder: Path) -> None:
    chunk = 64 << 10
    with volume_group(folder, "large", 2200) as group:
        # As much as 32768 chunks of data; metadata, the least that LVM makes, for far fewer.
        lvm(
            "lvcreate", "--yes", "--type", "thin-pool", "--size", "2048m", "--chunksize", "64k", "--zero", "n",
            "--poolmetadatasize", "2m", "--name", "pool", group,
        )  # fmt: skip
        disk = make_thin(group, "pool", "scattered", 256)

        def scatter(each: int) -> None:
            for at in range(0, disk.size_bytes, each * chunk):
                write(disk.address, at, b"scattered")
            sync(disk.address)

        def used(what: str) -> float:
            return float(lvm("lvs", "--noheadings", "--options", f"{what}_percent", f"{group}/pool"))

        def use_metadata(snapshots: str) -> None:
            """Up to the limit: one chunk of each node of the tree is written, after each of a user's snapshots."""
            for number in range(12):
                scatter(64)
                if used("metadata") >= limit:
                    assert used("data") < limit, "it shall be the metadata's turn"
                    return
                lvm("lvcreate", "--snapshot", "--name", f"{snapshots}-{number}", f"{group}/scattered")
            raise AssertionError("the metadata does not grow")

        scatter(4)
        limit = math.floor(used("metadata")) + 3
        mechanism = mechanism_with(folder, pool_limit=str(limit))
        (snapshot,) = taken_of(mechanism, disk)
        mechanism.settle([snapshot])
        use_metadata("users")
        eventually(lambda: not ours(), "it is relieved of the snapshot", 60)
        with pytest.raises(SnapshotError, match=r"is lost: thin pool large/pool is full to \d+% \(metadata \d\d%\)"):
            mechanism.reader(snapshot)
        mechanism.delete(snapshot.plan)

        use_metadata("more")
        with pytest.raises(SnapshotError) as refused:
            mechanism.plan("vm001", [disk], "vmsnap-t", Window.FREE)
        assert "\n" not in str(refused.value)
        assert f"of its metadata is used, {limit}% is the limit" in str(refused.value)


def test_a_group_without_room_is_told_of_and_a_disk_more_helps(folder: Path, group: str, thick: Disk) -> None:
    mechanism = mechanism_with(folder, snapshot_size="2M")
    free = int(float(lvm("vgs", "--noheadings", "--units", "m", "--nosuffix", "--options", "vg_free", group)))
    (snapshot,) = taken_of(mechanism, thick)
    make_thick(group, "rest", free - 2)
    fill(thick, 0, 3 * MIB // 2)

    def health() -> list[Finding]:
        return list(mechanism.health(snapshot.plan))

    eventually(lambda: bool(health()), "it is told", 60)
    (told,) = health()
    assert told.subject == f"the snapshot vg/vmsnap-t.0 of {thick.address}"
    assert "group vg has no room left to extend it" in told.message
    assert told.cure == "add a disk to the group: vgextend vg DEVICE"
    lvm("lvremove", "--force", f"{group}/rest")
    eventually(lambda: not health(), "with room again it is extended", 60)
    fill(thick, 3 * MIB // 2, MIB)
    mechanism.settle([snapshot])
    with mechanism.reader(snapshot) as reader:
        assert len(read_all(reader)) == thick.size_bytes
    mechanism.delete(snapshot.plan)
    assert not health()
