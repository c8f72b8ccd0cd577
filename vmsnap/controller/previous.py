"""What the backup before this one can spare it: trees that are shared, and disks of which only the changes are read."""

from __future__ import annotations

from collections.abc import Iterator

from vmsnap.model import DiskSnapshot, Extent, RamImage
from vmsnap.repository import BaseImage, Manifest
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
            same = (old.address, old.size_bytes, old.mechanism) == (disk.address, disk.size_bytes, mechanism)
            if same and old.mark and driver.changes:
                return BaseImage(old.image, _changes(driver, snapshot, old.mark))
            return BaseImage(old.image)
        return None

    def disk_content(self, device: str) -> BaseImage | None:
        """The image of the same device, for a disk that no record of changes stands for: all of it is read."""
        for old in self._manifest.disks if self._manifest else ():
            if old.device == device:
                return BaseImage(old.image)
        return None


def _changes(driver: SnapshotMechanism, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
    """Asked when it is needed, so that a mechanism that cannot say costs the hint and not the backup."""
    yield from driver.changed_extents(snapshot, since)
