"""Builds the tree of an image while its chunks are stored, and stores as little of it as it can."""

from __future__ import annotations

from typing import Protocol

from vmsnap.repository.format import ID_BYTES, ZERO_ID, chunk_count, tree_depth
from vmsnap.repository.nodes import MAX_DIFFERENCES, LoadedNode, encode_difference, encode_list
from vmsnap.repository.tree import ImageRecord


class NodeStore(Protocol):
    """Where the nodes go."""

    def id_of(self, content: bytes) -> bytes:
        """The id that a node of that content has."""

    def knows(self, node: bytes) -> bool:
        """Whether the node of that id is stored already."""

    def store(self, content: bytes) -> bytes:
        """Keep a node, and return its id."""


class BaseTree(Protocol):
    """An older tree of the same geometry, of which this one may take over nodes, or say how it differs from them."""

    def node(self, level: int, number: int) -> LoadedNode | None:
        """Its node of that level and number; None where it has none that can be read."""


class TreeBuilder:
    """Takes the ids of an image's chunks in order, stores full nodes, and knows the root at the end."""

    def __init__(
        self, size_bytes: int, chunk_bytes: int, fanout: int, store: NodeStore, base: BaseTree | None = None
    ) -> None:
        self._depth = tree_depth(chunk_count(size_bytes, chunk_bytes), fanout)
        self._geometry = (size_bytes, chunk_bytes, fanout, self._depth)
        self._full = fanout * ID_BYTES
        self._store = store
        self._base = base
        self._levels = [bytearray() for _ in range(self._depth + 1)]
        # How many nodes of each level are closed, holes included: the number of the next one.
        self._closed = [0] * (self._depth + 1)

    def append(self, ids: bytes) -> None:
        """Add the ids of the next chunks."""
        at = 0
        while at < len(ids):
            part = ids[at : at + self._full - len(self._levels[0])]
            self._levels[0] += part
            at += len(part)
            if len(self._levels[0]) == self._full:
                self._close(0)

    def append_holes(self, count: int) -> None:
        """Add that many chunks of zeros, without walking over them one by one."""
        self._append_holes(0, count)

    def finish(self) -> ImageRecord:
        """Close what is open and return the image."""
        for level in range(self._depth):
            if self._levels[level]:
                self._close(level)
        root = bytes(self._levels[self._depth]) or ZERO_ID
        return ImageRecord(*self._geometry, root.hex())

    def _append_holes(self, level: int, count: int) -> None:
        ids = self._levels[level]
        fanout = self._full // ID_BYTES
        while count:
            if not ids and count >= fanout and level < self._depth:
                self._closed[level + 1] += count // fanout
                self._append_holes(level + 1, count // fanout)
                count %= fanout
                continue
            part = min(count, fanout - len(ids) // ID_BYTES)
            ids += bytes(part * ID_BYTES)
            count -= part
            if len(ids) == self._full:
                self._close(level)

    def _close(self, level: int) -> None:
        ids = bytes(self._levels[level])
        self._levels[level].clear()
        node = ZERO_ID if ids.count(0) == len(ids) else self._node(level + 1, ids)
        self._closed[level + 1] += 1
        above = self._levels[level + 1]
        above += node
        if len(above) == self._full and level + 1 < self._depth:
            self._close(level + 1)

    def _node(self, level: int, ids: bytes) -> bytes:
        """The id of a node with these ids, stored in the cheapest way."""
        content = encode_list(level, ids)
        old = self._base.node(level, self._closed[level]) if self._base else None
        if old is None:
            return self._store.store(content)
        if old.ids == ids and self._store.knows(old.id):
            return old.id
        listed = self._store.id_of(content)
        if self._store.knows(listed):
            return listed
        difference = None
        if len(old.bases) < MAX_DIFFERENCES and self._store.knows(old.id):
            difference = encode_difference(level, ids, old.id, old.ids)
        elif self._store.knows(old.list_id):
            difference = encode_difference(level, ids, old.list_id, old.list_ids)
        return self._store.store(difference or content)
