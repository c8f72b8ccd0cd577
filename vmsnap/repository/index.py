"""Which chunks the repository has, and where: compact in memory, and as ``index/<id>`` objects.

In memory a chunk takes 49 bytes: sorted numpy arrays, and a small dictionary for what was added last.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from vmsnap.errors import DamageFound
from vmsnap.repository.format import ID_BYTES, MAX_CHUNK_BYTES, TAG_BYTES, BlobKind, index_key
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
        self._merge((self._number(pack), pack.entries) for pack in packs)

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
        if len(self._recent) > max(_MERGE_AT, len(self._heads) // 32):
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
        longer._merge((longer._number(pack), pack.entries) for pack in packs)
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

    def readable(self, sizes: Mapping[bytes, int], damaged: Iterable[tuple[bytes, int]] = ()) -> ChunkIndex:
        """A new index that lacks what reaches behind the end of its pack, by these sizes, and what is damaged. Not for
        one with packs added singly.

        :param sizes: the packs that are there
        :param damaged: pack and offset of blobs
        """
        ends = np.array([sizes.get(pack, 0) for pack in self._packs] or [0], np.uint64)
        kept = self._columns[:, 1].astype(np.uint64) + self._columns[:, 2] <= ends[self._columns[:, 0]]
        numbers: dict[bytes, list[int]] = {}
        for number, pack in enumerate(self._packs):
            numbers.setdefault(pack, []).append(number)
        places = [(number << 32) + offset for pack, offset in damaged for number in numbers.get(pack, ())]
        if places:
            here = (self._columns[:, 0].astype(np.uint64) << np.uint64(32)) + self._columns[:, 1]
            kept &= ~np.isin(here, np.array(places, np.uint64))
        rest = ChunkIndex()
        rest._packs, rest._sizes = self._packs.copy(), self._sizes.copy()
        rest._heads, rest._tails = self._heads[kept], self._tails[kept]
        rest._columns, rest._flags = self._columns[kept], self._flags[kept]
        return rest

    def packs_of(self, ids: bytes) -> set[bytes]:
        """The packs in which these ids, one after the other, are found. Not for an index with packs added singly."""
        rows = self._rows(ids)
        return {self._packs[number] for number in np.unique(self._columns[rows[rows >= 0], 0]).tolist()}

    def copies(self, chunk_id: bytes) -> list[Location]:
        """Every place where the chunk lies: two backups at the same time may both have stored it. Not for an index with
        packs added singly.
        """
        words = np.frombuffer(chunk_id, ">u8").astype(np.uint64)
        row = int(np.searchsorted(self._heads, words[0]))
        found = []
        while row < len(self._heads) and self._heads[row] == words[0]:
            if (self._tails[row] == words[1:]).all():
                number, offset, sealed, raw = self._columns[row].tolist()
                found.append(Location(self._packs[number], offset, sealed, raw, int(self._flags[row])))
            row += 1
        return found

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

    def contained(self, ids: bytes) -> npt.NDArray[np.bool_]:
        """For each of the ids, one after the other, whether it is here. Not for an index with packs added singly."""
        there: npt.NDArray[np.bool_] = self._rows(ids) >= 0
        return there

    def rows(self, ids: bytes) -> npt.NDArray[np.int64]:
        """A number below `len` for each of the ids, one after the other: that of the copy that `find` gives; -1 for
        what is not here. Not for an index with packs added singly.
        """
        return self._rows(ids)

    def ids_at(self, rows: npt.NDArray[np.int64]) -> bytes:
        """The ids of these rows, one after the other."""
        words = np.column_stack((self._heads[rows], self._tails[rows]))
        return words.astype(">u8").tobytes()

    def places_at(self, rows: npt.NDArray[np.int64]) -> list[Location]:
        """Where the blobs of these rows lie."""
        columns = zip(self._columns[rows].tolist(), self._flags[rows].tolist(), strict=True)
        return [Location(self._packs[at], offset, sealed, raw, flags) for (at, offset, sealed, raw), flags in columns]

    def rows_in(self, packs: Collection[bytes], among: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The rows that lie in these packs, of those that are set in `among`, in the order in which they lie there."""
        numbers = [number for number, pack in enumerate(self._packs) if pack in packs]
        rows = np.flatnonzero(among & np.isin(self._columns[:, 0], numbers))
        ordered: npt.NDArray[np.int64] = rows[np.lexsort((self._columns[rows, 1], self._columns[rows, 0]))]
        return ordered

    def sealed_bytes_by_pack(self, rows: npt.NDArray[np.bool_] | None = None) -> dict[bytes, int]:
        """How many bytes the blobs of these rows, or all, take in each pack that has any."""
        columns = self._columns if rows is None else self._columns[rows]
        sums = np.bincount(columns[:, 0], weights=columns[:, 2], minlength=len(self._packs))
        found: dict[bytes, int] = {}
        for number in np.flatnonzero(sums).tolist():
            found[self._packs[number]] = found.get(self._packs[number], 0) + int(sums[number])
        return found

    def packs_with(self, kind: BlobKind) -> set[bytes]:
        """The packs that hold blobs of that kind."""
        numbers = np.unique(self._columns[self._flags & 0xF == kind, 0])
        return {self._packs[number] for number in numbers.tolist()}

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

    def _merge(self, packs: Iterable[tuple[int, bytes]]) -> None:
        """Take in the entries of packs of these numbers. What `packs` yields is let go of one by one, and the columns
        are brought into order one after the other, so that all this takes little more than the result.
        """
        heads, tails, columns, flags = [self._heads], [self._tails], [self._columns], [self._flags]
        for number, entries in packs:
            rows = np.frombuffer(entries, _ENTRY_TYPE)
            words = np.ndarray((len(rows), 4), ">u8", entries, strides=(ENTRY.size, 8))
            heads.append(words[:, 0].astype(np.uint64))
            tails.append(words[:, 1:].astype(np.uint64))
            fields = np.empty((len(rows), 4), np.uint32)
            fields[:, 0] = number
            for column, name in enumerate(("offset", "sealed", "raw"), start=1):
                fields[:, column] = rows[name]
            columns.append(fields)
            flags.append(rows["flags"].copy())
        if len(heads) == 1:
            return
        self._heads = _joined(heads)
        # Stable sorting is quick where most is in order.
        order = np.argsort(self._heads, kind="stable")
        self._heads = self._heads[order]
        self._tails = _joined(tails)[order]
        self._columns = _joined(columns)[order]
        self._flags = _joined(flags)[order]


_Number = TypeVar("_Number", bound=np.generic)


def _joined(parts: list[npt.NDArray[_Number]]) -> npt.NDArray[_Number]:
    """All parts one after the other; the list is empty afterwards."""
    joined = np.concatenate(parts)
    parts.clear()
    return joined


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
