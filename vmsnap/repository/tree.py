"""Addressed images as trees of ids: fixed-size chunks at fixed offsets, their ids in nodes, the nodes' ids in nodes.

Equal parts of two images share their nodes, so a small change stores a few nodes, and a subtree of zeros stores none.
`nodes` has what stands in a node, `treebuilder` how an image's tree comes to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vmsnap.repository.format import ID_BYTES, ZERO_ID, chunk_count, is_chunk_size, is_fanout, tree_depth

NODE_HEADER_BYTES = 6
"""Kind, level and count, with which each node begins."""


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


def root_node(image: ImageRecord) -> Node:
    """The topmost node of an image."""
    return Node(image.depth, 0, bytes.fromhex(image.root))


def child_count(image: ImageRecord, node: Node) -> int:
    """How many children a node has: the fan-out, or fewer at the image's end."""
    span = image.fanout ** (node.level - 1)
    return min(image.fanout, chunk_count(image.chunks, span) - node.number * image.fanout)


def list_bytes(image: ImageRecord, node: Node) -> int:
    """The length of a node's content where it lists its children; no other content is longer."""
    return NODE_HEADER_BYTES + child_count(image, node) * ID_BYTES


def span_of(image: ImageRecord, node: Node) -> tuple[int, int]:
    """Which part of the image lies below a node, or is a chunk (level 0): offset and length in bytes."""
    span = image.fanout**node.level * image.chunk_bytes
    return node.number * span, min(span, image.size_bytes - node.number * span)


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
