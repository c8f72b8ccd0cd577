"""How many bytes of tree a changed disk of a given size stores: the tree alone, with made-up ids in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from vmsnap.errors import DamageFound
from vmsnap.repository.format import ID_BYTES, TAG_BYTES, ZERO_ID, ChunkSizes, chunk_count
from vmsnap.repository.nodes import LoadedNode, load_node
from vmsnap.repository.packs import ENTRY
from vmsnap.repository.tree import ImageRecord, Node, root_node
from vmsnap.repository.treebuilder import TreeBuilder

_PIECE_CHUNKS = 1 << 18
_NODE_OVERHEAD_BYTES = TAG_BYTES + 2 * ENTRY.size
"""Of each stored node: its seal, and its entries in the pack's trailer and in the index."""


@dataclass(frozen=True)
class Growth:
    """What the tree of one state of the disk added to the repository."""

    what: str
    changed_chunks: int
    nodes: int
    added_bytes: int
    """Sealed nodes with their entries in trailer and index."""


def tree_growth(size_bytes: int, *, fraction: float = 0.01, sizes: ChunkSizes | None = None) -> list[Growth]:
    """Build the tree of a disk without any hole, and those of three changed states on it. Blocks for some seconds.

    Takes about 600 MiB of memory for a TiB: all nodes and ids are kept.
    """
    sizes = sizes or ChunkSizes()
    chunks = chunk_count(size_bytes, sizes.disk)
    ids = np.frombuffer(np.random.default_rng(6).bytes(chunks * ID_BYTES), np.uint8).reshape(-1, ID_BYTES)
    nodes = _Nodes()

    def build(what: str, changed: npt.NDArray[np.int64], base: ImageRecord | None) -> tuple[ImageRecord, Growth]:
        state = ids.copy()
        state[changed, 0] ^= 0x55
        count, stored = len(nodes.contents), nodes.stored_bytes
        builder = TreeBuilder(size_bytes, sizes.disk, sizes.fanout, nodes, _Tree(nodes, base) if base else None)
        for at in range(0, chunks, _PIECE_CHUNKS):
            builder.append(state[at : at + _PIECE_CHUNKS].tobytes())
        image = builder.finish()
        return image, Growth(what, len(changed), len(nodes.contents) - count, nodes.stored_bytes - stored)

    amount = int(chunks * fraction)
    scattered = np.sort(np.random.default_rng(7).choice(chunks, amount, replace=False)).astype(np.int64)
    first, whole = build("all of it, the first time", np.empty(0, np.int64), None)
    states = {
        "nothing changed": np.empty(0, np.int64),
        "one chunk changed": np.array([chunks // 3]),
        f"{fraction:.0%} of the chunks changed, in one stretch": np.arange(chunks // 3, chunks // 3 + amount),
        f"{fraction:.0%} of the chunks changed, at random places": scattered,
    }
    return [whole, *(build(what, changed, first)[1] for what, changed in states.items())]


class _Nodes:
    """A `NodeStore` in memory."""

    def __init__(self) -> None:
        self.contents: dict[bytes, bytes] = {}
        self.stored_bytes = 0

    def id_of(self, content: bytes) -> bytes:
        return blake3(content).digest()

    def knows(self, node: bytes) -> bool:
        return node in self.contents

    def store(self, content: bytes) -> bytes:
        node = self.id_of(content)
        if node not in self.contents:
            self.contents[node] = content
            self.stored_bytes += len(content) + _NODE_OVERHEAD_BYTES
        return node


class _Tree:
    """A `BaseTree` over nodes in memory."""

    def __init__(self, nodes: _Nodes, image: ImageRecord) -> None:
        self._nodes = nodes
        self._image = image
        self._above: dict[int, tuple[Node, bytes]] = {}

    def node(self, level: int, number: int) -> LoadedNode | None:
        at = root_node(self._image)
        while at.id != ZERO_ID:
            if at.level == level:
                return load_node(self._image, at, self._read)
            if self._above.get(at.level, (None, b""))[0] != at:
                self._above[at.level] = (at, load_node(self._image, at, self._read).ids)
            ids = self._above[at.level][1]
            below = number // self._image.fanout ** (at.level - 1 - level)
            start = below % self._image.fanout * ID_BYTES
            at = Node(at.level - 1, below, ids[start : start + ID_BYTES])
        return None

    def _read(self, node: bytes, limit: int) -> bytes:
        content = self._nodes.contents[node]
        if len(content) > limit:
            raise DamageFound("a tree node is longer than it can be")
        return content
