"""Disks on a real ZFS, volumes or image files, as the contract suite needs them; the same for zfs-fuse and OpenZFS."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vmsnap.model import Disk
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig
from vmsnap_drivers.snapshots.zfs import ZfsMechanism

MIB = 1 << 20
Run = Callable[..., str]
"""Gives a command to ZFS past the mechanism, and returns what it prints."""


def make_image(path: Path, size_bytes: int, device: str) -> Disk:
    """An empty image file."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return Disk(device, str(path), size_bytes)


def write(address: str, offset: int, data: bytes) -> None:
    """Write to a file or a device."""
    descriptor = os.open(address, os.O_WRONLY)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
    finally:
        os.close(descriptor)


def sync(address: str) -> None:
    """Bring all that was written there."""
    descriptor = os.open(address, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def names(run: Run, pool: str) -> set[str]:
    """All that there is in a pool, bookmarks too where there are such."""
    return set(run("zfs", "list", "-H", "-r", "-t", "all", "-o", "name", pool).splitlines())


class ZfsRig(SnapshotRig):
    """Two disks; the writer is the test itself."""

    def __init__(
        self, run: Run, pool: str, folder: Path, disks: Sequence[Disk], options: dict[str, str] | None = None
    ) -> None:
        self.scratch = folder
        self.context = DriverContext(folder / "state", folder / "memory")
        self.options = {"pause_seconds": "60", **(options or {})}
        self._run, self._pool, self._disks = run, pool, tuple(disks)
        self.mechanisms: list[SnapshotMechanism] = []
        for disk in disks:
            write(disk.address, 0, bytes(disk.size_bytes))
            for at in (0, 100 << 10, disk.size_bytes // 2, disk.size_bytes - 4096):
                write(disk.address, at, os.urandom(4096))

    def mechanism(self) -> SnapshotMechanism:
        self.mechanisms.append(ZfsMechanism(self.context, self.options))
        return self.mechanisms[-1]

    def disks(self) -> tuple[Disk, ...]:
        return self._disks

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        write(disk.address, offset, data)

    def content(self, disk: Disk) -> bytes:
        return Path(disk.address).read_bytes()

    def pause(self) -> None:
        for disk in self._disks:
            sync(disk.address)

    def resume(self) -> None:
        pass

    def traces(self) -> frozenset[str]:
        # the folders of the mechanism stay
        own = self.context.state_dir
        files = {str(path) for path in self.scratch.rglob("*")}
        return frozenset(files - {str(own), str(own / "zfs"), str(own / "zfs/marks")} | names(self._run, self._pool))

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        index = self._disks.index(disk)
        (reader,) = (owned.name for owned in mechanism.list_owned() if owned.name.endswith(f".{index}"))
        self._run("zfs", "destroy", reader)

    def end(self) -> None:
        """Let nothing of it watch any more, and remove what a test that failed has left."""
        for mechanism in self.mechanisms:
            mechanism.close()
            for owned in mechanism.list_owned():
                mechanism.remove_owned(owned)
