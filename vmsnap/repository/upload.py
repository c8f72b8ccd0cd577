"""Collects blobs from several threads into packs and stores the packs in the background."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from vmsnap.errors import StorageError
from vmsnap.repository.format import BlobKind, Codec, pack_key
from vmsnap.repository.index import IndexedPack
from vmsnap.repository.packs import PACK_BYTES, PackBuilder
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

_UPLOADS = 2


class PackUploader:
    """Takes blobs, builds one pack at a time, and stores up to two others meanwhile; all its memory is the buffers of
    four packs. A failed upload fails every later call.
    """

    def __init__(self, storage: StorageBackend, vault: Vault, stored: Callable[[IndexedPack], None]) -> None:
        """:param stored: called for each pack that is durable, from a thread of the uploader"""
        self._storage = storage
        self._vault = vault
        self._stored = stored
        self._threads = ThreadPoolExecutor(_UPLOADS, "vmsnap-upload")
        self._uploads: list[Future[None]] = []
        self._buffers: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        for _ in range(_UPLOADS + 2):
            self._buffers.put(None)
        self._lock = Lock()
        self._pack: PackBuilder | None = None
        self._buffer = bytearray()
        self._closed = False

    def append(self, chunk_id: bytes, kind: BlobKind, codec: Codec, raw_bytes: int, data: bytes | memoryview) -> None:
        """Add a blob; copies `data`. Blocks while all buffers are being stored.

        :raises StorageError: an upload failed, or the uploader was closed
        """
        with self._lock:
            if self._pack and not self._pack.has_room(len(data)):
                self._send()
            if not self._pack:
                buffer = self._buffers.get()
                self._buffer = buffer if buffer is not None else bytearray(PACK_BYTES)
                self._pack = PackBuilder(self._vault, self._buffer)
            self._check()
            self._pack.append(chunk_id, kind, codec, raw_bytes, data)

    def flush(self) -> None:
        """Return when all blobs that were added are durable.

        :raises StorageError: one of them could not be stored
        """
        with self._lock:
            self._check()
            if self._pack:
                self._send()
            uploads, self._uploads = self._uploads, []
        for upload in uploads:
            upload.result()

    def check(self) -> None:
        """Raise what made an upload fail, if one did.

        :raises StorageError: an upload failed
        """
        with self._lock:
            self._check()

    def close(self) -> None:
        """Give up what is not stored, wait for the uploads that run, and end the threads; idempotent."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        # Wakes whoever waits for the buffer of an upload that was cancelled.
        self._buffers.put(None)

    def _check(self) -> None:
        if self._closed:
            raise StorageError("the backup was given up")
        running = []
        for upload in self._uploads:
            if upload.done():
                upload.result()
            else:
                running.append(upload)
        self._uploads = running

    def _send(self) -> None:
        if self._pack is None:
            return
        data, entries = self._pack.finish()
        pack = IndexedPack(self._pack.id, len(data), entries)
        self._pack = None
        try:
            self._uploads.append(self._threads.submit(self._upload, pack, data, self._buffer))
        except RuntimeError as e:  # closed by another thread
            raise StorageError("the backup was given up") from e

    def _upload(self, pack: IndexedPack, data: memoryview, buffer: bytearray) -> None:
        try:
            self._storage.put(pack_key(pack.id), data)
            self._stored(pack)
        finally:
            data.release()
            self._buffers.put(buffer)
