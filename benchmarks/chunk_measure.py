"""Measures how one chunk size, or one level of zstd, does on successive states of a disk or of RAM."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from backports.zstd import ZstdCompressor

from benchmarks.processes import read_all
from vmsnap.repository import BackupFields, ImageKind, Repository, SparseFileReader
from vmsnap.repository.format import INDEX_PREFIX, PACKS_PREFIX, BlobKind, ChunkSizes, pack_of_key
from vmsnap.repository.packs import ENTRY, read_trailer
from vmsnap_storage_backends.local import LocalStorage

PAGE_BYTES = 4096
_BLOCK_PAGES = 4096


@dataclass(frozen=True)
class Added:
    """What one backup added to the repository."""

    data_bytes: int
    """Chunks, sealed."""
    tree_bytes: int
    """Tree nodes, sealed."""
    index_bytes: int
    chunks: int
    seconds: float

    @property
    def stored_bytes(self) -> int:
        """All of it but the manifest; the packs' trailers weigh as much as the index."""
        return self.data_bytes + self.tree_bytes + 2 * self.index_bytes


@dataclass(frozen=True)
class Measured:
    """One setting: what each image added, the first one to nothing."""

    chunk_bytes: int
    level: int | None
    added: tuple[Added, ...]


def measure(
    images: Sequence[Path], kind: ImageKind, chunk_bytes: int, folder: Path, *, level: int | None = None
) -> Measured:
    """Store the images one after the other in a new repository with such chunks, encrypted. Blocks.

    :param folder: where the repository lies meanwhile
    :param level: of zstd; the default when None
    """
    sizes = ChunkSizes(disk=chunk_bytes) if kind is ImageKind.DISK else ChunkSizes(ram=chunk_bytes)
    with tempfile.TemporaryDirectory(prefix="vmsnap-chunks-", dir=folder) as place:
        storage = LocalStorage(place)
        repository = Repository.create(storage, "benchmark", chunks=sizes)
        results = []
        seen = _Contents.of(repository, storage)
        for image in images:
            seconds = _store(repository, image, kind, level)
            now = _Contents.of(repository, storage)
            results.append(now.since(seen, seconds))
            seen = now
    return Measured(chunk_bytes, level, tuple(results))


def _store(repository: Repository, image: Path, kind: ImageKind, level: int | None) -> float:
    read_all(image)  # into the page cache, so that the disk's mood does not count
    begin = time.perf_counter()
    with repository.writer(level=level) as writer, SparseFileReader(image, image.stat().st_size) as source:
        writer.add_image(image.name, source, kind)
        writer.commit(BackupFields(vm="bench", hypervisor="none", mode="live"))
    return time.perf_counter() - begin


@dataclass(frozen=True)
class _Contents:
    data_bytes: int
    tree_bytes: int
    index_bytes: int
    chunks: int

    @classmethod
    def of(cls, repository: Repository, storage: LocalStorage) -> _Contents:
        sums = {BlobKind.DATA: 0, BlobKind.TREE: 0}
        chunks = 0
        for info in storage.list(PACKS_PREFIX):
            pack = pack_of_key(info.key)
            if pack is None:
                continue
            for _, _, sealed_bytes, _, flags in ENTRY.iter_unpack(
                read_trailer(storage, repository.vault, pack, info.size_bytes)
            ):
                kind = BlobKind(flags & 15)
                sums[kind] += sealed_bytes
                chunks += kind is BlobKind.DATA
        index_bytes = sum(info.size_bytes for info in storage.list(INDEX_PREFIX))
        return cls(sums[BlobKind.DATA], sums[BlobKind.TREE], index_bytes, chunks)

    def since(self, before: _Contents, seconds: float) -> Added:
        return Added(
            self.data_bytes - before.data_bytes,
            self.tree_bytes - before.tree_bytes,
            self.index_bytes - before.index_bytes,
            self.chunks - before.chunks,
            seconds,
        )


@dataclass(frozen=True)
class Pages:
    """What changed from one RAM image to the next, by the page."""

    all_pages: int
    """Pages of the newer image that are not zero."""
    changed: int
    """Of those, how many are not what stood in the same place before."""
    packed_bytes: int
    """The changed ones, each compressed by itself: what a store by the page, without any overhead, would add."""


def change_scattered(image: Path, copy: Path, *, fraction: float = 0.01, seed: int = 5) -> None:
    """Copy a RAM image, sparse, and change 64 bytes in that part of its pages that are not zero, at random places: what
    is hardest on large chunks.
    """
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
    pages = np.memmap(copy, np.uint8, "r+").reshape(-1, PAGE_BYTES)
    filled = np.flatnonzero(pages.any(axis=1))
    numbers = np.random.default_rng(seed)
    chosen = numbers.choice(filled, len(filled) // int(1 / fraction), replace=False)
    pages[chosen, 128:192] ^= numbers.integers(1, 255, (len(chosen), 64), dtype=np.uint8)


def compare_pages(before: Path, after: Path) -> Pages:
    """Compare two RAM images of one size."""
    older, newer = (np.memmap(path, np.uint8, "r").reshape(-1, PAGE_BYTES) for path in (before, after))
    compressor = ZstdCompressor(level=1)
    pages = changed = packed = 0
    for begin in range(0, len(newer), _BLOCK_PAGES):
        old, new = older[begin : begin + _BLOCK_PAGES], newer[begin : begin + _BLOCK_PAGES]
        filled = new.any(axis=1)
        pages += int(filled.sum())
        different = np.flatnonzero((old != new).any(axis=1) & filled)
        changed += len(different)
        for at in different.tolist():
            page = new[at].tobytes()
            packed += min(len(compressor.compress(page, ZstdCompressor.FLUSH_FRAME)), PAGE_BYTES)
    return Pages(pages, changed, packed)
