"""The content of tree nodes: lists of ids, and differences from another node; how they are written and read.

A node is kind (1 byte), level (1), count (4), and then either its ids, or the id of another node of the same level and
count, the number of positions (4) at which this one differs, the positions (2 each, ascending) and the ids that stand
there. A changed chunk somewhere in 64 MiB of disk so costs 72 bytes instead of a list of 8 KiB.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from vmsnap.errors import DamageFound, RepositoryError
from vmsnap.repository.format import ID_BYTES, ZERO_ID, BlobKind
from vmsnap.repository.tree import ImageRecord, Node, child_count, list_bytes, root_node

if TYPE_CHECKING:
    from vmsnap.repository.blobs import BlobReader

ReadNode: TypeAlias = Callable[[bytes, int], "bytes | memoryview"]
"""Reads the content of the node of that id, so many bytes at most; raises DamageFound."""

MAX_DIFFERENCES = 8
"""How many differences may stand on one list: what one read of a node costs at most, besides the list."""

_HEADER = struct.Struct("<BBI")
_DIFFERENCE = struct.Struct("<32sI")
_LIST = 1
_DIFFERS = 2
_AHEAD = 64
_CACHE_BYTES = 8 << 20


@dataclass(frozen=True)
class LoadedNode:
    """A node with the ids of its children. `bases` are the ids of the nodes that it is a difference from, directly and
    over others; the last one is a list, whose ids are `list_ids`.
    """

    id: bytes
    ids: bytes
    bases: tuple[bytes, ...]
    list_ids: bytes

    @property
    def list_id(self) -> bytes:
        """The id of the list on which it stands: its own, or that of the last base."""
        return self.bases[-1] if self.bases else self.id


def encode_list(level: int, ids: bytes) -> bytes:
    """The content of a node that lists `ids`."""
    return _HEADER.pack(_LIST, level, len(ids) // ID_BYTES) + ids


def encode_difference(level: int, ids: bytes, base: bytes, base_ids: bytes) -> bytes | None:
    """The content of a node that has `ids`, as the difference from the node `base`, which has `base_ids`; None where
    that would save less than half of the list.
    """
    import numpy as np

    if len(ids) != len(base_ids):
        return None
    new, old = (np.frombuffer(each, np.uint64).reshape(-1, ID_BYTES // 8) for each in (ids, base_ids))
    positions = np.flatnonzero((new != old).any(axis=1))
    if len(positions) * (ID_BYTES + 2) + _DIFFERENCE.size > len(ids) // 2:
        return None
    header = _HEADER.pack(_DIFFERS, level, len(new)) + _DIFFERENCE.pack(base, len(positions))
    return header + positions.astype("<u2").tobytes() + new[positions].tobytes()


def load_node(image: ImageRecord, node: Node, read: ReadNode) -> LoadedNode:
    """Read a node, and the nodes that it is a difference from.

    :raises DamageFound: one of them cannot be read, or cannot stand in this place
    :raises RepositoryError: a newer vmsnap wrote it
    """
    limit = list_bytes(image, node)
    count = child_count(image, node)
    bases: list[bytes] = []
    changes: list[tuple[memoryview, memoryview]] = []
    wanted = node.id
    while True:
        content = memoryview(read(wanted, limit))
        kind = _checked_kind(node, count, content)
        if kind == _LIST:
            if len(content) != limit:
                raise DamageFound("a tree node stands in the wrong place")
            break
        if len(bases) == MAX_DIFFERENCES:
            raise DamageFound("a tree node is a difference from too many others")
        wanted, positions, ids = _difference(content, count)
        bases.append(wanted)
        changes.append((positions, ids))
    list_ids = bytes(content[_HEADER.size :])
    return LoadedNode(node.id, _apply(list_ids, changes), tuple(bases), list_ids)


def base_of(content: bytes | memoryview) -> bytes | None:
    """The id of the node that this content is a difference from; None where it is none, or too short to say."""
    if len(content) < _HEADER.size + _DIFFERENCE.size or content[0] != _DIFFERS:
        return None
    return bytes(_DIFFERENCE.unpack_from(content, _HEADER.size)[0])


def _checked_kind(node: Node, count: int, content: memoryview) -> int:
    if len(content) < _HEADER.size:
        raise DamageFound("a tree node is too short")
    kind, level, listed = _HEADER.unpack_from(content)
    if kind not in (_LIST, _DIFFERS):
        raise RepositoryError(f"a tree node is of kind {kind}, unknown here", cure="install a newer vmsnap")
    if level != node.level or listed != count:
        raise DamageFound("a tree node stands in the wrong place")
    return int(kind)


def _difference(content: memoryview, count: int) -> tuple[bytes, memoryview, memoryview]:
    """Base, positions and ids of a difference."""
    start = _HEADER.size + _DIFFERENCE.size
    if len(content) < start:
        raise DamageFound("a tree node is too short")
    base, changed = _DIFFERENCE.unpack_from(content, _HEADER.size)
    ids = start + 2 * changed
    if changed > count or len(content) != ids + changed * ID_BYTES:
        raise DamageFound("a tree node has an impossible difference")
    return base, content[start:ids], content[ids:]


def _apply(ids: bytes, changes: Sequence[tuple[memoryview, memoryview]]) -> bytes:
    """The ids after the changes, the last one first."""
    if not changes:
        return ids
    import numpy as np

    rows = np.frombuffer(ids, np.uint64).reshape(-1, ID_BYTES // 8).copy()
    for positions, new in reversed(changes):
        at = np.frombuffer(positions, "<u2")
        if len(at) and (int(at[-1]) >= len(rows) or (at[1:] <= at[:-1]).any()):
            raise DamageFound("a tree node has an impossible difference")
        rows[at] = np.frombuffer(new, np.uint64).reshape(-1, ID_BYTES // 8)
    return rows.tobytes()


class TreeReader:
    """Loads the nodes of images. Reads the siblings of a node with it, since they are asked for next and lie beside
    it. Used by one thread at a time; its memory is bounded.
    """

    def __init__(self, blobs: BlobReader) -> None:
        self._blobs = blobs
        self._contents: OrderedDict[bytes, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._above: dict[int, tuple[Node, bytes]] = {}

    def load(self, image: ImageRecord, node: Node) -> LoadedNode:
        """A node with its children's ids. Blocks.

        :raises DamageFound: it cannot be read
        :raises RepositoryError: a newer vmsnap wrote it
        :raises StorageError: the storage failed
        """
        if node.id not in self._contents:
            self._read_ahead(image, node)
        loaded = load_node(image, node, self._read)
        self._above[node.level] = (node, loaded.ids)
        return loaded

    def find(self, image: ImageRecord, level: int, number: int) -> LoadedNode | None:
        """The node of that level and number; None for a hole. As `load`."""
        node = root_node(image)
        while node.id != ZERO_ID:
            if node.level == level:
                return self.load(image, node)
            known, ids = self._above.get(node.level, (None, b""))
            if known != node:
                ids = self.load(image, node).ids
            below = number // image.fanout ** (node.level - 1 - level)
            at = below % image.fanout * ID_BYTES
            node = Node(node.level - 1, below, ids[at : at + ID_BYTES])
        return None

    def _read(self, node: bytes, limit: int) -> bytes:
        content = self._contents.get(node)
        if content is None or len(content) > limit:
            content = bytes(self._blobs.read(BlobKind.TREE, node, limit))
            self._keep(node, content)
        else:
            self._contents.move_to_end(node)
        return content

    def _keep(self, node: bytes, content: bytes) -> None:
        self._cached_bytes += len(content) - len(self._contents.pop(node, b""))
        self._contents[node] = content
        while self._cached_bytes > _CACHE_BYTES and len(self._contents) > 1:
            _, dropped = self._contents.popitem(last=False)
            self._cached_bytes -= len(dropped)

    def _read_ahead(self, image: ImageRecord, node: Node) -> None:
        """Bring a node, some of the siblings that follow it, and what they are differences from into memory."""
        from vmsnap.repository.blobs import Wanted

        limit = list_bytes(image, Node(node.level, 0, node.id))
        wanted = {node.id: None}
        parent, ids = self._above.get(node.level + 1, (None, b""))
        if parent and parent.number == node.number // image.fanout:
            at = node.number % image.fanout * ID_BYTES
            count = min(_AHEAD, max(1, _CACHE_BYTES // 4 // limit))
            part = ids[at : at + count * ID_BYTES]
            wanted |= {part[i : i + ID_BYTES]: None for i in range(0, len(part), ID_BYTES)}
        for _ in range(MAX_DIFFERENCES + 1):
            missing = [Wanted(each, limit) for each in wanted if each != ZERO_ID and each not in self._contents]
            wanted = {}
            for position, content in self._blobs.read_many(BlobKind.TREE, missing):
                # What is damaged is told when its own turn comes.
                if not isinstance(content, DamageFound):
                    self._keep(missing[position].id, bytes(content))
                    if base := base_of(content):
                        wanted[base] = None
            if not wanted:
                return
