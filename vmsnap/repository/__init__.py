"""Where backups are kept: addressed images of disks and RAM, deduplicated, sealed, in packs on a storage backend.

docs/repository-format.md describes what is stored. Names are imported when they are first used: listing backups
needs neither numpy nor zstd.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmsnap.repository.base import BaseImage
    from vmsnap.repository.findings import CheckFinding, CheckReport, RepairReport, Touched
    from vmsnap.repository.format import ChunkSizes, ImageKind
    from vmsnap.repository.gc import GcReport
    from vmsnap.repository.keyring import KeyInfo
    from vmsnap.repository.loss import accepted_losses
    from vmsnap.repository.manifest import (
        BackupFields,
        BackupStats,
        DiskImage,
        LostRange,
        Manifest,
        MemoryImage,
        ReadOnlyDisk,
        check_device,
    )
    from vmsnap.repository.pruning import PruneReport
    from vmsnap.repository.reader import ImageReader
    from vmsnap.repository.repository import Repository
    from vmsnap.repository.retention import RetentionPolicy, Verdict
    from vmsnap.repository.sources import BytesReader, SparseFileReader
    from vmsnap.repository.subset import Subset
    from vmsnap.repository.tree import ImageRecord
    from vmsnap.repository.writer import BackupWriter

_HOMES = {
    "BackupFields": "manifest",
    "BackupStats": "manifest",
    "BackupWriter": "writer",
    "BaseImage": "base",
    "BytesReader": "sources",
    "CheckFinding": "findings",
    "CheckReport": "findings",
    "ChunkSizes": "format",
    "DiskImage": "manifest",
    "GcReport": "gc",
    "ImageKind": "format",
    "ImageReader": "reader",
    "ImageRecord": "tree",
    "KeyInfo": "keyring",
    "LostRange": "manifest",
    "Manifest": "manifest",
    "MemoryImage": "manifest",
    "ReadOnlyDisk": "manifest",
    "PruneReport": "pruning",
    "RepairReport": "findings",
    "Repository": "repository",
    "RetentionPolicy": "retention",
    "SparseFileReader": "sources",
    "Subset": "subset",
    "Touched": "findings",
    "Verdict": "retention",
    "accepted_losses": "loss",
    "check_device": "manifest",
}

__all__ = [
    "BackupFields",
    "BackupStats",
    "BackupWriter",
    "BaseImage",
    "BytesReader",
    "CheckFinding",
    "CheckReport",
    "ChunkSizes",
    "DiskImage",
    "GcReport",
    "ImageKind",
    "ImageReader",
    "ImageRecord",
    "KeyInfo",
    "LostRange",
    "Manifest",
    "MemoryImage",
    "PruneReport",
    "ReadOnlyDisk",
    "RepairReport",
    "Repository",
    "RetentionPolicy",
    "SparseFileReader",
    "Subset",
    "Touched",
    "Verdict",
    "accepted_losses",
    "check_device",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
