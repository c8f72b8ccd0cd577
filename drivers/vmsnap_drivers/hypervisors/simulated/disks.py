"""The virtual disks of a simulated VM: image files or block devices, locked against every other VM, written past no
one's back.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmsnap.errors import HypervisorError
from vmsnap_drivers.hypervisors.simulated.layout import MAX_DISKS, MIN_DISK_BYTES, PAGE
from vmsnap_drivers.hypervisors.simulated.overlay import Overlay


@dataclass(frozen=True)
class DiskImage:
    """One disk as the hypervisor is told of it."""

    device: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class OpenDisk:
    """One disk that a VM has open and locked; while it is frozen, what the guest writes goes to the `overlay`."""

    image: DiskImage
    descriptor: int
    size_bytes: int
    overlay: Overlay | None = None

    def read(self, size_bytes: int, offset: int) -> bytes:
        """What the guest sees there."""
        if self.overlay is not None:
            return self.overlay.read(size_bytes, offset)
        return os.pread(self.descriptor, size_bytes, offset)

    def write(self, data: bytes, offset: int) -> None:
        """Take it from the guest."""
        if self.overlay is not None:
            self.overlay.write(data, offset)
        else:
            os.pwrite(self.descriptor, data, offset)


def open_disk(image: DiskImage) -> OpenDisk:
    """Open and lock one image.

    The lock is flock's: it belongs to the open file, so it ends with the VM however the VM ends.

    :raises HypervisorError: it cannot be opened, is no image, or another VM has it
    """
    mode = os.O_RDONLY if image.read_only else os.O_RDWR
    try:
        descriptor = os.open(image.path, mode | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as e:
        raise HypervisorError(f"cannot open disk {image.device} at {image.path}: {e.strerror}") from e
    kind = os.fstat(descriptor).st_mode
    size_bytes = 0
    problem = ""
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        problem = "is neither a plain file nor a block device"
    elif (size_bytes := os.lseek(descriptor, 0, os.SEEK_END)) < MIN_DISK_BYTES or size_bytes % PAGE:
        problem = f"has {size_bytes} bytes; a disk has a multiple of {PAGE} and at least {MIN_DISK_BYTES}"
    else:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if image.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "is in use by another VM"
    if problem:
        os.close(descriptor)
        raise HypervisorError(f"disk {image.device} at {image.path} {problem}")
    return OpenDisk(image, descriptor, size_bytes)


class Disks:
    """All disks of one VM, in the VM's order."""

    def __init__(self, images: Sequence[DiskImage]) -> None:
        """Open and lock all of them, or none.

        :raises HypervisorError: one cannot be had
        """
        self.all = self._open(images)

    def _open(self, images: Sequence[DiskImage]) -> list[OpenDisk]:
        if not 1 <= len(images) <= MAX_DISKS:
            raise HypervisorError(f"a simulated VM has 1 to {MAX_DISKS} disks, not {len(images)}")
        opened: list[OpenDisk] = []
        try:
            for image in images:
                opened.append(open_disk(image))
        except HypervisorError:
            for disk in opened:
                os.close(disk.descriptor)
            raise
        return opened

    def switch(self, images: Sequence[DiskImage]) -> None:
        """Take these images instead, device by device; on failure the old ones stay.

        :raises HypervisorError: other devices than the VM's, another size, or an image that cannot be had
        """
        wanted = {image.device: image for image in images}
        if sorted(wanted) != sorted(disk.image.device for disk in self.all) or len(wanted) != len(images):
            raise HypervisorError(
                f"the VM has the disks {', '.join(disk.image.device for disk in self.all)}, "
                f"not {', '.join(image.device for image in images)}"
            )
        kept = {disk.image.device: disk for disk in self.all if wanted[disk.image.device] == disk.image}
        opened = self._open_others(wanted, kept)
        replaced = [disk for disk in self.all if disk.image.device not in kept]
        self.all = [kept.get(disk.image.device) or opened[disk.image.device] for disk in self.all]
        for disk in replaced:
            os.close(disk.descriptor)

    def _open_others(self, wanted: dict[str, DiskImage], kept: dict[str, OpenDisk]) -> dict[str, OpenDisk]:
        others = [image for device, image in wanted.items() if device not in kept]
        if not others:
            return {}
        opened = {disk.image.device: disk for disk in self._open(others)}
        for disk in self.all:
            new = opened.get(disk.image.device)
            if new is not None and new.size_bytes != disk.size_bytes:
                for other in opened.values():
                    os.close(other.descriptor)
                raise HypervisorError(
                    f"disk {disk.image.device} has {disk.size_bytes} bytes, {new.image.path} has {new.size_bytes}"
                )
        return opened

    def flush(self) -> None:
        """Bring everything written to the disks themselves."""
        for disk in self.all:
            if disk.overlay is not None:
                disk.overlay.flush()
            elif not disk.image.read_only:
                os.fdatasync(disk.descriptor)

    def freeze(self, overlays: Mapping[str, Path]) -> None:
        """Let writes to these devices go to overlays, which are there and empty.

        :raises HypervisorError: a device is none, read-only or frozen, or its overlay cannot be opened
        """
        wanted = {disk.image.device: disk for disk in self.all if disk.overlay is None and not disk.image.read_only}
        if not overlays.keys() <= wanted.keys():
            raise HypervisorError(f"not all of {', '.join(overlays)} are disks that can be frozen")
        opened: dict[str, Overlay] = {}
        try:
            for device, path in overlays.items():
                opened[device] = Overlay(path, wanted[device].descriptor)
        except OSError as e:
            for overlay in opened.values():
                overlay.close()
            raise HypervisorError(f"cannot open the overlay {e.filename}: {e.strerror}") from e
        self.all = [replace(disk, overlay=opened.get(disk.image.device, disk.overlay)) for disk in self.all]

    def thaw(self, overlays: Mapping[str, Path]) -> None:
        """Write what these overlays hold into their disks, let further writes go there, and remove them; those that are
        not over their disk are left alone.

        :raises OSError: one could not be written; the guest goes on with it
        """
        for number, disk in enumerate(self.all):
            if disk.overlay is not None and disk.overlay.path == overlays.get(disk.image.device):
                disk.overlay.commit()
                self.all[number] = replace(disk, overlay=None)
                disk.overlay.close()
                disk.overlay.path.unlink()

    def unlock(self) -> None:
        """Let others have them."""
        for disk in self.all:
            fcntl.flock(disk.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close all, and so unlock them; idempotent."""
        for disk in self.all:
            if disk.overlay is not None:
                disk.overlay.close()
            os.close(disk.descriptor)
        self.all = []
