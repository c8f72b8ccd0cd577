"""Collects blobs from several threads into packs and stores the packs in the background."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition, Lock
from typing import NamedTuple

from vmsnap.directio import direct_buffer
from vmsnap.errors import StorageError
from vmsnap.repository.format import BlobKind, Codec, pack_key
from vmsnap.repository.index import IndexedPack
from vmsnap.repository.packs import PACK_BYTES, PackBuilder, Slot
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

_UPLOADS = 2
# Where an answer takes a while, more of them are on their way.
_REMOTE_UPLOADS = 4
# Chunks and tree nodes go into packs of their own: whoever walks a tree then finds its nodes side by side.
PACK_BYTES_OF = {BlobKind.DATA: PACK_BYTES, BlobKind.TREE: PACK_BYTES // 4}


class NewBlob(NamedTuple):
    """A blob that is to be stored; `data` is its content as `codec` says, `raw_bytes` the length of the content."""

    id: bytes
    kind: BlobKind
    codec: Codec
    raw_bytes: int
    data: bytes | memoryview


class _OpenPack:
    """A pack that takes blobs. It is stored when it takes no more and nobody fills it any longer."""

    def __init__(self, vault: Vault, buffer: memoryview, buffers: queue.SimpleQueue[memoryview | None]) -> None:
        """:param buffers: where `buffer` goes back to"""
        self.builder = PackBuilder(vault, buffer)
        self.buffer = buffer
        self.buffers = buffers
        self.fillers = 0
        self.closed = False


class _Kind:
    """The packs of one kind: the one that is open, and the buffers that they take in turns."""

    def __init__(self, kind: BlobKind, uploads: int) -> None:
        self.open: _OpenPack | None = None
        self.pack_bytes = PACK_BYTES_OF[kind]
        self.buffers: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(uploads + 2):
            self.buffers.put(None)

    def buffer(self) -> memoryview:
        """A buffer that is free. Blocks until one is."""
        buffer = self.buffers.get()
        return buffer if buffer is not None else direct_buffer(self.pack_bytes)


class PackUploader:
    """Takes blobs, builds one pack of each kind at a time, and stores two others meanwhile, four in remote storage;
    all its memory is the buffers of two packs more than that of each kind. A failed upload fails every later call.
    """

    def __init__(self, storage: StorageBackend, vault: Vault, stored: Callable[[IndexedPack], None]) -> None:
        """:param stored: called for each pack that is durable, from a thread of the uploader"""
        self._storage = storage
        self._vault = vault
        self._stored = stored
        uploads = _REMOTE_UPLOADS if storage.remote else _UPLOADS
        self._threads = ThreadPoolExecutor(uploads, "vmsnap-upload")
        self._uploads: list[Future[None]] = []
        self._kinds = {kind: _Kind(kind, uploads) for kind in BlobKind}
        self._closed = False
        self._filling = 0
        # Who holds the first one may wait for a buffer, which others give back; they take the second one alone.
        self._reserving = Lock()
        self._changed = Condition()

    def append(self, blobs: Sequence[NewBlob]) -> None:
        """Add blobs, side by side as far as one pack has room, since what was stored together is read together; copies
        their data. Blocks while all buffers are being stored.

        :raises StorageError: an upload failed, or the uploader was closed
        """
        at = 0
        while at < len(blobs):
            with self._reserving:
                pack = self._open_pack(blobs[at])
                slots: list[tuple[NewBlob, Slot]] = []
                for blob in blobs[at:]:
                    if slots and (blob.kind != slots[0][0].kind or not pack.builder.has_room(len(blob.data))):
                        break
                    slots.append(
                        (blob, pack.builder.reserve(blob.id, blob.kind, blob.codec, blob.raw_bytes, len(blob.data)))
                    )
            # Outside of the lock: sealing takes as long as hashing. And before the next pack is asked for, whose buffer
            # may be the one of this pack.
            try:
                for blob, slot in slots:
                    pack.builder.fill(slot, blob.data)
            except BaseException:
                self._closed = True  # a pack with a place that nobody filled is never stored
                raise
            finally:
                self._filled(pack)
            at += len(slots)

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

    def _open_pack(self, blob: NewBlob) -> _OpenPack:
        """The open pack, with room for a blob, and not to be stored before `_filled` is called."""
        packs = self._kinds[blob.kind]
        if packs.open and not packs.open.builder.has_room(len(blob.data)):
            self._close_pack(packs)
        if not packs.open:
            packs.open = _OpenPack(self._vault, packs.buffer(), packs.buffers)
        with self._changed:
            self._check()
            packs.open.fillers += 1
            self._filling += 1
        return packs.open

    def _filled(self, pack: _OpenPack) -> None:
        with self._changed:
            pack.fillers -= 1
            self._filling -= 1
            if pack.closed and not pack.fillers and not self._closed:
                self._send(pack)
            self._changed.notify_all()

    def _close_pack(self, packs: _Kind) -> None:
        """Let the open pack take no more, and store it, or let the last of its fillers do so."""
        with self._changed:
            pack, packs.open = packs.open, None
            if pack:
                pack.closed = True
                if not pack.fillers:
                    self._send(pack)

    def _send(self, pack: _OpenPack) -> None:
        data, entries = pack.builder.finish()
        listed = IndexedPack(pack.builder.id, len(data), entries)
        try:
            self._uploads.append(self._threads.submit(self._upload, listed, data, pack.buffer, pack.buffers))
        except RuntimeError as e:  # closed by another thread
            raise StorageError("the backup was given up") from e

    def _upload(
        self, listed: IndexedPack, data: memoryview, buffer: memoryview, buffers: queue.SimpleQueue[memoryview | None]
    ) -> None:
        try:
            self._storage.put(pack_key(listed.id), data)
            self._stored(listed)
        finally:
            data.release()
            buffers.put(buffer)
