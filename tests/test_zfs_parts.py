"""What of the mechanism ``zfs`` reads streams of a real ZFS, whole and cut short; and a host that has none."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_rig import sync, write
from tests.lab.zfs_fuse import ZfsFuse, programs
from tests.test_zfs_contract import zfs
from tests.zfs_rig import MIB, make_image
from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.runs import Runs
from vmsnap_drivers.snapshots.zfs import ZfsMechanism, stream

__all__ = ["zfs"]

RECORD = 312


def found(content: bytes, wanted: int, size_bytes: int, folder: Path) -> list[tuple[int, int]]:
    with Runs(folder) as runs:
        stream.find(io.BytesIO(content), wanted, size_bytes, runs)
        return list(runs)


@pytest.fixture(scope="module")
def change(zfs: ZfsFuse) -> Iterator[tuple[bytes, Path]]:
    """The stream of a change in the middle of an image file of 4 MiB, and in another file; and that image."""
    zfs.run("zfs", "create", f"{zfs.pool}/sent")
    image = zfs.mounted / "sent" / "a.img"
    make_image(image, 4 * MIB, "disk0")
    write(str(image), 0, os.urandom(4 * MIB))
    sync(str(image))
    zfs.run("zfs", "snapshot", f"{zfs.pool}/sent@one")
    write(str(image), 2 * MIB, os.urandom(300 << 10))
    sync(str(image))
    (image.parent / "other").write_bytes(os.urandom(MIB))
    zfs.run("zfs", "snapshot", f"{zfs.pool}/sent@two")
    argv = [str(programs() / "zfs"), "send", "-i", f"{zfs.pool}/sent@one", f"{zfs.pool}/sent@two"]
    yield subprocess.run(argv, capture_output=True, check=True).stdout, image
    zfs.run("zfs", "destroy", "-r", f"{zfs.pool}/sent")


@pytest.mark.lab
def test_what_changed_in_one_file_is_found_in_a_real_stream(change: tuple[bytes, Path], tmp_path: Path) -> None:
    content, image = change
    ((begin, end),) = found(content, image.stat().st_ino, 4 * MIB, tmp_path)
    assert begin == 2 * MIB and 2 * MIB + (300 << 10) <= end <= 2 * MIB + (384 << 10)


@pytest.mark.lab
def test_a_stream_that_is_cut_short_or_another_one_is_refused(change: tuple[bytes, Path], tmp_path: Path) -> None:
    content, image = change
    chance = random.Random(1)
    for length in (0, 1, RECORD - 1, RECORD, *(chance.randrange(len(content)) for _ in range(50)), len(content) - 1):
        with pytest.raises(SnapshotError, match="zfs send ends early"):
            found(content[:length], image.stat().st_ino, 4 * MIB, tmp_path)
    with pytest.raises(SnapshotError, match="does not speak as expected"):
        found(bytes(8 << 10), 1, MIB, tmp_path)
    with pytest.raises(SnapshotError, match="a record of the kind 77"):
        found(content[:RECORD] + struct.pack("<II", 77, 0) + bytes(RECORD), 1, 4 * MIB, tmp_path)


@pytest.mark.lab
def test_more_change_than_the_disk_is_large_is_refused(change: tuple[bytes, Path], tmp_path: Path) -> None:
    content, image = change
    ending = content[-RECORD:]
    much = content[:-RECORD] + struct.pack("<II", 3, 0) + struct.pack("<QQQQ", 7, 0, 0, 32 * MIB)
    much += bytes(RECORD - 40) + bytes(32 * MIB) + ending
    with pytest.raises(SnapshotError, match="more has changed in the disk's file system"):
        found(much, image.stat().st_ino, 4 * MIB, tmp_path)


def test_runs_are_put_together_and_may_be_many(tmp_path: Path) -> None:
    with Runs(tmp_path) as runs:
        for begin in (0, 10, 20, 50, 50, 7):
            runs.add(begin, begin + 10)
        runs.add(3, 3)
        for begin in range(100, 40_100, 4):
            runs.add(begin, begin + 2)
        result = list(runs)
    assert result[:4] == [(0, 30), (50, 60), (50, 60), (7, 17)] and len(result) == 10_004


class Nowhere(LocalRunner):
    """A host without ZFS."""

    def find(self, program: str) -> str | None:
        return None


def test_a_host_without_zfs_handles_nothing_owns_nothing_and_says_what_to_install(tmp_path: Path) -> None:
    mechanism = ZfsMechanism(DriverContext(tmp_path, tmp_path), {}, Nowhere())
    disk = Disk("disk0", "/dev/null", MIB)
    assert not mechanism.handles(disk) and not mechanism.list_owned()
    mechanism.forget_marks("vm001")
    (finding,) = mechanism.doctor()
    assert finding.severity == "missing" and "zfsutils-linux" in finding.cure
    with pytest.raises(DriverUnavailable, match="zfsutils-linux"):
        mechanism.plan("vm001", [disk], "vmsnap-t", Window.FREE)


@pytest.mark.parametrize(
    "options", [{"marks": "-1"}, {"marks": "x"}, {"pool_limit": "101"}, {"pause_seconds": "0"}], ids=str
)
def test_an_option_that_is_no_number_is_refused_when_the_plan_is_made(options: dict[str, str], tmp_path: Path) -> None:
    mechanism = ZfsMechanism(DriverContext(tmp_path, tmp_path), options, Nowhere())
    with pytest.raises(UsageError, match="is no whole number"):
        mechanism.plan("vm001", [], "vmsnap-t", Window.FREE)
