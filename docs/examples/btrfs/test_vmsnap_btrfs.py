"""The btrfs mechanism keeps the contract of its role, on a real btrfs on a loop device. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.figures import SnapshotFigures
from vmsnap.testing.rigs import SnapshotRig
from vmsnap.testing.snapshot import SnapshotContract, contents_of, live
from vmsnap.testing.snapshot_machine import SnapshotMachine
from vmsnap_btrfs import BtrfsMechanism
from vmsnap_btrfs.subvolumes import is_subvolume

MIB = 1 << 20


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty btrfs."""
    folder = tmp_path_factory.mktemp("btrfs")
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


class BtrfsRig(SnapshotRig):
    """Two images in one subvolume, and a third one in another; the writer is the test itself."""

    def __init__(self, folder: Path) -> None:
        self.scratch = folder
        folder.mkdir()
        self.context = DriverContext(folder / "state", folder / "memory")
        self._disks = []
        for device, subvolume, size in (("disk0", "web", MIB), ("disk1", "web", 3 * MIB), ("disk2", "data", MIB)):
            place = folder / subvolume
            if not place.exists():
                subprocess.run(["btrfs", "subvolume", "create", str(place)], check=True, capture_output=True)
            (place / "images").mkdir(exist_ok=True)
            disk = Disk(device, str(place / "images" / f"{device}.img"), size, handle={"plain_file": "yes"})
            with Path(disk.address).open("wb") as image:
                image.truncate(size)
            for at in (0, 100 << 10, size // 2, size - 4096):
                self.write(disk, at, os.urandom(4096))
            self._disks.append(disk)

    def mechanism(self) -> SnapshotMechanism:
        return BtrfsMechanism(self.context, {})

    def disks(self) -> tuple[Disk, ...]:
        return tuple(self._disks)

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        with Path(disk.address).open("r+b") as image:
            image.seek(offset)
            image.write(data)

    def content(self, disk: Disk) -> bytes:
        return Path(disk.address).read_bytes()

    def pause(self) -> None:
        """btrfs puts what is in the page cache into the snapshot: nothing needs to be written out."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def traces(self) -> frozenset[str]:
        # the notes of folders stay: they are how strays are found
        paths = (path for path in self.scratch.rglob("*") if not path.is_relative_to(self.context.state_dir))
        return frozenset(str(path) for path in paths)

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        for entry in mechanism.list_owned():
            subprocess.run(["btrfs", "subvolume", "delete", entry.name], check=True, capture_output=True)

    def end(self) -> None:
        for path in sorted(self.scratch.rglob("*"), reverse=True):
            if is_subvolume(path):
                subprocess.run(["btrfs", "subvolume", "delete", str(path)], check=True, capture_output=True)
        subprocess.run(["rm", "-r", str(self.scratch)], check=True)


class TestBtrfs(SnapshotContract):
    @pytest.fixture
    def rig(self, mount: Path) -> Iterator[BtrfsRig]:
        rig = BtrfsRig(mount / "rig")
        yield rig
        rig.end()

    def test_disks_of_one_subvolume_have_the_very_same_instant(self, rig: BtrfsRig) -> None:
        life = live(rig)
        first, second, elsewhere = (snapshot.instant.monotonic_ns for snapshot in life.snapshots)
        assert first == second < elsewhere
        life.end()

    def test_what_is_no_raw_image_in_a_subvolume_is_refused(self, rig: BtrfsRig, tmp_path: Path) -> None:
        disk = rig.disks()[0]
        (tmp_path / "elsewhere").write_bytes(bytes(disk.size_bytes))
        for wrong in (
            replace(disk, format="qcow2"),
            replace(disk, handle={}),
            replace(disk, address=str(tmp_path / "elsewhere")),
            replace(disk, address=str(Path(disk.address).parent)),
        ):
            assert not rig.mechanism().handles(wrong)
            with pytest.raises(SnapshotError, match="no raw image"):
                rig.mechanism().plan("vm001", [wrong], "vmsnap-x", Window.FREE)

    def test_a_plan_that_names_other_folders_deletes_nothing(self, rig: BtrfsRig) -> None:
        life = live(rig)
        subvolume = str(Path(rig.disks()[0].address).parents[1])
        for name in (subvolume, f"{subvolume}/../{life.plan.tag}", "relative"):
            forged = replace(life.plan, data={**life.plan.data, "snapshots": [name, *life.plan.data["snapshots"][1:]]})
            with pytest.raises(SnapshotError, match="no snapshot of it"):
                life.mechanism.delete(forged)
        assert contents_of(life.mechanism, life) == list(life.contents)
        life.end()

    def test_a_btrfs_that_hangs_is_given_up(
        self, rig: BtrfsRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        life = live(rig, "prepare")
        (tmp_path / "btrfs").write_text("#!/bin/sh\nexec sleep 600\n")
        (tmp_path / "btrfs").chmod(0o755)
        impatient = BtrfsMechanism(rig.context, {"timeout": "0.1"})
        with monkeypatch.context() as patched, pytest.raises(SnapshotError, match="not done within"):
            patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            impatient.snapshot(life.plan)
        life.end()


class TestFigures(SnapshotFigures):
    rig = TestBtrfs.rig


class TestMachine(SnapshotMachine):
    examples = 6
    rig = TestBtrfs.rig
