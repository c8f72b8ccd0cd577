"""Reads blobs from packs, and hands out nothing that is not authenticated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from vmsnap.errors import DamageFound, ObjectNotFound, StorageError
from vmsnap.repository.chunkcache import ChunkCache
from vmsnap.repository.format import MAX_CHUNK_BYTES, BlobKind, Codec, pack_key
from vmsnap.repository.index import ChunkIndex, Location
from vmsnap.repository.seal import BrokenSeal, Cipher, Vault
from vmsnap.roles.storage import StorageBackend

if TYPE_CHECKING:
    from vmsnap.repository.second_process import SecondProcess

# One read takes in gaps up to this, and gets this long at most.
_GAP_BYTES = 128 << 10
_READ_BYTES = 8 << 20
_CIPHERS_KEPT = 1024
_DECOMPRESSION = {int(DecompressionParameter.window_log_max): MAX_CHUNK_BYTES.bit_length() - 1}


class Wanted(NamedTuple):
    """A blob to be read, and how long its content must be: exactly so for a chunk, at most for a tree node."""

    id: bytes
    raw_bytes: int


class BlobReader:
    """Reads blobs of one repository as `index` knows it. May be used by several threads at once."""

    def __init__(
        self,
        storage: StorageBackend,
        vault: Vault,
        index: ChunkIndex,
        refresh: Callable[[], ChunkIndex] | None = None,
        cache: ChunkCache | None = None,
    ) -> None:
        """:param refresh: gives the index as it is now; asked where a pack has gone, which garbage collection may have
        brought to another place. May be called by any thread, by one at a time.
        :param cache: keeps what is read
        """
        self.index = index
        self._storage = storage
        self._vault = vault
        self._ciphers: dict[bytes, Cipher] = {}
        self._refresh = refresh
        self._cache = cache
        self._refreshing = Lock()
        # Packs that are gone for good, and whether a chunk is: nobody is asked about them twice.
        self._gone: set[bytes] = set()
        self._some_are_lost = False

    def close(self) -> None:
        """Close the cache; idempotent. The reader can be used on."""
        if self._cache:
            self._cache.close()

    def data_id(self, content: bytes | memoryview) -> bytes:
        """The id that a chunk with that content has."""
        return self._vault.chunk_id(BlobKind.DATA, content)

    def read(self, kind: BlobKind, chunk_id: bytes, raw_bytes: int) -> bytes | memoryview:
        """The content of one blob, which for a tree node may be shorter than `raw_bytes`. Blocks.

        :raises DamageFound: it is missing or not what was written
        """
        _, content = next(self.read_many(kind, [Wanted(chunk_id, raw_bytes)]))
        if isinstance(content, DamageFound):
            raise content
        return content

    def read_many(
        self, kind: BlobKind, wanted: Sequence[Wanted]
    ) -> Iterator[tuple[int, bytes | memoryview | DamageFound]]:
        """Yield the content of each blob with its position in `wanted`, in the order in which they lie in the packs.

        A blob that is missing or not what was written comes as a `DamageFound`, so that the others are not lost.

        :raises StorageError: the storage failed
        """
        places: list[tuple[Location, int]] = []
        ids = [want.id for want in wanted]
        index = self.index
        found = index.find_many(ids)
        if None in found and not self._some_are_lost and self._renew(index):
            index = self.index
            found = index.find_many(ids)
            self._some_are_lost = None in found
        for position, (want, place) in enumerate(zip(wanted, found, strict=True)):
            if place is None:
                yield position, DamageFound(f"chunk {want.id.hex()[:16]} is missing: no pack that is known has it")
            else:
                places.append((place, position))
        if self._cache and places:
            kept = self._cache.get([place for place, _ in places])
            missing = []
            for place, position in places:
                content = self._open_kept(kind, wanted[position], place, kept.get(place))
                if content is None:
                    missing.append((place, position))
                else:
                    yield position, content
            places = missing
        for group in neighbours(sorted(places)):
            yield from self._read_group(kind, wanted, group, index)

    def read_at(self, wanted: Sequence[tuple[Wanted, Location]]) -> Iterator[bytes | memoryview]:
        """Yield the content of chunks in places that are known, and sorted. Nothing else is tried where that fails.

        :raises DamageFound: one is not what was written
        :raises StorageError: the storage failed, or has the pack no longer
        """
        for group in neighbours([(place, at) for at, (_, place) in enumerate(wanted)]):
            start, end = _bounds(group)
            data = memoryview(self._storage.get(pack_key(group[0][0].pack), start, end - start))
            for place, at in group:
                sealed = data[place.offset - start : place.offset - start + place.sealed_bytes]
                yield self._open(BlobKind.DATA, wanted[at][0], place, sealed)

    def second_process(self, fd: int) -> SecondProcess:
        """A process beside this one, to write chunks to an open file; to be closed by the caller. No I/O yet."""
        from vmsnap.repository.second_process import SecondProcess

        return SecondProcess(self._storage, self._vault, fd)

    def _open_kept(
        self, kind: BlobKind, want: Wanted, place: Location, sealed: bytes | None
    ) -> bytes | memoryview | None:
        """The content of a blob that was in the cache; None where it was not, or is not what was written."""
        if sealed is None or self._cache is None:
            return None
        try:
            return self._open(kind, want, place, memoryview(sealed))
        except DamageFound:
            self._cache.forget(place)
            return None

    def _read_group(
        self, kind: BlobKind, wanted: Sequence[Wanted], group: Sequence[tuple[Location, int]], index: ChunkIndex
    ) -> Iterator[tuple[int, bytes | memoryview | DamageFound]]:
        start, end = _bounds(group)
        pack = group[0][0].pack
        key = pack_key(pack)
        try:
            data = memoryview(self._storage.get(key, start, end - start))
        except (ObjectNotFound, StorageError) as e:
            trouble = self._damage_behind(key, end, e)
            if isinstance(e, ObjectNotFound) and pack not in self._gone and self._renew(index):
                yield from self._read_moved(kind, wanted, [position for _, position in group], pack, trouble)
                return
            if len(group) == 1:
                yield group[0][1], trouble
                return
            # The pack may have been cut off behind some of them.
            for one in group:
                yield from self._read_group(kind, wanted, [one], index)
            return
        fresh: list[tuple[Location, bytes]] = []
        for place, position in group:
            at = place.offset - start
            sealed = data[at : at + place.sealed_bytes]
            try:
                content = self._open(kind, wanted[position], place, sealed)
            except DamageFound as e:
                yield position, self._read_copy(kind, wanted[position], place, e, index)
                continue
            if self._cache:
                fresh.append((place, bytes(sealed)))
            yield position, content
        if self._cache and fresh:
            self._cache.put(fresh)

    def _read_copy(
        self, kind: BlobKind, want: Wanted, place: Location, damage: DamageFound, index: ChunkIndex
    ) -> bytes | memoryview | DamageFound:
        """The content from another place than `place`, where there is one that is whole; else what is wrong there."""
        for copy in index.copies(want.id):
            if (copy.pack, copy.offset) == (place.pack, place.offset):
                continue
            key = pack_key(copy.pack)
            try:
                return self._open(kind, want, copy, memoryview(self._storage.get(key, copy.offset, copy.sealed_bytes)))
            except DamageFound:
                continue
            except (ObjectNotFound, StorageError) as e:
                self._damage_behind(key, copy.offset + copy.sealed_bytes, e)
        return damage

    def _read_moved(
        self, kind: BlobKind, wanted: Sequence[Wanted], positions: Sequence[int], pack: bytes, trouble: DamageFound
    ) -> Iterator[tuple[int, bytes | memoryview | DamageFound]]:
        """Read blobs where they are now that their pack has gone."""
        moved: list[tuple[Location, int]] = []
        index = self.index
        places = index.find_many([wanted[position].id for position in positions])
        for place, position in zip(places, positions, strict=True):
            if place is None or place.pack == pack:
                self._gone.add(pack)
                yield position, trouble
            else:
                moved.append((place, position))
        for group in neighbours(sorted(moved)):
            yield from self._read_group(kind, wanted, group, index)

    def _renew(self, stale: ChunkIndex) -> bool:
        """Take the index as it is now; False where there is no newer one than `stale`."""
        with self._refreshing:
            if self.index is stale and self._refresh:
                self.index = self._refresh()
            return self.index is not stale

    def _damage_behind(self, key: str, end: int, error: ObjectNotFound | StorageError) -> DamageFound:
        """What a failed read says about the pack.

        :raises StorageError: nothing, the storage failed
        """
        if isinstance(error, StorageError):
            try:
                size = self._storage.stat(key).size_bytes
            except ObjectNotFound:
                size = -1
            if size >= end:
                raise error
            if size >= 0:
                return DamageFound(f"{key} is cut off: it has {size} bytes")
        return DamageFound(f"{key} is missing")

    def _open(self, kind: BlobKind, want: Wanted, place: Location, sealed: memoryview) -> bytes | memoryview:
        vault = self._vault
        cipher = self._ciphers.get(place.pack)
        if cipher is None:
            if len(self._ciphers) >= _CIPHERS_KEPT:
                self._ciphers.clear()
            cipher = self._ciphers[place.pack] = vault.pack_cipher(place.pack)
        where = f"{pack_key(place.pack)}, the blob at {place.offset}"
        fits = place.raw_bytes == want.raw_bytes or (kind is BlobKind.TREE and place.raw_bytes < want.raw_bytes)
        if place.flags & 0xF != kind or not fits:
            raise DamageFound(f"{where}, is listed as something else than what belongs here")
        try:
            plain = cipher.open(place.offset, sealed, vault.blob_bound(want.id, place.flags, place.raw_bytes))
        except BrokenSeal as e:
            raise DamageFound(f"{where}, is not what was written") from e
        try:
            content = decompressed(plain, Codec(place.flags >> 4), place.raw_bytes)
        except ValueError as e:
            raise DamageFound(f"{where}, cannot be decompressed: {e}") from e
        # The seal shows that it was written so; the id, that it was right when it was written.
        if vault.chunk_id(kind, content) != want.id:
            raise DamageFound(f"{where}, has another content than its id says")
        return content


def decompressed(plain: bytes | memoryview, codec: Codec, raw_bytes: int) -> bytes | memoryview:
    """The content of a blob, never more than `raw_bytes` of it.

    :raises ValueError: it is not exactly that long, or no content at all
    """
    if codec is Codec.RAW:
        content = plain
    else:
        unpack = ZstdDecompressor(options=_DECOMPRESSION)
        try:
            content = unpack.decompress(plain, max_length=raw_bytes)
        except ZstdError as e:
            raise ValueError(str(e)) from e
        if not unpack.eof or unpack.unused_data:
            raise ValueError("it holds more than it should")
    if len(content) != raw_bytes:
        raise ValueError(f"it has {len(content)} bytes instead of {raw_bytes}")
    return content


def _bounds(group: Sequence[tuple[Location, int]]) -> tuple[int, int]:
    return group[0][0].offset, max(place.offset + place.sealed_bytes for place, _ in group)


def neighbours(places: Sequence[tuple[Location, int]]) -> Iterator[list[tuple[Location, int]]]:
    """Group places, each with what the caller knows it by, that are worth one read; `places` is sorted."""
    group: list[tuple[Location, int]] = []
    start = end = 0
    for item in places:
        place = item[0]
        stop = place.offset + place.sealed_bytes
        if group and (place.pack != group[0][0].pack or place.offset > end + _GAP_BYTES or stop - start > _READ_BYTES):
            yield group
            group = []
        if not group:
            start, end = place.offset, stop
        group.append(item)
        end = max(end, stop)
    if group:
        yield group
