"""Copies blobs that are still needed out of packs that hold much that is not, or little at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock

import numpy as np
import numpy.typing as npt

from vmsnap.errors import DamageFound, ObjectNotFound, RepositoryError, StorageError
from vmsnap.repository.blobs import neighbours
from vmsnap.repository.format import ID_BYTES, BlobKind, Codec, pack_key
from vmsnap.repository.index import ChunkIndex, IndexedPack, Location, seal_index
from vmsnap.repository.packs import ENTRY
from vmsnap.repository.seal import BrokenSeal, Vault
from vmsnap.repository.upload import NewBlob, PackUploader
from vmsnap.roles.storage import StorageBackend

INDEX_AT_BLOBS = 1 << 18
"""An index object lists about so many blobs at most."""
_ROWS_AT_ONCE = 1 << 14


class IndexWriter:
    """Writes index objects that list packs, each of bounded size. May be used by several threads at once."""

    def __init__(self, storage: StorageBackend, vault: Vault) -> None:
        self._storage = storage
        self._vault = vault
        self._lock = Lock()
        self._packs: list[IndexedPack] = []
        self._blobs = 0
        self.written = 0
        """How many index objects were put."""

    @property
    def unlisted(self) -> Sequence[IndexedPack]:
        """The packs that certainly no index object lists yet."""
        return tuple(self._packs)

    def add(self, pack: IndexedPack) -> None:
        """Add a pack that is durable.

        :raises StorageError: the storage failed
        """
        with self._lock:
            self._packs.append(pack)
            self._blobs += len(pack.entries) // ENTRY.size
            if self._blobs >= INDEX_AT_BLOBS:
                self._write()

    def flush(self) -> None:
        """Write what is left; returns when it is durable.

        :raises StorageError: the storage failed
        """
        with self._lock:
            self._write()

    def _write(self) -> None:
        # Taken out first: a put that fails may have been done all the same.
        packs, self._packs, self._blobs = self._packs, [], 0
        if packs:
            key, data = seal_index(self._vault, packs)
            self._storage.put(key, data)
            self.written += 1


def copy_blobs(
    storage: StorageBackend,
    vault: Vault,
    index: ChunkIndex,
    rows: npt.NDArray[np.int64],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy the blobs of these rows of `index`, in this order, into new packs, and list those: durable on return.
    Blocks.

    Blobs are authenticated and sealed anew for their new place, and stay compressed as they are. What was copied before
    a failure is removed, or is garbage. Memory: the buffers of the packs.

    :param progress: called with the bytes copied so far
    :raises DamageFound: one of them is not what was written
    :raises RepositoryError: a newer vmsnap wrote one of them
    :raises StorageError: the storage failed
    """
    listing = IndexWriter(storage, vault)
    uploader = PackUploader(storage, vault, listing.add)
    done = 0
    try:
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[at : at + _ROWS_AT_ONCE]
            ids = index.ids_at(part)
            places = sorted((place, number * ID_BYTES) for number, place in enumerate(index.places_at(part)))
            for group in neighbours(places):
                _copy(storage, vault, uploader, [(place, ids[at : at + ID_BYTES]) for place, at in group])
                done += sum(place.sealed_bytes for place, _ in group)
                if progress:
                    progress(done)
        uploader.flush()
        listing.flush()
    finally:
        uploader.close()
        for pack in listing.unlisted:  # after a failure: nobody can know of them
            with suppress(StorageError):
                storage.delete(pack_key(pack.id))


def _copy(
    storage: StorageBackend, vault: Vault, uploader: PackUploader, blobs: Sequence[tuple[Location, bytes]]
) -> None:
    """Copy blobs that are neighbours in one pack."""
    pack = blobs[0][0].pack
    start = blobs[0][0].offset
    end = max(place.offset + place.sealed_bytes for place, _ in blobs)
    try:
        data = memoryview(storage.get(pack_key(pack), start, end - start))
    except ObjectNotFound as e:
        raise DamageFound(f"{pack_key(pack)} is missing", cure="run: vmsnap repair") from e
    cipher = vault.pack_cipher(pack)
    for place, blob_id in blobs:
        where = f"{pack_key(pack)}, the blob at {place.offset}"
        try:
            kind, codec = BlobKind(place.flags & 0xF), Codec(place.flags >> 4)
        except ValueError as e:
            raise RepositoryError(f"{where}, is of a kind unknown here", cure="install a newer vmsnap") from e
        sealed = data[place.offset - start : place.offset - start + place.sealed_bytes]
        try:
            plain = cipher.open(place.offset, sealed, vault.blob_bound(blob_id, place.flags, place.raw_bytes))
        except BrokenSeal as e:
            raise DamageFound(f"{where}, is not what was written", cure="run: vmsnap repair") from e
        uploader.append([NewBlob(blob_id, kind, codec, place.raw_bytes, plain)])
