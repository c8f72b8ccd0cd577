"""Older images as a help for newer ones of the same disk or memory: their tree is taken over where it is the same, and
where the snapshot mechanism knows what has changed since, only that is read.

None of it is needed to read the newer image, which names all its chunks itself; and nothing of it is trusted blindly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmsnap.errors import DamageFound, RepositoryError, SnapshotError
from vmsnap.model import Extent
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.format import ID_BYTES
from vmsnap.repository.nodes import LoadedNode, TreeReader
from vmsnap.repository.tree import ImageRecord
from vmsnap.roles.snapshot import DiskReader

# Of the nodes with unchanged chunks, the first ones and then every so manieth has one chunk compared with the source.
_ALWAYS_COMPARED = 32
_COMPARED_EVERY = 4


@dataclass(frozen=True)
class BaseImage:
    """An older image of the same disk or memory. `changed`: the ranges that may have changed since its instant, in any
    order; None where that is unknown.
    """

    record: ImageRecord
    changed: Iterable[Extent] | None = None


class StaleHint(Exception):
    """What was said to be unchanged has changed. Raised to this package only, which reads everything then."""


class Run(NamedTuple):
    """Some chunks of an image: to be read where `ids` is None; else their ids are known, and empty stands for zeros."""

    first: int
    chunks: int
    ids: bytes | None


class OldTree:
    """The tree of an older image. What of it cannot be read is as if it had never been there."""

    def __init__(self, blobs: BlobReader, image: ImageRecord) -> None:
        self.image = image
        self._tree = TreeReader(blobs)

    def node(self, level: int, number: int) -> LoadedNode | None:
        """See `BaseTree`.

        :raises StorageError: the storage failed
        """
        if level > self.image.depth or number * self.image.fanout**level >= self.image.chunks:
            return None
        try:
            return self._tree.find(self.image, level, number)
        except (DamageFound, RepositoryError):
            return None

    def ids(self, number: int) -> bytes:
        """The ids below the lowest node of that number; nothing where they cannot be known.

        :raises StorageError: the storage failed
        """
        image = self.image
        try:
            node = self._tree.find(image, 1, number)
        except (DamageFound, RepositoryError):
            return b""
        count = min(image.fanout, image.chunks - number * image.fanout)
        return node.ids if node else bytes(count * ID_BYTES)


def changed_chunks(changed: Iterable[Extent], size_bytes: int, chunk_bytes: int) -> npt.NDArray[np.bool_]:
    """For each chunk of an image whether any of these ranges touches it.

    :raises StaleHint: the snapshot mechanism cannot say, or a range leaves the image, which it must be another's then
    """
    touched = np.zeros(-(-size_bytes // chunk_bytes), np.bool_)
    try:
        for extent in changed:
            end = extent.offset + extent.length
            if extent.offset < 0 or extent.length < 0 or end > size_bytes:
                raise StaleHint(f"the range from {extent.offset} to {end} leaves the image")
            if extent.length:
                touched[extent.offset // chunk_bytes : -(-end // chunk_bytes)] = True
    except SnapshotError as e:
        raise StaleHint(f"what has changed cannot be said: {e.message}") from e
    return touched


def runs_beside_base(
    runs: Iterable[tuple[int, int, bool]],
    old: OldTree,
    touched: npt.NDArray[np.bool_],
    known: Callable[[bytes], npt.NDArray[np.bool_]],
    compare: Callable[[int, bytes], bool],
    run_chunks: int,
) -> Iterator[Run]:
    """Turn the runs of `runs_to_read` into those that must be read still, `run_chunks` at most, and those whose ids the
    old image gives.

    A chunk's id is taken over where nothing touched it and `known` says that it is stored.

    :param compare: says whether the chunk of that number has that id; asked for samples
    :raises StaleHint: a sample was another
    :raises StorageError: the storage failed
    """
    fanout = old.image.fanout
    nodes, last = 0, -1  # with unchanged chunks: how many were met, and the number of the last one
    for first, count, must_read in runs:
        if not must_read:
            yield Run(first, count, b"")
            continue
        while count:
            part = min(count, fanout - first % fanout)
            start = first % fanout * ID_BYTES
            ids = old.ids(first // fanout)[start : start + part * ID_BYTES]
            if len(ids) == part * ID_BYTES:
                keep = ~touched[first : first + part] & known(ids)
            else:
                keep = np.zeros(part, np.bool_)
            if keep.any() and first // fanout != last:
                if nodes < _ALWAYS_COMPARED or nodes % _COMPARED_EVERY == 0:
                    _compare_one(first, ids, keep, compare)
                nodes, last = nodes + 1, first // fanout
            yield from _split(first, ids, keep, run_chunks)
            first += part
            count -= part


def _compare_one(first: int, ids: bytes, keep: npt.NDArray[np.bool_], compare: Callable[[int, bytes], bool]) -> None:
    data = np.frombuffer(ids, np.uint64).reshape(-1, ID_BYTES // 8).any(axis=1)
    candidates = np.flatnonzero(keep & data)
    if not len(candidates):
        candidates = np.flatnonzero(keep)
    position = int(random.choice(candidates))
    if not compare(first + position, ids[position * ID_BYTES : (position + 1) * ID_BYTES]):
        raise StaleHint(f"chunk {first + position} has changed, though it was said to be as it was")


def _split(first: int, ids: bytes, keep: npt.NDArray[np.bool_], run_chunks: int) -> Iterator[Run]:
    bounds = [0, *(np.flatnonzero(keep[1:] != keep[:-1]) + 1).tolist(), len(keep)]
    for start, end in itertools.pairwise(bounds):
        if keep[start]:
            yield Run(first + start, end - start, ids[start * ID_BYTES : end * ID_BYTES])
            continue
        for at in range(start, end, run_chunks):
            yield Run(first + at, min(run_chunks, end - at), None)


def comparison(
    source: DiskReader, chunk_bytes: int, chunk_ids: Callable[[memoryview, int], list[bytes]]
) -> Callable[[int, bytes], bool]:
    """A function that reads a chunk of `source` and says whether it has an id."""

    def compare(number: int, chunk_id: bytes) -> bool:
        offset = number * chunk_bytes
        content = memoryview(bytearray(min(chunk_bytes, source.size_bytes - offset)))
        source.read_into(offset, content)
        return chunk_ids(content, chunk_bytes) == [chunk_id]

    return compare
