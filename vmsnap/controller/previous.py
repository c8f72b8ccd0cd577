"""What the backup before this one can spare it: trees that are shared, and disks of which only the changes are read."""

from __future__ import annotations

from collections.abc import Iterator

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, DiskSnapshot, Extent, RamImage
from vmsnap.repository import BaseImage, DiskImage, Manifest
from vmsnap.roles import SnapshotMechanism


class Previous:
    """The newest backup of the same VM, or none."""

    def __init__(self, manifest: Manifest | None) -> None:
        self._manifest = manifest

    def memory(self, image: RamImage) -> BaseImage | None:
        """The image of the same memory region."""
        for memory in self._manifest.memory if self._manifest else ():
            if memory.region == image.region:
                return BaseImage(memory.image)
        return None

    def disk(self, snapshot: DiskSnapshot, mechanism: str, driver: SnapshotMechanism) -> BaseImage | None:
        """The image of the same device, and what has changed since, where the snapshot mechanism can say so.

        It is asked only where the disk is the same by its address, size and mechanism, and bore a mark.
        """
        disk = snapshot.disk
        for old in self._manifest.disks if self._manifest else ():
            if old.device != disk.device:
                continue
            if not old.mark or not driver.changes:
                return BaseImage(old.image)
            if replaced := _replaced(old, disk, mechanism):
                return BaseImage(old.image, _unknown(replaced))
            return BaseImage(old.image, _changes(driver, snapshot, old.mark))
        return None

    def mark(self, snapshot: DiskSnapshot, mechanism: str) -> str:
        """The mark of the same device by the same mechanism; empty where there is none."""
        for old in self._manifest.disks if self._manifest else ():
            if (old.device, old.mechanism) == (snapshot.disk.device, mechanism):
                return old.mark
        return ""

    def disk_content(self, device: str) -> BaseImage | None:
        """The image of the same device, for a disk that no record of changes stands for: all of it is read."""
        for old in self._manifest.disks if self._manifest else ():
            if old.device == device:
                return BaseImage(old.image)
        return None


def _replaced(old: DiskImage, disk: Disk, mechanism: str) -> str:
    """What shows that it is another disk than it was; empty where nothing does."""
    for what, before, now in (
        ("its address", old.address, disk.address),
        ("its size in bytes", old.size_bytes, disk.size_bytes),
        ("its snapshot mechanism", old.mechanism, mechanism),
    ):
        if before != now:
            return f"{what} was {before} and is {now}"
    return ""


def _unknown(why: str) -> Iterator[Extent]:
    raise SnapshotError(why)
    yield  # what makes it an iterator, which raises when it is asked and not before


def _changes(driver: SnapshotMechanism, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
    """Asked when it is needed, so that a mechanism that cannot say costs the hint and not the backup."""
    yield from driver.changed_extents(snapshot, since)
