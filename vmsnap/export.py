"""Writes the disks of a backup as image files: all of them or none, nothing overwritten."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from vmsnap.errors import AlreadyExists, NotFound, StorageError, StorageFull, UsageError, VmsnapError
from vmsnap.nbdtarget import tool
from vmsnap.qcow2target import Qcow2Target, create_qcow2
from vmsnap.repository import DiskImage, LostRange, Manifest, Repository, accepted_losses
from vmsnap.repository.reading import reading

FORMATS = ("raw", "qcow2")


def no_progress(_done_bytes: int, _total_bytes: int | None) -> None:
    """For those who do not want to know."""


def export_disks(
    repository: Repository,
    backup: str,
    folder: Path,
    *,
    image_format: str = "raw",
    devices: Sequence[str] = (),
    accept_loss: bool = False,
    progress: Callable[[int, int | None], None] = no_progress,
) -> dict[str, Path]:
    """Write the disks of a backup (those of `devices`, or all) into `folder`, one file each, named by its device.

    Every file or none: a failure leaves nothing behind. Blocks. `image_format` is one of `FORMATS`; ``qcow2`` needs
    qemu-utils, which is asked for before anything is written. `accept_loss`: what repair noted as lost is zeros.
    Returns the file of each device.

    :raises UnknownBackup: there is none of that id
    :raises NotFound: it has no such disk
    :raises AlreadyExists: a file of that name exists; it is untouched
    :raises DriverUnavailable: qemu-utils is not installed
    :raises DamageFound: the backup is damaged, or one of the disks has lost something and `accept_loss` is not set
    """
    if image_format not in FORMATS:
        raise UsageError(f"{image_format!r} is no format of an image file", cure=f"choose one of: {', '.join(FORMATS)}")
    if image_format == "qcow2":
        for name in ("qemu-img", "qemu-nbd"):
            tool(name)
    with reading(repository, backup, f"export of {backup}"):
        manifest = repository.manifest(backup)
        disks = chosen_disks(manifest, devices)
        lost = accepted_losses(repository, manifest, [f"disk {disk.device}" for disk in disks], accept=accept_loss)
        made = _Export(repository, manifest, folder.absolute(), image_format, progress, lost).run(disks)
    return {disk.device: path for disk, path in zip(disks, made, strict=True)}


def chosen_disks(manifest: Manifest, devices: Sequence[str]) -> list[DiskImage]:
    known = {disk.device: disk for disk in manifest.disks}
    for device in devices:
        if device not in known:
            raise NotFound(
                f"backup {manifest.backup} has no disk {device!r}", cure=f"it has: {', '.join(known) or 'none'}"
            )
    return [disk for disk in manifest.disks if not devices or disk.device in devices]


class _Export:
    """Writes each disk under a name that shows it as unfinished, and gives all of them their names at the end."""

    def __init__(
        self,
        repository: Repository,
        manifest: Manifest,
        folder: Path,
        image_format: str,
        progress: Callable[[int, int | None], None],
        lost: Mapping[str, Sequence[LostRange]],
    ) -> None:
        self._repository = repository
        self._manifest = manifest
        self._folder = folder
        self._format = image_format
        self._progress = progress
        self._lost = lost

    def run(self, disks: Sequence[DiskImage]) -> list[Path]:
        """Write `disks`; returns the file of each."""
        targets = [self._folder / f"{disk.device}.{self._format}" for disk in disks]
        for target in targets:
            if os.path.lexists(target):
                raise _exists(target)
        with ExitStack() as on_failure:
            self._make_folder(on_failure)
            unfinished = [self._write(disk, disks, on_failure) for disk in disks]
            for partial, target in zip(unfinished, targets, strict=True):
                _publish(partial, target)
                on_failure.callback(target.unlink, missing_ok=True)
            on_failure.pop_all()
        return targets

    def _make_folder(self, on_failure: ExitStack) -> None:
        missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        try:
            for path in reversed(missing):
                path.mkdir(mode=0o700)
                on_failure.callback(path.rmdir)
        except OSError as e:
            raise StorageError(f"cannot make the folder {self._folder}: {e.strerror}") from e
        if not self._folder.is_dir():
            raise AlreadyExists(f"{self._folder} is not a folder", cure="choose another --output")

    def _write(self, disk: DiskImage, disks: Sequence[DiskImage], on_failure: ExitStack) -> Path:
        total = sum(each.size_bytes for each in disks)
        before = sum(each.size_bytes for each in disks[: disks.index(disk)])
        path = self._unfinished(disk, on_failure)
        part = f"disk {disk.device}"
        lost = self._lost.get(part, ())
        reader = self._repository.reader(disk.image, f"{part} of {self._manifest.backup}", lost=lost)

        def progress(done_bytes: int, _: int | None) -> None:
            self._progress(before + done_bytes, total)

        if self._format == "raw":
            reader.restore_to_file(path, progress)
            return path
        create_qcow2(path, disk.size_bytes)
        with Qcow2Target(path) as target:
            reader.write_to_empty(target, progress)
        return path

    def _unfinished(self, disk: DiskImage, on_failure: ExitStack) -> Path:
        path = self._folder / f".{disk.device[:100]}.{secrets.token_hex(4)}.unfinished"
        on_failure.callback(path.unlink, missing_ok=True)
        return path


def _publish(partial: Path, target: Path) -> None:
    try:
        os.link(partial, target)  # unlike a rename it never replaces anything
        partial.unlink()
    except FileExistsError as e:
        raise _exists(target) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"no room for {target}") from e
        if os.path.lexists(target):
            raise _exists(target) from e
        partial.rename(target)  # the file system has no hard links


def _exists(target: Path) -> VmsnapError:
    return AlreadyExists(f"{target} exists and is not overwritten", cure="choose another --output")
