"""Addressed images as trees of ids: fixed-size chunks at fixed offsets, their ids in nodes, the nodes' ids in nodes.

Equal parts of two images share their nodes, so a small change stores a few nodes, and a subtree of zeros stores none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vmsnap.errors import DamageFound, RepositoryError
from vmsnap.repository.format import ID_BYTES, ZERO_ID, chunk_count, is_chunk_size, is_fanout, tree_depth

_NODE = struct.Struct("<BBI")
_LIST_NODE = 1


@dataclass(frozen=True)
class ImageRecord:
    """How to find the content of an image. `root` is the id of the topmost node, in hex; all zeros for an image of
    zeros. `depth` levels of nodes stand over the chunks.
    """

    size_bytes: int
    chunk_bytes: int
    fanout: int
    depth: int
    root: str

    @property
    def chunks(self) -> int:
        """How many chunks the image has, holes included; the last one may be shorter."""
        return chunk_count(self.size_bytes, self.chunk_bytes)

    def chunk_length(self, number: int) -> int:
        """The bytes of one chunk."""
        return min(self.chunk_bytes, self.size_bytes - number * self.chunk_bytes)

    def fault(self) -> str:
        """What is impossible about this record, one line; empty where nothing is."""
        if not 0 <= self.size_bytes < 1 << 63 or not is_chunk_size(self.chunk_bytes) or not is_fanout(self.fanout):
            return "an image has an impossible size"
        if self.depth != tree_depth(self.chunks, self.fanout):
            return "the depth of an image does not fit its size"
        try:
            root = bytes.fromhex(self.root)
        except ValueError:
            root = b""
        return "" if len(root) == ID_BYTES else "the root of an image is no id"


class Node(NamedTuple):
    """A place in the tree: `level` 1 lists chunks; `number` counts the nodes of a level from the image's begin."""

    level: int
    number: int
    id: bytes


class TreeBuilder:
    """Takes the ids of an image's chunks in order, stores full nodes, and knows the root at the end."""

    def __init__(self, size_bytes: int, chunk_bytes: int, fanout: int, store: Callable[[bytes], bytes]) -> None:
        """:param store: keeps a node's bytes and returns their id"""
        self._depth = tree_depth(chunk_count(size_bytes, chunk_bytes), fanout)
        self._geometry = (size_bytes, chunk_bytes, fanout, self._depth)
        self._full = fanout * ID_BYTES
        self._store = store
        self._levels = [bytearray() for _ in range(self._depth + 1)]

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

    def _append_holes(self, level: int, count: int) -> None:
        ids = self._levels[level]
        fanout = self._full // ID_BYTES
        while count:
            if not ids and count >= fanout and level < self._depth:
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
        if ids.count(0) == len(ids):
            node = ZERO_ID
        else:
            node = self._store(_NODE.pack(_LIST_NODE, level + 1, len(ids) // ID_BYTES) + ids)
        above = self._levels[level + 1]
        above += node
        if len(above) == self._full and level + 1 < self._depth:
            self._close(level + 1)

    def finish(self) -> ImageRecord:
        """Close what is open and return the image."""
        for level in range(self._depth):
            if self._levels[level]:
                self._close(level)
        root = bytes(self._levels[self._depth]) or ZERO_ID
        return ImageRecord(*self._geometry, root.hex())


def root_node(image: ImageRecord) -> Node:
    """The topmost node of an image."""
    return Node(image.depth, 0, bytes.fromhex(image.root))


def child_count(image: ImageRecord, node: Node) -> int:
    """How many children a node has: the fan-out, or fewer at the image's end."""
    span = image.fanout ** (node.level - 1)
    return min(image.fanout, chunk_count(image.chunks, span) - node.number * image.fanout)


def node_bytes(image: ImageRecord, node: Node) -> int:
    """The length of a node's content."""
    return _NODE.size + child_count(image, node) * ID_BYTES


def decode_node(image: ImageRecord, node: Node, content: bytes | memoryview) -> bytes:
    """The ids of a node's children.

    :raises DamageFound: this content cannot stand in this place
    :raises RepositoryError: a newer vmsnap wrote it
    """
    if len(content) < _NODE.size:
        raise DamageFound("a tree node is too short")
    kind, level, count = _NODE.unpack_from(content)
    if kind != _LIST_NODE:
        raise RepositoryError(f"a tree node is of kind {kind}, unknown here", cure="install a newer vmsnap")
    if level != node.level or count != child_count(image, node) or len(content) != node_bytes(image, node):
        raise DamageFound("a tree node stands in the wrong place")
    return bytes(content[_NODE.size :])


def children(node: Node, image: ImageRecord, ids: bytes) -> Iterator[Node]:
    """The nodes below a node of level 2 or higher."""
    for position in range(len(ids) // ID_BYTES):
        at = position * ID_BYTES
        yield Node(node.level - 1, node.number * image.fanout + position, ids[at : at + ID_BYTES])


def leaves(image: ImageRecord, load: Callable[[ImageRecord, Node], bytes]) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield the image's chunks in order, in runs: the first one's number, their count, their ids (None: all zeros).

    :param load: returns the ids of a node's children; its exceptions pass through
    """
    stack = [root_node(image)] if image.chunks else []
    while stack:
        node = stack.pop()
        span = image.fanout**node.level
        first = node.number * span
        if node.id == ZERO_ID:
            yield first, min(span, image.chunks - first), None
            continue
        ids = load(image, node)
        if node.level == 1:
            yield first, len(ids) // ID_BYTES, ids
        else:
            stack.extend(reversed(list(children(node, image, ids))))
