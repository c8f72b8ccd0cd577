"""The disk image that backups are measured with, and the same one after a week's work.

A third is a real ext4 file system with files of this system's /usr, a third is random, a third is zeros: half of them
holes, half written. Made anew it is the same on the same system.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from benchmarks.system_files import copy_files
from vmsnap.model import Extent
from vmsnap.repository import SparseFileReader

MIB = 1 << 20
BLOCK_BYTES = 64 << 10
"""What changes, changes in blocks of this size."""

_STRIPE_BYTES = 16 * MIB
_FILES_PART = 0.88
"""Of the file system; the rest is its own tables, and room."""
_UUID = "6f1f5a36-8d0e-4c55-9d3c-2b1f0c7a9e11"
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class DiskImageFile:
    """An image that was made: its size, and what of it is allocated in the file."""

    path: Path
    size_bytes: int
    file_bytes: int
    """Of real files in the file system."""
    allocated_bytes: int


def make_image(path: Path, size_bytes: int, *, seed: int = 1) -> DiskImageFile:
    """Write the image, durably. Needs e2fsprogs; blocks.

    :raises subprocess.CalledProcessError: the file system could not be made
    """
    third = size_bytes // (3 * MIB) * MIB
    file_bytes = _make_file_system(path, third)
    numbers = np.random.default_rng(seed)
    with path.open("r+b") as image:
        image.truncate(size_bytes)
        image.seek(third)
        for begin in range(0, third, _STRIPE_BYTES):
            image.write(numbers.bytes(min(_STRIPE_BYTES, third - begin)))
        for at in range(2 * third, size_bytes, 2 * _STRIPE_BYTES):
            image.seek(at)
            image.write(bytes(min(_STRIPE_BYTES, size_bytes - at)))
        image.flush()
        os.fsync(image.fileno())
    return DiskImageFile(path, size_bytes, file_bytes, path.stat().st_blocks * 512)


def copy_changed(image: Path, copy: Path, *, fraction: float = 0.01, seed: int = 2) -> list[Extent]:
    """Copy the image, sparse, and change that part of its blocks of 64 KiB, at random places; durable. Returns where.

    Half of the changed blocks become random, half get content of the file system, its sectors in reverse order: it
    compresses as files do and was nowhere before.
    """
    _copy(image, copy)
    numbers = np.random.default_rng(seed)
    with image.open("rb") as source, copy.open("r+b") as target:
        blocks = os.fstat(source.fileno()).st_size // BLOCK_BYTES
        changed = np.sort(numbers.choice(blocks, max(1, int(blocks * fraction)), replace=False)).tolist()
        for number, block in enumerate(changed):
            target.seek(block * BLOCK_BYTES)
            target.write(numbers.bytes(BLOCK_BYTES) if number % 2 else _turned(source, blocks // 3, numbers))
        target.flush()
        os.fsync(target.fileno())
    return _extents(changed)


def _copy(image: Path, copy: Path) -> None:
    """Copy data as data and holes as holes; ``cp`` would make holes of the zeros that are written."""
    with SparseFileReader(image, image.stat().st_size) as reader, image.open("rb") as source, copy.open("wb") as target:
        target.truncate(reader.size_bytes)
        for extent in reader.extents():
            at, end = extent.offset, extent.offset + extent.length
            while not extent.zero and at < end:
                at += os.copy_file_range(source.fileno(), target.fileno(), end - at, at, at)


def _turned(source: BinaryIO, blocks: int, numbers: np.random.Generator) -> bytes:
    """A block of those that are no zeros among the first `blocks`, its sectors in reverse order."""
    while True:
        source.seek(int(numbers.integers(blocks)) * BLOCK_BYTES)
        content = np.frombuffer(source.read(BLOCK_BYTES), np.uint8)
        if content.any():
            return content.reshape(-1, _SECTOR_BYTES)[::-1].tobytes()


def _extents(blocks: list[int]) -> list[Extent]:
    extents: list[Extent] = []
    for block in blocks:
        at = block * BLOCK_BYTES
        if extents and extents[-1].offset + extents[-1].length == at:
            extents[-1] = Extent(extents[-1].offset, extents[-1].length + BLOCK_BYTES)
        else:
            extents.append(Extent(at, BLOCK_BYTES))
    return extents


def _make_file_system(path: Path, size_bytes: int) -> int:
    with tempfile.TemporaryDirectory(prefix="vmsnap-files-", dir=path.parent) as folder:
        file_bytes = copy_files(Path(folder), int(size_bytes * _FILES_PART))
        path.unlink(missing_ok=True)
        argv = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-U", _UUID, "-E", f"hash_seed={_UUID}", "-d", folder]
        subprocess.run([*argv, str(path), f"{size_bytes // 1024}k"], check=True)
    return file_bytes
