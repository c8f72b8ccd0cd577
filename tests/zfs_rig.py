"""Disks on a real ZFS, volumes or image files, as the contract suite needs them; the same for zfs-fuse and OpenZFS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.disk_rig import DiskRig, sync, write
from vmsnap.model import Disk, DiskSnapshot, Window
from vmsnap.roles import SnapshotMechanism
from vmsnap_drivers.snapshots.zfs import ZfsMechanism

MIB = 1 << 20
TAG = "vmsnap-t"
Run = Callable[..., str]
"""Gives a command to ZFS past the mechanism, and returns what it prints."""


def make_image(path: Path, size_bytes: int, device: str) -> Disk:
    """An empty image file."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return Disk(device, str(path), size_bytes)


def names(run: Run, pool: str) -> set[str]:
    """All that there is in a pool, bookmarks too where there are such."""
    return set(run("zfs", "list", "-H", "-r", "-t", "all", "-o", "name", pool).splitlines())


def snapshot_of(mechanism: SnapshotMechanism, *disks: Disk, tag: str = TAG) -> tuple[DiskSnapshot, ...]:
    """Snapshots of what was written to disks of ``vm001``."""
    plan = mechanism.plan("vm001", disks, tag, Window.FREE)
    mechanism.prepare(plan)
    for disk in disks:
        sync(disk.address)
    taken = tuple(mechanism.snapshot(plan))
    mechanism.settle(taken)
    return taken


class ZfsRig(DiskRig):
    """Two disks, volumes or image files."""

    kind = ZfsMechanism

    def __init__(
        self, run: Run, pool: str, folder: Path, disks: Sequence[Disk], options: dict[str, str] | None = None
    ) -> None:
        super().__init__(folder, disks, {"pause_seconds": "60", **(options or {})}, _empty)
        self._run, self._pool = run, pool

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


def _empty(disk: Disk) -> None:
    write(disk.address, 0, bytes(disk.size_bytes))
