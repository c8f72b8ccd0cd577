"""Which chunks the repository has, and where: compact in memory, and as ``index/<id>`` objects.

In memory a chunk takes 49 bytes: sorted numpy arrays, and a small dictionary for what was added last.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmsnap.errors import DamageFound
from vmsnap.repository.format import ID_BYTES, MAX_CHUNK_BYTES, TAG_BYTES, index_key
from vmsnap.repository.packs import ENTRY, MAGIC
from vmsnap.repository.seal import BrokenSeal, Vault

_ENTRY_TYPE = np.dtype([("id", "V32"), ("offset", "<u4"), ("sealed", "<u4"), ("raw", "<u4"), ("flags", "u1")])
_PACK_HEADER = struct.Struct("<32sQI")
_MERGE_AT = 1 << 16


class Location(NamedTuple):
    """Where a blob lies. `flags` as in `packs.Entry`."""

    pack: bytes
    offset: int
    sealed_bytes: int
    raw_bytes: int
    flags: int


class IndexedPack(NamedTuple):
    """A pack as an index object lists it; `entries` as in the pack's trailer."""

    id: bytes
    size_bytes: int
    entries: bytes


class ChunkIndex:
    """Finds chunks by id. Not thread-safe while packs are added."""

    def __init__(self, packs: Iterable[IndexedPack] = ()) -> None:
        self._packs: list[bytes] = []
        self._sizes: dict[bytes, int] = {}
        self._recent: dict[bytes, tuple[int, int, int, int, int]] = {}
        # Sorted by the first eight bytes of the id, which are as good as random: heads, the rest, and the columns.
        self._heads: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._tails: npt.NDArray[np.uint64] = np.empty((0, 3), np.uint64)
        self._columns: npt.NDArray[np.uint32] = np.empty((0, 4), np.uint32)
        self._flags: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._merge([(self._number(pack), pack.entries) for pack in packs])

    def __len__(self) -> int:
        return len(self._heads) + len(self._recent)

    @property
    def pack_sizes(self) -> dict[bytes, int]:
        """The size in bytes of each pack."""
        return self._sizes

    def add_pack(self, pack: IndexedPack) -> None:
        """Add the chunks of one pack."""
        number = self._number(pack)
        for chunk_id, offset, sealed, raw, flags in ENTRY.iter_unpack(pack.entries):
            self._recent[chunk_id] = (number, offset, sealed, raw, flags)
        if len(self._recent) > max(_MERGE_AT, len(self._heads) // 4):
            by_pack: dict[int, list[bytes]] = {}
            for chunk_id, (at, *fields) in self._recent.items():
                by_pack.setdefault(at, []).append(ENTRY.pack(chunk_id, *fields))
            self._recent = {}
            self._merge([(at, b"".join(entries)) for at, entries in by_pack.items()])

    def extended(self, packs: Iterable[IndexedPack]) -> ChunkIndex:
        """A new index that has these packs too; this one stays as it is. Not for one with packs added singly."""
        longer = ChunkIndex()
        longer._packs, longer._sizes = self._packs.copy(), self._sizes.copy()
        longer._heads, longer._tails = self._heads, self._tails
        longer._columns, longer._flags = self._columns, self._flags
        longer._merge([(longer._number(pack), pack.entries) for pack in packs])
        return longer

    def behind(self, packs: set[bytes]) -> ChunkIndex:
        """A new index that names a place in these packs only for chunks that lie in no other. Not for one with packs
        added singly."""
        if not packs:
            return self
        last = np.isin(self._columns[:, 0], [number for number, pack in enumerate(self._packs) if pack in packs])
        order = np.lexsort((last, self._heads))
        changed = ChunkIndex()
        changed._packs, changed._sizes = self._packs.copy(), self._sizes.copy()
        changed._heads, changed._tails = self._heads[order], self._tails[order]
        changed._columns, changed._flags = self._columns[order], self._flags[order]
        return changed

    def without(self, packs: set[bytes]) -> ChunkIndex:
        """A new index that lacks what lies in these packs. Not for one with packs added singly."""
        if not packs:
            return self
        shorter = ChunkIndex()
        shorter._packs = self._packs.copy()
        shorter._sizes = {pack: size for pack, size in self._sizes.items() if pack not in packs}
        numbers = [number for number, pack in enumerate(self._packs) if pack in packs]
        kept = ~np.isin(self._columns[:, 0], numbers)
        shorter._heads, shorter._tails = self._heads[kept], self._tails[kept]
        shorter._columns, shorter._flags = self._columns[kept], self._flags[kept]
        return shorter

    def find(self, chunk_id: bytes) -> Location | None:
        """Where the chunk lies; None if it is not here."""
        return self.find_many([chunk_id])[0]

    def find_many(self, ids: Sequence[bytes]) -> list[Location | None]:
        """Where each of the chunks lies; quicker than asking one by one."""
        if not ids:
            return []
        rows = self._rows(b"".join(ids))
        there = rows >= 0
        found: list[Location | None] = [None] * len(ids)
        columns = zip(self._columns[rows[there]].tolist(), self._flags[rows[there]].tolist(), strict=True)
        for at, ((number, offset, sealed, raw), flags) in zip(np.flatnonzero(there).tolist(), columns, strict=True):
            found[at] = Location(self._packs[number], offset, sealed, raw, flags)
        if self._recent:
            for at, chunk_id in enumerate(ids):
                if recent := self._recent.get(chunk_id):
                    found[at] = Location(self._packs[recent[0]], *recent[1:])
        return found

    def contains(self, ids: Sequence[bytes]) -> list[bool]:
        """For each id whether it is here; quicker than asking one by one."""
        if not ids:
            return []
        found: list[bool] = (self._rows(b"".join(ids)) >= 0).tolist()
        if self._recent:
            return [at or chunk_id in self._recent for at, chunk_id in zip(found, ids, strict=True)]
        return found

    def _number(self, pack: IndexedPack) -> int:
        self._packs.append(pack.id)
        self._sizes[pack.id] = pack.size_bytes
        return len(self._packs) - 1

    def _rows(self, ids: bytes) -> npt.NDArray[np.int64]:
        """The row of each id in the sorted arrays, -1 where there is none."""
        words = np.frombuffer(ids, ">u8").reshape(-1, 4).astype(np.uint64)
        if not len(self._heads):
            return np.full(len(words), -1, np.int64)
        rows = np.searchsorted(self._heads, words[:, 0])
        clipped = np.minimum(rows, len(self._heads) - 1)
        same_head = self._heads[clipped] == words[:, 0]
        same = same_head & (self._tails[clipped] == words[:, 1:]).all(axis=1)
        result = np.where(same, clipped, -1).astype(np.int64)
        for at in np.flatnonzero(same_head & ~same):  # two ids with the same first eight bytes: hardly ever
            row = int(clipped[at])
            while row < len(self._heads) and self._heads[row] == words[at, 0]:
                if (self._tails[row] == words[at, 1:]).all():
                    result[at] = row
                    break
                row += 1
        return result

    def _merge(self, packs: list[tuple[int, bytes]]) -> None:
        if not packs:
            return
        entries = np.frombuffer(b"".join(entries for _, entries in packs), _ENTRY_TYPE)
        words = np.frombuffer(np.ascontiguousarray(entries["id"]).tobytes(), ">u8").reshape(-1, 4).astype(np.uint64)
        columns = np.empty((len(entries), 4), np.uint32)
        columns[:, 0] = np.repeat(
            np.array([number for number, _ in packs], np.uint32), [len(e) // ENTRY.size for _, e in packs]
        )
        for column, name in enumerate(("offset", "sealed", "raw"), start=1):
            columns[:, column] = entries[name]
        heads = np.concatenate((self._heads, words[:, 0]))
        order = np.argsort(heads, kind="stable")
        self._heads = heads[order]
        self._tails = np.concatenate((self._tails, words[:, 1:]))[order]
        self._columns = np.concatenate((self._columns, columns))[order]
        self._flags = np.concatenate((self._flags, entries["flags"]))[order]


def seal_index(vault: Vault, packs: Sequence[IndexedPack]) -> tuple[str, bytes]:
    """An index object that lists `packs`: its key and its content."""
    key = index_key(os.urandom(ID_BYTES))
    parts = [struct.pack("<I", len(packs))]
    for pack in packs:
        parts += (_PACK_HEADER.pack(pack.id, pack.size_bytes, len(pack.entries) // ENTRY.size), pack.entries)
    return key, vault.seal_object(key, b"".join(parts))


def open_index(vault: Vault, key: str, data: bytes) -> list[IndexedPack]:
    """The packs that the index object of that key lists.

    :raises DamageFound: it is not what was written
    """
    try:
        content = vault.open_object(key, data)
    except BrokenSeal as e:
        raise DamageFound(f"{key} is damaged: it is not what was written") from e
    try:
        return list(_unpack(content))
    except (struct.error, ValueError) as e:
        raise DamageFound(f"{key} is damaged: {e}") from e


def _unpack(content: bytes) -> Iterable[IndexedPack]:
    (count,) = struct.unpack_from("<I", content)
    at = 4
    for _ in range(count):
        pack, size, chunks = _PACK_HEADER.unpack_from(content, at)
        at += _PACK_HEADER.size
        entries = content[at : at + chunks * ENTRY.size]
        if len(entries) != chunks * ENTRY.size:
            raise ValueError("it ends too early")
        at += len(entries)
        _check_entries(entries, size)
        yield IndexedPack(pack, size, entries)
    if at != len(content):
        raise ValueError("it has more than it lists")


def _check_entries(entries: bytes, pack_bytes: int) -> None:
    rows = np.frombuffer(entries, _ENTRY_TYPE)
    ends = rows["offset"].astype(np.uint64) + rows["sealed"]
    if (
        (ends > pack_bytes).any()
        or (rows["offset"] < len(MAGIC)).any()
        or (rows["sealed"] < TAG_BYTES).any()
        or (rows["raw"] > MAX_CHUNK_BYTES).any()
    ):
        raise ValueError("it lists a chunk outside of its pack")
