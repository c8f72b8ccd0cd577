"""Where backups are kept: addressed images of disks and RAM, deduplicated, sealed, in packs on a storage backend.

docs/repository-format.md describes what is stored. Names are imported when they are first used: listing backups
needs neither numpy nor zstd.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmsnap.repository.check import CheckFinding, CheckReport, Touched
    from vmsnap.repository.format import ChunkSizes, ImageKind
    from vmsnap.repository.manifest import BackupFields, BackupStats, DiskImage, Manifest, MemoryImage, check_device
    from vmsnap.repository.reader import ImageReader
    from vmsnap.repository.repository import Repository
    from vmsnap.repository.sources import BytesReader, SparseFileReader
    from vmsnap.repository.tree import ImageRecord
    from vmsnap.repository.writer import BackupWriter

_HOMES = {
    "BackupFields": "manifest",
    "BackupStats": "manifest",
    "BackupWriter": "writer",
    "BytesReader": "sources",
    "CheckFinding": "check",
    "CheckReport": "check",
    "ChunkSizes": "format",
    "DiskImage": "manifest",
    "ImageKind": "format",
    "ImageReader": "reader",
    "ImageRecord": "tree",
    "Manifest": "manifest",
    "MemoryImage": "manifest",
    "Repository": "repository",
    "SparseFileReader": "sources",
    "Touched": "check",
    "check_device": "manifest",
}

__all__ = [
    "BackupFields",
    "BackupStats",
    "BackupWriter",
    "BytesReader",
    "CheckFinding",
    "CheckReport",
    "ChunkSizes",
    "DiskImage",
    "ImageKind",
    "ImageReader",
    "ImageRecord",
    "Manifest",
    "MemoryImage",
    "Repository",
    "SparseFileReader",
    "Touched",
    "check_device",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
