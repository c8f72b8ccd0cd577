"""Real volume groups in the storage guest, on loop devices in RAM, and a rig of two disks in one."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.disk_rig import DiskRig
from vmsnap.model import Disk
from vmsnap.roles import SnapshotMechanism
from vmsnap_drivers.snapshots.lvm import LvmMechanism

MIB = 1 << 20
_WITHOUT_UDEV = "activation{udev_sync=0 udev_rules=0 monitoring=0}"
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F


def lvm(command: str, *arguments: str) -> str:
    """One of LVM's commands, past the mechanism."""
    return run("lvm", command, "--config", _WITHOUT_UDEV, *arguments)


def run(*argv: str) -> str:
    """A command that must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def volume_group(folder: Path, name: str, size_mib: int = 160) -> Iterator[str]:
    """An empty volume group of 1 MiB extents."""
    run("modprobe", "loop", "max_loop=0")
    for module in ("dm-snapshot", "dm-thin-pool"):
        run("modprobe", module)
    image = folder / f"{name}.pv"
    with image.open("wb") as file:
        file.truncate(size_mib * MIB)
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        lvm("pvcreate", "--quiet", device)
        lvm("vgcreate", "--quiet", "--physicalextentsize", "1m", name, device)
        yield name
        lvm("vgremove", "--force", "--force", "--yes", name)
    finally:
        run("losetup", "--detach", device)
        image.unlink()


def make_thick(group: str, name: str, size_mib: int) -> Disk:
    """A thick volume."""
    lvm("lvcreate", "--yes", "--size", f"{size_mib}m", "--name", name, group)
    return Disk(name, f"/dev/{group}/{name}", size_mib * MIB)


def make_pool(group: str, name: str, size_mib: int) -> None:
    """A thin pool."""
    lvm("lvcreate", "--yes", "--type", "thin-pool", "--size", f"{size_mib}m", "--name", name, group)


def make_thin(group: str, pool: str, name: str, size_mib: int) -> Disk:
    """A volume in it."""
    lvm("lvcreate", "--yes", "--virtualsize", f"{size_mib}m", "--thinpool", pool, "--name", name, group)
    return Disk(name, f"/dev/{group}/{name}", size_mib * MIB)


def volumes() -> dict[str, str]:
    """All volumes of all groups by their full names, each with its attributes."""
    report = lvm("lvs", "--all", "--reportformat", "json", "--options", "lv_full_name,lv_attr")
    return {row["lv_full_name"]: row["lv_attr"] for row in json.loads(report)["report"][0]["lv"]}


def empty(disk: Disk, *, discard: bool) -> None:
    """Have the whole disk read as zeros."""
    descriptor = os.open(disk.address, os.O_WRONLY)
    try:
        fcntl.ioctl(descriptor, _BLKDISCARD if discard else _BLKZEROOUT, struct.pack("QQ", 0, disk.size_bytes))
    finally:
        os.close(descriptor)


class LvmRig(DiskRig):
    """Two volumes."""

    kind = LvmMechanism

    def __init__(self, folder: Path, disks: tuple[Disk, ...], options: dict[str, str], *, thin: bool) -> None:
        super().__init__(folder, disks, options, partial(empty, discard=thin))

    def traces(self) -> frozenset[str]:
        # the folder of locks of the mechanism stays
        files = {str(path) for path in self.scratch.rglob("*") if not path.name.endswith(".lock")}
        return frozenset(files - {str(self.context.state_dir), str(self.context.state_dir / "lvm")} | set(volumes()))

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        index = self._disks.index(disk)
        (name,) = (owned.name for owned in mechanism.list_owned() if owned.name.endswith(f".{index}"))
        lvm("lvremove", "--force", name)

    def end(self) -> None:
        """Let nothing of it watch any more, and remove what a test that failed has left."""
        for mechanism in self.mechanisms:
            mechanism.close()
        left = [name for name in volumes() if "/vmsnap-" in name]
        if left:
            lvm("lvremove", "--force", *left)
