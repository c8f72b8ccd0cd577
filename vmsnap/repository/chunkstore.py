"""Stores the chunks and tree nodes of one backup: each that is new once, compressed, in packs that are listed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from threading import Lock, local

import numpy as np
import numpy.typing as npt
from backports.zstd import ZstdCompressor

from vmsnap.errors import ObjectNotFound, StorageError, StorageFull
from vmsnap.repository.format import ZERO_ID, BlobKind, Codec
from vmsnap.repository.index import ChunkIndex, IndexedPack, seal_index
from vmsnap.repository.packs import ENTRY
from vmsnap.repository.seal import Vault
from vmsnap.repository.upload import NewBlob, PackUploader
from vmsnap.roles.storage import StorageBackend

# An index object is written whenever this many chunks are new, so that an interrupted first backup is not for nothing.
_INDEX_AT_CHUNKS = 1 << 18


class ChunkStore:
    """Takes content from several threads at once. Its memory is the buffers of the packs and the index of what is new.
    Also the `NodeStore` of tree builders.
    """

    def __init__(self, storage: StorageBackend, vault: Vault, known: ChunkIndex, *, level: int) -> None:
        """:param known: the chunks that are durable and listed in the repository; not changed
        :param level: of zstd
        """
        self.known = known
        self._storage = storage
        self._vault = vault
        self._level = level
        self._lock = Lock()
        self._pending: set[bytes] = set()
        self._mine = ChunkIndex()
        self._unlisted: list[IndexedPack] = []
        self._unlisted_chunks = 0
        self._stored_bytes = 0
        self._compressors = local()
        self._uploader = PackUploader(storage, vault, self._pack_stored)

    @property
    def stored_bytes(self) -> int:
        """What was added to the repository so far."""
        return self._stored_bytes

    @property
    def unlisted(self) -> tuple[IndexedPack, ...]:
        """The packs that are durable and that no index object lists: nobody can rely on them."""
        return tuple(self._unlisted)

    def chunk_ids(self, content: memoryview, chunk_bytes: int) -> list[bytes]:
        """The id of each chunk of `content`; that of zeros where it is all zeros."""
        return [
            ZERO_ID if zero else self._vault.chunk_id(BlobKind.DATA, content[at : at + chunk_bytes])
            for at, zero in zip(range(0, len(content), chunk_bytes), _zeros(content, chunk_bytes), strict=True)
        ]

    def store_chunks(self, content: memoryview, chunk_bytes: int) -> bytes:
        """Store the chunks of `content` that are neither zeros nor known; returns the ids of all.

        :raises StorageError: the storage failed
        """
        ids = self.chunk_ids(content, chunk_bytes)
        blobs = []
        for position in self._claim(ids):
            at = position * chunk_bytes
            blobs.append(self._packed(BlobKind.DATA, ids[position], content[at : at + chunk_bytes]))
        self._uploader.append(blobs)
        return b"".join(ids)

    def has(self, ids: Sequence[bytes]) -> list[bool]:
        """For each id whether it is durable and listed, or stored by this backup, or about to be."""
        found = self.known.contains(ids)
        if all(found):
            return found
        with self._lock:
            mine = self._mine.contains(ids)
            return [known or here or each in self._pending for known, here, each in zip(found, mine, ids, strict=True)]

    def contains(self, ids: bytes) -> npt.NDArray[np.bool_]:
        """For each id whether it is durable and listed, or stands for zeros."""
        zero: npt.NDArray[np.bool_] = np.logical_not(np.frombuffer(ids, np.uint64).reshape(-1, 4).any(axis=1))
        return zero | self.known.contained(ids)

    def id_of(self, content: bytes) -> bytes:
        """See `NodeStore`."""
        return self._vault.chunk_id(BlobKind.TREE, content)

    def knows(self, node: bytes) -> bool:
        """See `NodeStore`."""
        if self.known.contains([node])[0]:
            return True
        with self._lock:
            return node in self._pending or self._mine.contains([node])[0]

    def store(self, content: bytes) -> bytes:
        """See `NodeStore`.

        :raises StorageError: the storage failed
        """
        node = self.id_of(content)
        if self._claim([node]):
            self._uploader.append([self._packed(BlobKind.TREE, node, content)])
        return node

    def check(self) -> None:
        """Raise what made an upload fail, if one did.

        :raises StorageError: an upload failed
        """
        self._uploader.check()

    def flush(self) -> None:
        """Return when all that was stored is durable and listed. Blocks.

        :raises StorageError: the storage failed
        """
        self._uploader.flush()
        self._list_packs()

    def list_stored(self) -> None:
        """Make known what is durable already, whatever fails or is still to be stored. Blocks.

        :raises StorageError: the storage failed
        """
        self._list_packs()

    def close(self) -> None:
        """Give up what is not stored, and wait for what is being stored; idempotent."""
        self._uploader.close()

    # -- inside

    def _claim(self, ids: Sequence[bytes]) -> list[int]:
        """The positions of those ids that the caller has to store: nobody has, and nobody else is about to."""
        missing = [at for at, known in enumerate(self.known.contains(ids)) if not known and ids[at] != ZERO_ID]
        if not missing:
            return missing
        claimed = []
        with self._lock:
            for at, mine in zip(missing, self._mine.contains([ids[at] for at in missing]), strict=True):
                if not mine and ids[at] not in self._pending:
                    self._pending.add(ids[at])
                    claimed.append(at)
        return claimed

    def _packed(self, kind: BlobKind, chunk_id: bytes, content: bytes | memoryview) -> NewBlob:
        compressor = getattr(self._compressors, "zstd", None)
        if compressor is None:
            compressor = self._compressors.zstd = ZstdCompressor(level=self._level)
        packed: bytes = compressor.compress(content, ZstdCompressor.FLUSH_FRAME)
        # Less than a 32nd saved is not worth the time of every restore.
        if len(packed) < len(content) - len(content) // 32:
            return NewBlob(chunk_id, kind, Codec.ZSTD, len(content), packed)
        return NewBlob(chunk_id, kind, Codec.RAW, len(content), content)

    def _pack_stored(self, pack: IndexedPack) -> None:
        """Note a durable pack. Runs in a thread of the uploader."""
        ids = [fields[0] for fields in ENTRY.iter_unpack(pack.entries)]
        with self._lock:
            self._mine.add_pack(pack)
            self._pending.difference_update(ids)
            self._stored_bytes += pack.size_bytes
            self._unlisted.append(pack)
            self._unlisted_chunks += len(ids)
            if self._unlisted_chunks < _INDEX_AT_CHUNKS:
                return
        self._list_packs()

    def _list_packs(self) -> None:
        """Make the packs that are durable known to the repository."""
        with self._lock:
            packs, self._unlisted = self._unlisted, []
            self._unlisted_chunks = 0
        if not packs:
            return
        key, data = seal_index(self._vault, packs)
        try:
            self._storage.put(key, data)
        except StorageFull:
            # Nothing of it is there, unlike after other failures, whose put may still come through.
            with suppress(StorageError):
                self._note_unlisted(key, packs)
            raise
        with self._lock:
            self._stored_bytes += len(data)

    def _note_unlisted(self, key: str, packs: list[IndexedPack]) -> None:
        try:
            self._storage.stat(key)
        except ObjectNotFound:
            with self._lock:
                self._unlisted += packs


def _zeros(content: memoryview, chunk_bytes: int) -> list[bool]:
    """For each chunk whether it is all zeros."""
    whole = len(content) // chunk_bytes * chunk_bytes
    words = np.frombuffer(content[:whole], np.uint64).reshape(-1, chunk_bytes // 8)
    # Nearly every chunk that has data has some in its first page.
    zeros: list[bool] = np.logical_not(words[:, :512].any(axis=1)).tolist()
    for position in [position for position, zero in enumerate(zeros) if zero]:
        zeros[position] = not words[position].any()
    if whole < len(content):
        zeros.append(not np.frombuffer(content[whole:], np.uint8).any())
    return zeros
