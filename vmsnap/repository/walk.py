"""Finds what is missing of images: walks their trees, looks every chunk up, and goes on behind what is lost."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np

from vmsnap.errors import DamageFound, RepositoryError
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.format import ID_BYTES, ZERO_ID
from vmsnap.repository.index import ChunkIndex
from vmsnap.repository.nodes import TreeReader
from vmsnap.repository.tree import ImageRecord, Node, children, list_bytes, root_node, span_of


class Loss(NamedTuple):
    """A range of an image that cannot be read. `chunk` is the id of the chunk, empty where it is the tree that cannot
    be read; `cause` says why, and is a RepositoryError where a newer vmsnap could read it; None for a chunk that is
    missing.
    """

    offset: int
    length: int
    chunk: bytes
    cause: DamageFound | RepositoryError | None


class LossWalk:
    """Looks at one image after the other; what was found whole in one is not looked at again in another one. Memory: an
    id for each tree node. Used by one thread at a time.
    """

    def __init__(self, blobs: BlobReader, readable: ChunkIndex, used: Callable[[bytes], None] | None = None) -> None:
        """:param blobs: reads the tree nodes
        :param readable: the chunks that are there and not damaged
        :param used: told of the ids, one after the other, that images need; of what several share, once
        """
        self._readable = readable
        self._used = used
        self._tree = TreeReader(blobs)
        self._whole: set[tuple[int, bytes]] = set()

    def losses(self, image: ImageRecord) -> Iterator[Loss]:
        """Yield what is missing, in order. Reads the tree, not the data. Blocks.

        :raises StorageError: the storage failed
        """
        if image.chunks:
            yield from self._below(image, root_node(image))

    def _below(self, image: ImageRecord, node: Node) -> Generator[Loss, None, bool]:
        # The same node can stand in images of several sizes, so its length belongs to what was seen.
        seen = (list_bytes(image, node), node.id)
        if node.id == ZERO_ID or seen in self._whole:
            return True
        try:
            loaded = self._tree.load(image, node)
        except (DamageFound, RepositoryError) as e:
            yield Loss(*span_of(image, node), b"", e)
            return False
        if self._used:
            self._used(b"".join((node.id, *loaded.bases)))
        if node.level == 1:
            whole = yield from self._chunks(image, node, loaded.ids)
        else:
            whole = True
            for child in children(node, image, loaded.ids):
                whole &= yield from self._below(image, child)
        if whole:
            self._whole.add(seen)
        return whole

    def _chunks(self, image: ImageRecord, node: Node, ids: bytes) -> Generator[Loss, None, bool]:
        stored = np.frombuffer(ids, np.uint64).reshape(-1, ID_BYTES // 8).any(axis=1)
        if self._used:
            self._used(ids)
        missing = np.flatnonzero(stored & ~self._readable.contained(ids)).tolist()
        for position in missing:
            chunk = ids[position * ID_BYTES : (position + 1) * ID_BYTES]
            place = Node(0, node.number * image.fanout + position, chunk)
            yield Loss(*span_of(image, place), chunk, None)
        return not missing
