"""Images on their way into one backup: memory, device state, disks, one after the other under one progress bar."""

from __future__ import annotations

from pathlib import Path

from vmsnap.controller.previous import Previous
from vmsnap.controller.progress import Bars
from vmsnap.model import Disk, RamImage
from vmsnap.repository import (
    BackupWriter,
    BaseImage,
    DiskImage,
    ImageKind,
    ImageRecord,
    Manifest,
    MemoryImage,
    SparseFileReader,
)
from vmsnap.roles import DiskReader


class Storing:
    """One backup that is being written. `previous` is the newest one of the same VM."""

    def __init__(self, writer: BackupWriter, previous: Previous, bars: Bars) -> None:
        self.previous = previous
        self._writer = writer
        self._bars = bars

    def memory(self, image: RamImage) -> MemoryImage:
        """Store one block of RAM."""
        base = self.previous.memory(image)
        with SparseFileReader(image.path, image.size_bytes) as source:
            record = self._writer.add_image(f"memory {image.region}", source, ImageKind.RAM, self._bars.part, base=base)
        self._bars.part_done(image.size_bytes)
        return MemoryImage(image.region, image.page_bytes, record)

    def device_state(self, path: Path) -> ImageRecord:
        """Store vCPU and device state."""
        return self._writer.add_blob("device state", path.read_bytes())

    def disk(self, disk: Disk, mechanism: str, source: DiskReader, base: BaseImage | None, mark: str = "") -> DiskImage:
        """Store what `source` reads as the content of `disk`, and close it."""
        with source:
            record = self._writer.add_image(f"disk {disk.device}", source, ImageKind.DISK, self._bars.part, base=base)
        self._bars.part_done(disk.size_bytes)
        return DiskImage(disk.device, disk.size_bytes, disk.format, disk.address, mechanism, record, mark)


def stored_text(manifest: Manifest) -> str:
    """What the journal says of a backup that is stored."""
    return f"backup {manifest.backup}, {manifest.stats.stored_bytes} bytes stored"
