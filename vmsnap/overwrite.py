"""Writes one disk of a backup onto a disk that exists, when told so by name: only what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmsnap.errors import StorageError, UsageError
from vmsnap.export import FORMATS, chosen_disks, no_progress
from vmsnap.qcow2target import Qcow2Target, is_qcow2
from vmsnap.rawtarget import RawTarget
from vmsnap.repository import Repository, accepted_losses
from vmsnap.repository.inplace import RestoreStats
from vmsnap.repository.reading import reading


def export_onto(
    repository: Repository,
    backup: str,
    device: str,
    target: Path,
    *,
    image_format: str | None = None,
    accept_loss: bool = False,
    progress: Callable[[int, int | None], None] = no_progress,
) -> RestoreStats:
    """Make the existing disk `target` like the disk `device` of a backup; durable on return. Blocks.

    A raw file gets the disk's size; a block device must be as large at least, and keeps what lies behind; a qcow2 image
    must have the size. Nobody else may use `target`, and nobody can meanwhile. Where it fails in the middle, the target
    is neither old nor new: the error says so, and the same call again finishes it.

    :param image_format: how `target` holds a disk, one of `export.FORMATS`; None: raw, unless it looks like qcow2,
        which is refused
    :raises UnknownBackup: there is none of that id
    :raises NotFound: it has no such disk, or there is no target
    :raises UsageError: the target cannot take the disk; it is unchanged
    :raises Busy: somebody uses the target; it is unchanged
    :raises DriverUnavailable: qemu-utils is not installed
    :raises DamageFound: the backup is damaged, or the disk has lost something and `accept_loss` is not set
    :raises StorageError: reading or writing failed
    """
    if image_format is not None and image_format not in FORMATS:
        raise UsageError(f"{image_format!r} is no format of an image file", cure=f"choose one of: {', '.join(FORMATS)}")
    with reading(repository, backup, f"export of {backup}"):
        manifest = repository.manifest(backup)
        (disk,) = chosen_disks(manifest, [device])
        part = f"disk {device}"
        lost = accepted_losses(repository, manifest, [part], accept=accept_loss).get(part, ())
        reader = repository.reader(disk.image, f"{part} of {manifest.backup}", lost=lost)
        with _opened(target, image_format) as opened:
            return reader.restore_onto(opened, progress)


def _opened(path: Path, image_format: str | None) -> RawTarget | Qcow2Target:
    if image_format == "qcow2":
        return Qcow2Target(path)
    target = RawTarget(path)
    try:
        begin = bytearray(min(4, target.size_bytes))
        target.read_into(0, memoryview(begin))
        if image_format is None and is_qcow2(bytes(begin)):
            raise UsageError(f"{path} looks like a qcow2 image", cure="say --format qcow2, or --format raw")
    except (StorageError, UsageError):
        target.close()
        raise
    return target
