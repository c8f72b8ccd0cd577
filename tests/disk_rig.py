"""Real disks that lie in the file system, as the contract suite of snapshot mechanisms needs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from vmsnap.model import Disk
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig


def write(address: str, offset: int, data: bytes) -> None:
    """Write to a file or a device, through the page cache."""
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


class DiskRig(SnapshotRig):
    """Some disks; the writer is the test itself."""

    kind: ClassVar[type[SnapshotMechanism]]

    def __init__(
        self, folder: Path, disks: Sequence[Disk], options: dict[str, str], empty: Callable[[Disk], None]
    ) -> None:
        self.scratch = folder
        self.context = DriverContext(folder / "state", folder / "memory")
        self.options = options
        self._disks = tuple(disks)
        self.mechanisms: list[SnapshotMechanism] = []
        for disk in disks:
            empty(disk)
            for at in (0, 100 << 10, disk.size_bytes // 2, disk.size_bytes - 4096):
                write(disk.address, at, os.urandom(4096))

    def mechanism(self) -> SnapshotMechanism:
        self.mechanisms.append(self.kind(self.context, self.options))
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
