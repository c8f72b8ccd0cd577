"""What is read of a thin volume, beside what the volume has: with an origin outside of its pool, and while nobody can
say which blocks it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thick, make_thin, run, volume_group, volumes
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, DiskSnapshot, Window
from vmsnap.roles import DriverContext
from vmsnap.testing.rigs import read_all, same
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.snapshots.lvm import LvmMechanism

pytestmark = pytest.mark.storage
BLOCK = 64 << 10
"""Of the pool, as LVM makes it."""


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("group"), "vg-x", 64) as name:
        make_pool(name, "pool", 16)
        yield name


@pytest.fixture
def mechanism(tmp_path: Path, group: str) -> Iterator[LvmMechanism]:
    made = LvmMechanism(DriverContext(tmp_path, tmp_path), {"pause_seconds": "60", "marks": "1"})
    yield made
    made.close()
    if left := [name for name in volumes() if not name.endswith("]") and "pool" not in name]:
        lvm("lvremove", "--force", *sorted(left, key=lambda name: "/base" in name))  # origins last


def converted(group: str) -> Disk:
    """A thick volume that became thin where it lay."""
    disk = make_thick(group, "disk", 2)
    write(disk.address, 0, os.urandom(disk.size_bytes))
    sync(disk.address)
    lvm("lvconvert", "--yes", "--type", "thin", "--thinpool", f"{group}/pool", "--originname", "base", f"{group}/disk")
    return disk


def of_a_template(group: str) -> Disk:
    """A thin volume upon a thick template, and larger than that."""
    base = make_thick(group, "base", 1)
    write(base.address, 0, os.urandom(base.size_bytes))
    sync(base.address)
    lvm("lvchange", "--permission", "r", f"{group}/base")
    lvm("lvchange", "--activate", "n", f"{group}/base")
    lvm("lvcreate", "--yes", "--snapshot", "--thinpool", f"{group}/pool", "--name", "disk", f"{group}/base")
    lvm("lvextend", "--size", "2m", f"{group}/disk")
    return Disk("disk", f"/dev/{group}/disk", 2 * MIB)


def taken(mechanism: LvmMechanism, disk: Disk, tag: str) -> tuple[DiskSnapshot, bytes]:
    """A snapshot, and what it is to be read as."""
    sync(disk.address)
    content = Path(disk.address).read_bytes()
    plan = mechanism.plan("vm001", [disk], tag, Window.FREE)
    mechanism.prepare(plan)
    (snapshot,) = mechanism.snapshot(plan)
    mechanism.settle([snapshot])
    return snapshot, content


@pytest.mark.parametrize("made", [converted, of_a_template])
def test_what_lies_in_an_external_origin_is_read(mechanism: LvmMechanism, group: str, made: object) -> None:
    disk = made(group)  # type: ignore[operator]
    write(disk.address, 3 * BLOCK, os.urandom(BLOCK))
    first, content = taken(mechanism, disk, "vmsnap-a")
    assert content.count(0) < disk.size_bytes * 0.6, "else this would show nothing"
    with mechanism.reader(first) as reader:
        assert same(read_all(reader), content)

    mechanism.keep_mark(first)
    write(disk.address, 9 * BLOCK + 512, os.urandom(BLOCK))
    second, newer = taken(mechanism, disk, "vmsnap-b")
    with mechanism.reader(second) as reader:
        assert same(read_all(reader), newer)
    brought_up = bytearray(content)
    changed = list(mechanism.changed_extents(second, first.mark))
    for extent in changed:
        brought_up[extent.offset : extent.offset + extent.length] = newer[extent.offset :][: extent.length]
    assert same(bytes(brought_up), newer)
    assert sum(extent.length for extent in changed) == 2 * BLOCK

    plan = mechanism.plan_clone(second, "bk001", Path("/nowhere"), lasting=False)
    clone = mechanism.clone(plan, second)
    write(clone.address, 12 * BLOCK, own := os.urandom(512))
    sync(clone.address)
    with mechanism.clone_reader(plan, clone) as reader:
        assert same(read_all(reader), newer[: 12 * BLOCK] + own + newer[12 * BLOCK + 512 :])
    mechanism.delete_clone(plan)
    mechanism.delete(first.plan)
    mechanism.delete(second.plan)
    mechanism.forget_marks("vm001")


def test_while_another_program_holds_the_pools_metadata_all_is_read_and_it_is_said(
    mechanism: LvmMechanism, group: str
) -> None:
    disk = make_thin(group, "pool", "disk", 2)
    write(disk.address, BLOCK, os.urandom(BLOCK))
    snapshot, content = taken(mechanism, disk, "vmsnap-a")
    mechanism.keep_mark(snapshot)
    run("dmsetup", "message", "vg--x-pool-tpool", "0", "reserve_metadata_snap")
    cure = "dmsetup message vg--x-pool-tpool 0 release_metadata_snap"
    with mechanism.reader(snapshot) as reader:
        assert [(extent.length, extent.zero) for extent in reader.extents()] == [(disk.size_bytes, False)]
        assert "was read whole: another program holds" in reader.remark() and cure in reader.remark()
        assert same(read_all(reader), content)
        with pytest.raises(SnapshotError, match="another program holds the metadata snapshot of the thin pool"):
            list(mechanism.changed_extents(snapshot, snapshot.mark))
        (note,) = (finding for finding in mechanism.doctor() if finding.severity == "note")
        assert note.subject == f"{group}/pool" and cure in note.cure
        run(*cure.split())
        assert [(extent.length, extent.zero) for extent in reader.extents()] == [
            (BLOCK, True), (BLOCK, False), (disk.size_bytes - 2 * BLOCK, True)
        ]  # fmt: skip
        assert reader.remark() == ""
    assert {finding.severity for finding in mechanism.doctor()} == {"ok"}
    mechanism.delete(snapshot.plan)
    mechanism.forget_marks("vm001")


class WithoutThinTools(LocalRunner):
    """A host where thin-provisioning-tools is not installed."""

    def find(self, program: str) -> str | None:
        return None if program.startswith("thin_") else super().find(program)


def test_without_the_tools_all_is_read_and_it_is_said_what_to_install(group: str, tmp_path: Path) -> None:
    disk = make_thin(group, "pool", "disk", 2)
    write(disk.address, BLOCK, os.urandom(BLOCK))
    mechanism = LvmMechanism(DriverContext(tmp_path, tmp_path), {"pause_seconds": "60"}, WithoutThinTools())
    snapshot, content = taken(mechanism, disk, "vmsnap-a")
    with mechanism.reader(snapshot) as reader:
        assert same(read_all(reader), content)
        assert "thin_dump is not installed (install thin-provisioning-tools)" in reader.remark()
    mechanism.delete(snapshot.plan)
    lvm("lvremove", "--force", f"{group}/disk")


def test_a_group_that_is_away_keeps_nothing_of_ours_in_the_others(mechanism: LvmMechanism, group: str) -> None:
    folder = Path("/run/vmsnap-away")
    folder.mkdir()
    with volume_group(folder, "vg-away", 16) as away:
        disks = [make_thick(group, "disk", 1), make_thick(away, "disk", 1)]
        plan = mechanism.plan("vm001", disks, "vmsnap-a", Window.FREE)
        mechanism.prepare(plan)
        mechanism.snapshot(plan)
        assert {name for name in volumes() if name.endswith("vmsnap-a.0") or name.endswith("vmsnap-a.1")} == {
            f"{group}/vmsnap-a.0", f"{away}/vmsnap-a.1"
        }  # fmt: skip
        device = run("pvs", "--noheadings", "--options", "pv_name", "--select", f"vg_name={away}").strip()
        lvm("vgchange", "--activate", "n", away)
        run("losetup", "--detach", device)
        with pytest.raises(SnapshotError, match='"vg-away" not found') as caught:
            mechanism.delete(plan)
        assert "bring its disks back, then: vmsnap recover" in str(caught.value)
        assert f"{group}/vmsnap-a.0" not in volumes()
        run("losetup", device, str(folder / f"{away}.pv"))
        lvm("vgchange", "--activate", "y", away)
        assert f"{away}/vmsnap-a.1" in volumes()
        mechanism.delete(plan)
        assert f"{away}/vmsnap-a.1" not in volumes()
    folder.rmdir()
