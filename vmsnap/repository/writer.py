"""Writes one backup: images and blobs into packs, and at the end the manifest that makes it exist."""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from threading import Lock, local
from typing import TypeAlias

import numpy as np
from backports.zstd import ZstdCompressor

import vmsnap
from vmsnap.errors import ObjectExists, ObjectNotFound, RepositoryError, StorageError
from vmsnap.repository.format import ZERO_ID, BlobKind, ChunkSizes, Codec, ImageKind, pack_key
from vmsnap.repository.index import ChunkIndex, IndexedPack, seal_index
from vmsnap.repository.manifest import BackupFields, BackupStats, Manifest, check_fields, seal_manifest
from vmsnap.repository.packs import ENTRY
from vmsnap.repository.seal import Vault
from vmsnap.repository.sources import BytesReader, runs_to_read
from vmsnap.repository.tree import ImageRecord, TreeBuilder
from vmsnap.repository.upload import PackUploader
from vmsnap.roles.snapshot import DiskReader
from vmsnap.roles.storage import StorageBackend

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes done so far and the bytes in all, where they are known."""

COMPRESSION_LEVEL = 1
_BLOCK_BYTES = 4 << 20
# An index object is written whenever this many chunks are new, so that an interrupted first backup is not for nothing.
_INDEX_AT_CHUNKS = 1 << 18
_MAX_WORKERS = 8


class BackupWriter:
    """Stores one backup. A context manager: left without `commit`, it gives up, and no backup exists.

    Calls come from one thread; reading happens in it, hashing and compressing in a few worker threads, storing in two
    more. Memory is bounded: a few blocks of 4 MiB and the buffers of four packs, besides the index.
    """

    def __init__(
        self, storage: StorageBackend, vault: Vault, index: ChunkIndex, chunks: ChunkSizes, *, level: int | None = None
    ) -> None:
        """:param index: the chunks that are durable and listed in the repository; not changed
        :param level: of zstd; 1 when None
        """
        self._storage = storage
        self._vault = vault
        self._known = index
        self._chunks = chunks
        self._level = COMPRESSION_LEVEL if level is None else level
        self._begin = time.monotonic()
        self._lock = Lock()
        self._pending: set[bytes] = set()
        self._mine = ChunkIndex()
        self._unlisted: list[IndexedPack] = []
        self._unlisted_chunks = 0
        self._read_bytes = 0
        self._stored_bytes = 0
        self._done = False
        self._broken = False
        workers = max(2, min(len(os.sched_getaffinity(0)), _MAX_WORKERS))
        self._uploader = PackUploader(storage, vault, self._pack_stored)
        self._threads = ThreadPoolExecutor(workers, "vmsnap-chunks")
        self._compressors = local()
        self._ahead = workers + 2
        self._blocks: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(self._ahead):
            self._blocks.put(memoryview(bytearray(max(_BLOCK_BYTES, chunks.disk, chunks.ram, chunks.state))))

    def __enter__(self) -> BackupWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def add_image(
        self, name: str, source: DiskReader, kind: ImageKind, progress: Progress | None = None
    ) -> ImageRecord:
        """Store the content of `source` and return how to find it; zeros and known chunks cost nothing. Blocks.

        :param name: for messages: ``disk vda``
        :param progress: called from this thread
        :raises StorageError: the storage failed; the writer is of no more use
        :raises VmsnapError: what `source` raises
        """
        self._check_open()
        chunk_bytes = self._chunks.of(kind)
        tree = TreeBuilder(source.size_bytes, chunk_bytes, self._chunks.fanout, self._store_node)
        waiting: deque[tuple[int, Future[bytes] | None]] = deque()  # None: holes
        done = 0

        def settle(left: int) -> None:
            nonlocal done
            while len(waiting) > left:
                count, future = waiting.popleft()
                if future:
                    tree.append(future.result())
                else:
                    tree.append_holes(count)
                done = min(done + count * chunk_bytes, source.size_bytes)
                if progress:
                    progress(done, source.size_bytes)

        # Set until the image is whole: what was claimed by a failed one may be stored by nobody.
        self._broken = True
        for first, count, data in runs_to_read(source, name, chunk_bytes, _BLOCK_BYTES // chunk_bytes or 1):
            # Never more blocks in flight than there are buffers.
            settle(self._ahead - 1)
            block = self._read_block(source, first * chunk_bytes, count * chunk_bytes, chunk_bytes) if data else None
            waiting.append((count, block))
        settle(0)
        self._broken = False
        return tree.finish()

    def add_blob(self, name: str, content: bytes | bytearray | memoryview) -> ImageRecord:
        """Store bytes that are in memory, such as the device state. As `add_image`."""
        return self.add_image(name, BytesReader(content), ImageKind.STATE)

    def commit(self, fields: BackupFields, *, seconds: float | None = None, instant_ns: int | None = None) -> Manifest:
        """Make the backup exist: everything durable first, then the manifest by one atomic put. Blocks.

        :param instant_ns: the moment that the backup shows, nanoseconds since 1970; else now
        :param seconds: what the whole backup took; else the time since the writer was made
        :raises UsageError: a name in `fields` is not valid
        :raises StorageError: the storage failed; there is no backup
        """
        self._check_open()
        check_fields(fields)
        self._uploader.flush()
        self._list_packs()
        now = datetime.now(UTC) if instant_ns is None else datetime.fromtimestamp(instant_ns // 10**9, UTC)
        took = time.monotonic() - self._begin if seconds is None else seconds
        stats = BackupStats(self._read_bytes, self._stored_bytes, round(took, 3))
        while True:
            manifest = Manifest(
                **{name: getattr(fields, name) for name in BackupFields.__dataclass_fields__},
                backup=f"{fields.vm}-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
                time=f"{now:%Y-%m-%dT%H:%M:%SZ}",
                stats=stats,
                vmsnap=vmsnap.__version__,
            )
            key, data = seal_manifest(self._vault, manifest)
            if self._put_manifest(key, data):
                break
        self._done = True
        self._close()
        return manifest

    def abort(self) -> None:
        """Give up, end the threads, and remove the packs that nobody can know of yet; idempotent, nothing after
        `commit`.

        Packs that an index object lists stay: another backup may use them already. Those that cannot be removed
        now stay too, until the next garbage collection.
        """
        if self._done:
            return
        self._done = True
        self._close()
        for pack in self._unlisted:
            with suppress(StorageError):
                self._storage.delete(pack_key(pack.id))

    # -- inside

    def _put_manifest(self, key: str, data: bytes) -> bool:
        """Store the manifest; False where another backup has that id. When the storage says that it failed, ask it
        whether it did: the answer can have been lost, and the seal's salt makes this manifest like no other.
        """
        try:
            self._storage.put(key, data, if_absent=True)
        except (ObjectExists, StorageError) as e:
            with suppress(StorageError, ObjectNotFound):
                if self._storage.get(key) == data:
                    return True
            if isinstance(e, ObjectExists):
                return False
            raise
        return True

    def _check_open(self) -> None:
        if self._done:
            raise RepositoryError("the backup is committed or given up already")
        if self._broken:
            raise RepositoryError("an image of this backup failed; it cannot be committed")
        self._uploader.check()

    def _close(self) -> None:
        # The uploader first: a worker may be waiting for it.
        self._uploader.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _read_block(self, source: DiskReader, offset: int, length: int, chunk_bytes: int) -> Future[bytes]:
        length = min(length, source.size_bytes - offset)
        block = self._blocks.get()
        source.read_into(offset, block[:length])
        self._read_bytes += length
        return self._threads.submit(self._store_block, block, length, chunk_bytes)

    def _store_block(self, block: memoryview, length: int, chunk_bytes: int) -> bytes:
        """Store the chunks of a block that are neither zero nor known; returns the ids of all. Runs in a worker."""
        try:
            content = block[:length]
            pieces = [content[at : at + chunk_bytes] for at in range(0, length, chunk_bytes)]
            ids = [
                ZERO_ID if zero else self._vault.chunk_id(BlobKind.DATA, piece)
                for piece, zero in zip(pieces, _zeros(content, chunk_bytes), strict=True)
            ]
            for position in self._claim(ids):
                self._store(BlobKind.DATA, ids[position], pieces[position])
            return b"".join(ids)
        finally:
            self._blocks.put(block)

    def _store_node(self, content: bytes) -> bytes:
        node = self._vault.chunk_id(BlobKind.TREE, content)
        if self._claim([node]):
            self._store(BlobKind.TREE, node, content)
        return node

    def _claim(self, ids: list[bytes]) -> list[int]:
        """The positions of those ids that the caller has to store: nobody has, and nobody else is about to."""
        missing = [at for at, known in enumerate(self._known.contains(ids)) if not known and ids[at] != ZERO_ID]
        if not missing:
            return missing
        claimed = []
        with self._lock:
            for at, mine in zip(missing, self._mine.contains([ids[at] for at in missing]), strict=True):
                if not mine and ids[at] not in self._pending:
                    self._pending.add(ids[at])
                    claimed.append(at)
        return claimed

    def _store(self, kind: BlobKind, chunk_id: bytes, content: bytes | memoryview) -> None:
        compressor = getattr(self._compressors, "zstd", None)
        if compressor is None:
            compressor = self._compressors.zstd = ZstdCompressor(level=self._level)
        packed: bytes = compressor.compress(content, ZstdCompressor.FLUSH_FRAME)
        # Less than a 32nd saved is not worth the time of every restore.
        if len(packed) < len(content) - len(content) // 32:
            self._uploader.append(chunk_id, kind, Codec.ZSTD, len(content), packed)
        else:
            self._uploader.append(chunk_id, kind, Codec.RAW, len(content), content)

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
        if packs:
            key, data = seal_index(self._vault, packs)
            self._storage.put(key, data)
            with self._lock:
                self._stored_bytes += len(data)


def _zeros(content: memoryview, chunk_bytes: int) -> list[bool]:
    """For each chunk whether it is all zeros."""
    whole = len(content) // chunk_bytes * chunk_bytes
    words = np.frombuffer(content[:whole], np.uint64).reshape(-1, chunk_bytes // 8)
    zeros: list[bool] = np.logical_not(words.any(axis=1, keepdims=True)).ravel().tolist()
    if whole < len(content):
        zeros.append(not np.frombuffer(content[whole:], np.uint8).any())
    return zeros
