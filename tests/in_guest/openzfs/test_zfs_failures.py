"""What volumes, bookmarks and rights add to what can go wrong; the rest is tried on zfs-fuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.openzfs.pools import make_volume, pool, run
from tests.zfs_console import see_the_commands
from tests.zfs_rig import MIB, TAG, make_image, names, snapshot_of
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap.testing.rigs import read_all
from vmsnap_drivers.snapshots.zfs import ZfsMechanism

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pool(tmp_path_factory.mktemp("pool"), "tank", 320) as name:
        run("zfs", "create", f"{name}/vm")
        yield name


@pytest.fixture(scope="module")
def folder(tank: str) -> Path:
    return Path(run("zfs", "get", "-H", "-o", "value", "mountpoint", f"{tank}/vm").strip())


@pytest.fixture
def mechanism(tmp_path: Path) -> Iterator[ZfsMechanism]:
    made = ZfsMechanism(DriverContext(tmp_path / "state", tmp_path / "memory"), {"pause_seconds": "60"})
    yield made
    made.forget_marks("vm001")
    made.close()
    for owned in made.list_owned():
        made.remove_owned(owned)


def marked(mechanism: ZfsMechanism, disk: Disk, tag: str) -> str:
    """The mark of a snapshot that is gone."""
    (taken,) = snapshot_of(mechanism, disk, tag=tag)
    mechanism.keep_mark(taken)
    mechanism.delete(taken.plan)
    return taken.mark


def test_volumes_and_file_systems_of_a_pool_are_taken_by_one_command(
    mechanism: ZfsMechanism, tank: str, folder: Path
) -> None:
    disks = (make_volume(tank, "one", 2), make_image(folder / "one.img", MIB, "disk1"), make_volume(tank, "two", 2))
    taken = snapshot_of(mechanism, *disks)
    assert len({snapshot.instant for snapshot in taken}) == 1
    at = {run("zfs", "get", "-Hp", "-o", "value", "createtxg", f"{tank}/{name}@{TAG}") for name in ("one", "vm", "two")}
    assert len(at) == 1, "one transaction"
    mechanism.delete(taken[0].plan)


def test_a_snapshot_is_held_while_it_is_read(mechanism: ZfsMechanism, tank: str, folder: Path) -> None:
    disks = make_volume(tank, "held", 2), make_image(folder / "held.img", MIB, "disk1")
    taken = snapshot_of(mechanism, *disks)
    for name in ("held", "vm"):
        assert run("zfs", "get", "-H", "-o", "value", "userrefs", f"{tank}/{name}@{TAG}") == "1\n"
    mechanism.delete(taken[0].plan)
    assert not [name for name in names(run, tank) if name.endswith(f"@{TAG}")]


def test_what_was_written_to_a_volume_and_not_flushed_is_in_the_snapshot(mechanism: ZfsMechanism, tank: str) -> None:
    volume = make_volume(tank, "unsafe", 4)
    plan = mechanism.plan("vm001", [volume], TAG, Window.FREE)
    mechanism.prepare(plan)
    descriptor = os.open(volume.address, os.O_WRONLY)  # whoever closes it last flushes it
    try:
        assert os.pwrite(descriptor, wanted := os.urandom(volume.size_bytes), 0) == len(wanted)
        taken = mechanism.snapshot(plan)
        mechanism.settle(taken)
        with mechanism.reader(taken[0]) as reader:
            assert read_all(reader) == wanted
    finally:
        os.close(descriptor)
    mechanism.delete(plan)


def test_a_volume_whose_reservation_has_no_room_beside_a_snapshot_is_refused(
    mechanism: ZfsMechanism, tank: str
) -> None:
    big = make_volume(tank, "big", 110)
    write(big.address, 0, os.urandom(100 * MIB))
    sync(big.address)
    with pytest.raises(SnapshotError, match=f"no room in pool {tank}: .* to keep what its volumes have reserved"):
        mechanism.plan("vm001", [big], TAG, Window.FREE)
    run("zfs", "destroy", f"{tank}/big")


def test_a_partition_a_snapshots_device_and_a_larger_disk_are_not_handled(mechanism: ZfsMechanism, tank: str) -> None:
    volume = make_volume(tank, "whole", 2)
    assert mechanism.handles(volume)
    assert not mechanism.handles(Disk("disk0", volume.address, volume.size_bytes + 512))
    assert not mechanism.handles(Disk("disk0", volume.address, volume.size_bytes, format="qcow2"))
    assert not mechanism.handles(Disk("disk0", f"{volume.address}p1", MIB))


def test_only_what_changed_is_named_in_blocks_and_holes_too(mechanism: ZfsMechanism, tank: str, folder: Path) -> None:
    volume, image = make_volume(tank, "changing", 8, "-s"), make_image(folder / "changing.img", 8 * MIB, "disk1")
    for disk in (volume, image):
        write(disk.address, 0, os.urandom(8 * MIB))
        mark = marked(mechanism, disk, "vmsnap-before")
        write(disk.address, 5 * MIB, os.urandom(4096))
        if disk is image:
            with Path(disk.address).open("r+b") as file:
                subprocess.run(["fallocate", "-p", "-o", str(MIB), "-l", str(MIB), disk.address], check=True)
                os.fsync(file.fileno())
        (taken,) = snapshot_of(mechanism, disk)
        changed = [(extent.offset, extent.length) for extent in mechanism.changed_extents(taken, mark)]
        assert any(offset <= 5 * MIB < offset + length for offset, length in changed)
        most = 128 * 1024 + (MIB if disk is image else 0)
        assert sum(length for _, length in changed) <= most
        if disk is image:
            assert (MIB, MIB) in changed
        mechanism.delete(taken.plan)
        mechanism.forget_marks("vm001")


def test_a_file_that_was_made_anew_is_read_whole(mechanism: ZfsMechanism, folder: Path) -> None:
    image = make_image(folder / "anew.img", MIB, "disk0")
    mark = marked(mechanism, image, "vmsnap-before")
    Path(image.address).unlink()
    make_image(Path(image.address), MIB, "disk0")
    (taken,) = snapshot_of(mechanism, image)
    with pytest.raises(SnapshotError, match=r"anew\.img is another file than it was"):
        list(mechanism.changed_extents(taken, mark))
    mechanism.delete(taken.plan)


def test_where_more_has_changed_beside_the_disk_than_it_is_large_it_is_read_whole(
    mechanism: ZfsMechanism, folder: Path
) -> None:
    image = make_image(folder / "small.img", MIB, "disk0")
    mark = marked(mechanism, image, "vmsnap-before")
    (folder / "other").write_bytes(os.urandom(16 * MIB))
    (taken,) = snapshot_of(mechanism, image)
    with pytest.raises(SnapshotError, match="more has changed in the disk's file system"):
        list(mechanism.changed_extents(taken, mark))
    mechanism.delete(taken.plan)
    (folder / "other").unlink()


def test_a_bookmark_that_is_not_ours_or_is_gone_is_told_of_and_left_alone(
    mechanism: ZfsMechanism, tank: str, folder: Path
) -> None:
    image = make_image(folder / "marked.img", MIB, "disk0")
    mark = marked(mechanism, image, "vmsnap-before")
    run("zfs", "destroy", mark)
    (taken,) = snapshot_of(mechanism, image)
    with pytest.raises(SnapshotError, match="is gone"):
        list(mechanism.changed_extents(taken, mark))
    run("zfs", "snapshot", f"{tank}/vm@theirs")
    run("zfs", "bookmark", f"{tank}/vm@theirs", mark)
    with pytest.raises(SnapshotError, match="is gone"):
        list(mechanism.changed_extents(taken, mark))
    run("zfs", "bookmark", f"{tank}/vm@theirs", taken.mark)
    with pytest.raises(SnapshotError, match="which is not ours"):
        mechanism.keep_mark(taken)
    mechanism.delete(taken.plan)
    mechanism.forget_marks("vm001")
    assert {mark, taken.mark} <= names(run, tank)
    for name in (mark, taken.mark, f"{tank}/vm@theirs"):
        run("zfs", "destroy", name)


def test_the_commands_of_vmsnap_zfs(tank: str, folder: Path, tmp_path: Path) -> None:
    see_the_commands(run, tank, folder, tmp_path / "state")


def test_somebody_without_rights_is_told_which_command_gives_them(tank: str) -> None:
    volume = make_volume(tank, "allowed", 1)
    state = tempfile.mkdtemp()
    os.chown(state, 65534, 65534)
    for node, mode in (("/dev/zfs", 0o666), (volume.address, 0o644)):
        Path(node).chmod(mode)  # there is no udev here, whose rules do that
    script = f"""
import json, os
from pathlib import Path
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap_drivers.snapshots.zfs import ZfsMechanism
os.setgroups([]); os.setgid(65534); os.setuid(65534)
folder = Path({state!r})
mechanism = ZfsMechanism(DriverContext(folder, folder), {{"pause_seconds": "60"}})
disk = Disk("disk0", {volume.address!r}, {volume.size_bytes})
plan = mechanism.plan("vm001", [disk], {TAG!r}, Window.FREE)
mechanism.prepare(plan)
try:
    mechanism.snapshot(plan)
except SnapshotError as e:
    print(json.dumps({{"error": e.message, "cure": e.cure}}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "permission denied" in said["error"] and "zfs allow" in said["cure"]
