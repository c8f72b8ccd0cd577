"""A huge sparse disk with data all over it, made quickly: no two chunks are the same, and half of it compresses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmsnap.model import Extent

PIECE_BYTES = 4 << 20
BLOCK_BYTES = 64 << 10

_PAGE_BYTES = 4096


def make_sparse_disk(path: Path, size_bytes: int, data_bytes: int) -> list[int]:
    """Write a file of that size with pieces of 4 MiB at even distances; durable. Returns where the pieces lie. Blocks.

    :param data_bytes: how much data it gets, in whole pieces
    """
    pieces = data_bytes // PIECE_BYTES
    distance = size_bytes // pieces // PIECE_BYTES * PIECE_BYTES
    places = [number * distance for number in range(pieces)]
    content = _content()
    with path.open("wb", buffering=0) as disk:
        disk.truncate(size_bytes)
        for number, place in enumerate(places):
            content[:, 0] = np.arange(number * len(content), (number + 1) * len(content), dtype=np.uint64)
            os.pwrite(disk.fileno(), content.data.cast("B"), place)
        os.fsync(disk.fileno())
    return places


def change_sparse_disk(path: Path, places: list[int], *, fraction: float = 0.01, seed: int = 4) -> list[Extent]:
    """Change that part of the blocks of 64 KiB of its data, at random places; durable. Returns where."""
    numbers = np.random.default_rng(seed)
    blocks = len(places) * (PIECE_BYTES // BLOCK_BYTES)
    chosen = np.sort(numbers.choice(blocks, max(1, int(blocks * fraction)), replace=False)).tolist()
    extents = []
    with path.open("r+b", buffering=0) as disk:
        for block in chosen:
            piece, within = divmod(block, PIECE_BYTES // BLOCK_BYTES)
            offset = places[piece] + within * BLOCK_BYTES
            os.pwrite(disk.fileno(), numbers.bytes(BLOCK_BYTES // 2), offset)
            extents.append(Extent(offset, BLOCK_BYTES))
        os.fsync(disk.fileno())
    return extents


def _content() -> npt.NDArray[np.uint64]:
    """A piece as pages of words: half of each page is random; the first word is left for a number."""
    words = np.zeros((PIECE_BYTES // _PAGE_BYTES, _PAGE_BYTES // 8), np.uint64)
    half = words.shape[1] // 2
    words[:, :half] = np.random.default_rng(1).integers(0, 1 << 63, (len(words), half), np.uint64)
    words[:, half:] = np.arange(half, dtype=np.uint64)
    return words
