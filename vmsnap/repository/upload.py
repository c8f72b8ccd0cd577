"""Collects blobs from several threads into packs and stores the packs in the background."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition, Lock

from vmsnap.errors import StorageError
from vmsnap.repository.format import BlobKind, Codec, pack_key
from vmsnap.repository.index import IndexedPack
from vmsnap.repository.packs import PACK_BYTES, PackBuilder
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

_UPLOADS = 2
# Chunks and tree nodes go into packs of their own: whoever walks a tree then finds its nodes side by side.
PACK_BYTES_OF = {BlobKind.DATA: PACK_BYTES, BlobKind.TREE: PACK_BYTES // 4}


class _OpenPack:
    """A pack that takes blobs. It is stored when it takes no more and nobody fills it any longer."""

    def __init__(self, vault: Vault, buffer: bytearray) -> None:
        self.builder = PackBuilder(vault, buffer)
        self.buffer = buffer
        self.fillers = 0
        self.closed = False


class _Kind:
    """The packs of one kind: the one that is open, and the buffers that they take in turns."""

    def __init__(self, kind: BlobKind) -> None:
        self.open: _OpenPack | None = None
        self.pack_bytes = PACK_BYTES_OF[kind]
        self.buffers: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        for _ in range(_UPLOADS + 2):
            self.buffers.put(None)

    def buffer(self) -> bytearray:
        """A buffer that is free. Blocks until one is."""
        buffer = self.buffers.get()
        return buffer if buffer is not None else bytearray(self.pack_bytes)


class PackUploader:
    """Takes blobs, builds one pack of each kind at a time, and stores up to two others meanwhile; all its memory is the
    buffers of at most four packs of each kind. A failed upload fails every later call.
    """

    def __init__(self, storage: StorageBackend, vault: Vault, stored: Callable[[IndexedPack], None]) -> None:
        """:param stored: called for each pack that is durable, from a thread of the uploader"""
        self._storage = storage
        self._vault = vault
        self._stored = stored
        self._threads = ThreadPoolExecutor(_UPLOADS, "vmsnap-upload")
        self._uploads: list[Future[None]] = []
        self._kinds = {kind: _Kind(kind) for kind in BlobKind}
        self._closed = False
        self._filling = 0
        # Who holds the first one may wait for a buffer, which others give back; they take the second one alone.
        self._reserving = Lock()
        self._changed = Condition()

    def append(self, chunk_id: bytes, kind: BlobKind, codec: Codec, raw_bytes: int, data: bytes | memoryview) -> None:
        """Add a blob; copies `data`. Blocks while all buffers are being stored.

        :raises StorageError: an upload failed, or the uploader was closed
        """
        with self._reserving:
            packs = self._kinds[kind]
            if packs.open and not packs.open.builder.has_room(len(data)):
                self._close_pack(packs)
            if not packs.open:
                packs.open = _OpenPack(self._vault, packs.buffer())
            pack = packs.open
            with self._changed:
                self._check()
                pack.fillers += 1
                self._filling += 1
            slot = pack.builder.reserve(chunk_id, kind, codec, raw_bytes, len(data))
        # Outside of the lock: sealing takes as long as hashing.
        pack.builder.fill(slot, data)
        with self._changed:
            pack.fillers -= 1
            self._filling -= 1
            if pack.closed and not pack.fillers:
                self._send(packs, pack)
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when all blobs that were added are durable.

        :raises StorageError: one of them could not be stored
        """
        with self._reserving:
            for packs in self._kinds.values():
                self._close_pack(packs)
            with self._changed:
                self._changed.wait_for(lambda: not self._filling)
                self._check()
                uploads, self._uploads = self._uploads, []
        for upload in uploads:
            upload.result()

    def check(self) -> None:
        """Raise what made an upload fail, if one did.

        :raises StorageError: an upload failed
        """
        with self._changed:
            self._check()

    def close(self) -> None:
        """Give up what is not stored, wait for the uploads that run, and end the threads; idempotent."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        # Wakes whoever waits for the buffer of an upload that was cancelled.
        for packs in self._kinds.values():
            packs.buffers.put(None)

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

    def _close_pack(self, packs: _Kind) -> None:
        """Let the open pack take no more, and store it, or let the last of its fillers do so."""
        with self._changed:
            pack, packs.open = packs.open, None
            if pack:
                pack.closed = True
                if not pack.fillers:
                    self._send(packs, pack)

    def _send(self, packs: _Kind, pack: _OpenPack) -> None:
        data, entries = pack.builder.finish()
        listed = IndexedPack(pack.builder.id, len(data), entries)
        try:
            self._uploads.append(self._threads.submit(self._upload, listed, data, pack.buffer, packs.buffers))
        except RuntimeError as e:  # closed by another thread
            raise StorageError("the backup was given up") from e

    def _upload(
        self, listed: IndexedPack, data: memoryview, buffer: bytearray, buffers: queue.SimpleQueue[bytearray | None]
    ) -> None:
        try:
            self._storage.put(pack_key(listed.id), data)
            self._stored(listed)
        finally:
            data.release()
            buffers.put(buffer)
