"""A backup on its way out of the repository: disks as files of their own, memory where a hypervisor can map it."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.folders import Folders, used_bytes
from vmsnap.controller.progress import Bars
from vmsnap.errors import AlreadyExists, StorageFull, UsageError
from vmsnap.journal import Operation
from vmsnap.model import Disk, RamImage
from vmsnap.repository import ImageRecord, LostRange, Manifest, Repository
from vmsnap.roles import DiskWriter, LoadRequest


class Retrieval:
    """One backup, for an operation: disks into `folder`, memory into a folder `name` of the host's memory.

    `lost` is what is noted as lost of each part, and reads as zeros. The disks of `onto`, by their devices, are written
    onto what is there, which is nobody's to remove.
    """

    def __init__(
        self,
        repository: Repository,
        manifest: Manifest,
        operation: Operation,
        drivers: Drivers,
        folder: Path,
        name: str,
        bars: Bars,
        lost: Mapping[str, Sequence[LostRange]] | None = None,
        onto: Mapping[str, DiskWriter] | None = None,
    ) -> None:
        self.disks: tuple[Disk, ...] = ()
        self._repository = repository
        self._manifest = manifest
        self._operation = operation
        self._context = drivers.context
        self._folder = folder
        self._images_folder = drivers.context.memory_dir / name
        self._bars = bars
        self._lost = lost or {}
        self._onto = onto or {}
        self._folders = Folders(operation)

    def fetch(self, *, isolated: bool) -> LoadRequest:
        """Read all of it. Blocks. Returns what `load` takes; the images are the caller's to remove afterwards.

        :raises AlreadyExists: a file where a disk is to be exists
        :raises StorageFull: the memory does not fit
        :raises UsageError: the backup holds no memory
        """
        manifest = self._manifest
        device_state = with_memory(manifest)
        self._check_room()
        paths = disk_paths(manifest, self._folder, self._onto)
        if paths:
            self._folders.make(self._folder)
        total_bytes = sum(disk.size_bytes for disk in manifest.disks)
        self._bars.begin("reading", total_bytes + sum(memory.image.size_bytes for memory in manifest.memory))
        for disk in manifest.disks:
            label, target = f"disk {disk.device}", self._onto.get(disk.device)
            if target is not None:
                address = target.address
                self._write_onto(disk.image, label, target)
            else:
                address = str(paths[disk.device])
                self._fetch(disk.image, label, paths[disk.device])
            self.disks += (Disk(disk.device, address, disk.image.size_bytes, "raw"),)
        self._folders.make(self._images_folder)
        images = []
        for memory in manifest.memory:
            path = self._images_folder / f"{memory.file_name}.ram"
            self._fetch(memory.image, f"memory {memory.region}", path)
            images.append(RamImage(memory.region, memory.image.size_bytes, path, memory.page_bytes))
        state_path = self._images_folder / "device-state"
        self._fetch(device_state, "device state", state_path)
        return LoadRequest(
            manifest.definition,
            tuple(images),
            state_path,
            self.disks,
            isolated=isolated,
            images_disposable=True,
            details=manifest.duplicate_details,
        )

    def _check_room(self) -> None:
        needed = sum(memory.image.size_bytes for memory in self._manifest.memory)
        free = shutil.disk_usage(self._context.memory_dir).free
        if self._context.memory_budget_bytes is not None:
            free = min(free, self._context.memory_budget_bytes - used_bytes(self._context.memory_dir))
        if needed > free:
            raise StorageFull(
                f"the machine has {needed >> 20} MiB of memory, {self._context.memory_dir} has"
                f" {max(0, free) >> 20} MiB free",
                cure="free memory on this host; see: vmsnap duplicate list",
            )

    def _fetch(self, image: ImageRecord, label: str, path: Path) -> None:
        position = self._folders.will_make(path)
        try:
            with self._repository.reader(image, label, lost=self._lost.get(label, ())) as source:
                source.restore_to_file(path, self._bars.part)
        except AlreadyExists:
            self._folders.not_ours(position)
            raise
        self._bars.part_done(image.size_bytes)

    def _write_onto(self, image: ImageRecord, label: str, target: DiskWriter) -> None:
        """Only what differs; and let go of it, for the VM that will use it."""
        with target, self._repository.reader(image, label, lost=self._lost.get(label, ())) as source:
            source.restore_onto(target, self._bars.part)
        self._bars.part_done(image.size_bytes)

    def remove_images(self) -> None:
        """Remove the memory from this host; idempotent."""
        self._folders.remove(lambda path: path == self._images_folder or self._images_folder in path.parents)

    def remove_all(self) -> None:
        """Remove disks and memory, as far as they are still the operation's; idempotent."""
        self._folders.remove()

    def keep_disks(self) -> None:
        """Enter that the disks, and the folders that were made for them, are the user's now."""
        self._folders.hand_over(lambda path: path != self._images_folder and self._images_folder not in path.parents)


def disk_paths(manifest: Manifest, folder: Path, but: Collection[str] = ()) -> dict[str, Path]:
    """The new file of each disk that is in the backup, named by its device; none for those of `but`."""
    return {disk.device: folder / f"{disk.device}.raw" for disk in manifest.disks if disk.device not in but}


def with_memory(manifest: Manifest) -> ImageRecord:
    """The device state of a backup that holds a whole machine.

    :raises UsageError: it holds disks alone
    """
    if manifest.device_state is None:
        raise UsageError(
            f"backup {manifest.backup} holds disks alone, no memory: there is no machine in it that could go on",
            cure=f"vmsnap export {manifest.backup} gives its disks, for a VM that boots from them",
        )
    return manifest.device_state
