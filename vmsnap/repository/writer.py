"""Writes one backup: images and blobs into packs, and at the end the manifest that makes it exist."""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import UTC, datetime
from typing import TypeAlias

import vmsnap
from vmsnap.directio import direct_buffer
from vmsnap.errors import ObjectExists, ObjectNotFound, RepositoryError, StorageError, StorageFull
from vmsnap.model import Extent
from vmsnap.repository.base import (
    BaseImage,
    OldTree,
    Run,
    StaleHint,
    changed_chunks,
    comparison,
    runs_beside_base,
)
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.chunkstore import ChunkStore
from vmsnap.repository.format import ChunkSizes, ImageKind, pack_key
from vmsnap.repository.index import ChunkIndex
from vmsnap.repository.manifest import BackupFields, BackupStats, Manifest, check_fields, seal_manifest
from vmsnap.repository.retaining import retain_data, retained_until
from vmsnap.repository.seal import Vault
from vmsnap.repository.sessions import Session, collectors
from vmsnap.repository.sources import BytesReader, runs_to_read
from vmsnap.repository.tree import ImageRecord
from vmsnap.repository.treebuilder import TreeBuilder
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

    Calls come from one thread; reading happens in it or, where the source allows that, in a few worker threads, which
    hash and compress; storing in two more. Memory is bounded: a few blocks of 4 MiB and the buffers of a few packs,
    besides the index.
    """

    def __init__(
        self,
        storage: StorageBackend,
        vault: Vault,
        index: ChunkIndex,
        chunks: ChunkSizes,
        *,
        session: Session,
        level: int | None = None,
    ) -> None:
        """:param index: the chunks that are durable and listed in the repository, and in no condemned pack; not changed
        :param session: begun before any of it was read; the writer ends it
        :param level: of zstd; 1 when None
        """
        self._session = session
        self._storage = storage
        self._vault = vault
        self._chunks = chunks
        self._begin = time.monotonic()
        self._read_bytes = 0
        self.warnings: list[str] = []
        """What the backup's owner should know."""
        self._done = False
        self._broken = False
        # More than there are processors: some of them read.
        workers = min(len(os.sched_getaffinity(0)), _MAX_WORKERS) + 2
        self._store = ChunkStore(storage, vault, index, level=COMPRESSION_LEVEL if level is None else level)
        self._threads = ThreadPoolExecutor(workers, "vmsnap-chunks")
        self._ahead = workers + 2
        self._blocks: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(self._ahead):
            self._blocks.put(direct_buffer(max(_BLOCK_BYTES, chunks.disk, chunks.ram, chunks.state)))

    def __enter__(self) -> BackupWriter:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # Who tries again need not send twice what has come there; where there is no room, it is given back.
        self.abort(keep=isinstance(error, StorageError) and not isinstance(error, StorageFull))

    def add_image(
        self,
        name: str,
        source: DiskReader,
        kind: ImageKind,
        progress: Progress | None = None,
        *,
        base: BaseImage | None = None,
    ) -> ImageRecord:
        """Store the content of `source` and return how to find it; zeros and known chunks cost nothing. Blocks.

        :param name: for messages: ``disk vda``
        :param progress: called from this thread
        :param base: an older image of the same, whose tree is shared; where it says what has changed since, only that
            is read, and samples of the rest. If they are not what they should be, or it has another size or chunk
            size, all is read, and `warnings` tells.
        :raises StorageError: the storage failed; the writer is of no more use
        :raises VmsnapError: what `source` raises
        """
        self._check_open()
        # Set until the image is whole: what was claimed by a failed one may be stored by nobody.
        self._broken = True
        try:
            record = self._add_image(name, source, self._chunks.of(kind), progress, base)
        except BaseException:
            # The caller closes the source next, from which workers may be reading.
            self._close()
            raise
        self._broken = False
        return record

    def add_blob(self, name: str, content: bytes | bytearray | memoryview) -> ImageRecord:
        """Store bytes that are in memory, such as the device state. As `add_image`."""
        return self.add_image(name, BytesReader(content), ImageKind.STATE)

    @property
    def known(self) -> ChunkIndex:
        """The chunks that were durable and listed when the backup began, and are in no condemned pack."""
        return self._store.known

    @property
    def stored_bytes(self) -> int:
        """What was added to the repository so far."""
        return self._store.stored_bytes

    def add_tree(
        self,
        image: ImageRecord,
        chunks: Iterable[tuple[int, int, bytes]],
        store: Callable[[ChunkStore, int, bytes], bytes],
        progress: Callable[[int], None],
        *,
        older: ImageRecord | None = None,
    ) -> ImageRecord:
        """Store an image that another repository has, with chunks of the same sizes, and return how to find it here.
        Blocks.

        :param chunks: its chunks in order: the first one's number, their count, their ids there (none: holes)
        :param store: sees to it that the chunks of these ids, from that number on, are here, and returns their ids
            here; called from several threads
        :param progress: told of the bytes of each batch that is done, from this thread
        :param older: an image here whose tree is shared where it is the same
        :raises StorageError: the storage failed; the writer is of no more use
        :raises VmsnapError: what `chunks` and `store` raise
        """
        self._check_open()
        self._broken = True
        old = None
        if older and (older.chunk_bytes, older.fanout) == (image.chunk_bytes, image.fanout):
            old = OldTree(BlobReader(self._storage, self._vault, self._store.known), older)
        tree = TreeBuilder(image.size_bytes, image.chunk_bytes, image.fanout, self._store, old)
        waiting: deque[tuple[int, int, Future[bytes] | None]] = deque()

        def settle(left: int) -> None:
            while len(waiting) > left:
                first, count, stored = waiting.popleft()
                if stored is None:
                    tree.append_holes(count)
                else:
                    tree.append(stored.result())
                end = min((first + count) * image.chunk_bytes, image.size_bytes)
                progress(end - first * image.chunk_bytes)

        try:
            for first, count, ids in chunks:
                settle(self._ahead - 1)
                stored = self._threads.submit(store, self._store, first, ids) if ids else None
                waiting.append((first, count, stored))
            settle(0)
            record = tree.finish()
        except BaseException:
            # What is on its way ends before the caller lets go of what it reads from.
            wait([stored for _, _, stored in waiting if stored and not stored.cancel()])
            raise
        self._broken = False
        return record

    def flush(self) -> None:
        """Make durable and known what was stored so far, so that another backup finds it when this one fails. Blocks.

        :raises StorageError: the storage failed
        """
        self._store.flush()

    def keep(self) -> None:
        """Make known what is durable already, so that another backup finds it. For one that is given up. Blocks.

        :raises StorageError: the storage failed
        """
        self._close()
        self._store.list_stored()

    def adopt(self, manifest: Manifest) -> bool:
        """As `commit`, for a backup of another repository whose images are here now; False where there is one of that
        id already.

        :raises UsageError: a name in it is not valid
        :raises RepositoryError: garbage collection took this writer for dead; there is no copy
        :raises StorageError: the storage failed; there is no copy
        """
        self._check_open()
        check_fields(manifest)
        self._store.flush()
        self._session.require()
        key, data = seal_manifest(self._vault, manifest)
        until = self._retain_data(manifest)
        if not self._put_manifest(key, data):
            return False
        self._finish(key, until)
        return True

    def commit(self, fields: BackupFields, *, seconds: float | None = None, instant_ns: int | None = None) -> Manifest:
        """Make the backup exist: everything durable first, then the manifest by one atomic put. Blocks.

        :param instant_ns: the moment that the backup shows, nanoseconds since 1970; else now
        :param seconds: what the whole backup took; else the time since the writer was made
        :raises UsageError: a name in `fields` is not valid
        :raises RepositoryError: garbage collection took this writer for dead; there is no backup
        :raises StorageError: the storage failed; there is no backup
        """
        self._check_open()
        check_fields(fields)
        self._store.flush()
        self._session.require()
        second, within_ns = divmod(time.time_ns() if instant_ns is None else instant_ns, 10**9)
        now = datetime.fromtimestamp(second, UTC)
        took = time.monotonic() - self._begin if seconds is None else seconds
        stats = BackupStats(self._read_bytes, self._store.stored_bytes, round(took, 3))
        while True:
            manifest = Manifest(
                **{name: getattr(fields, name) for name in BackupFields.__dataclass_fields__},
                # The part of the second first, so that ids sort by time also within one; then what tells them apart.
                backup=f"{fields.vm}-{now:%Y%m%dT%H%M%SZ}-{within_ns * 4096 // 10**9:03x}{secrets.randbelow(4096):03x}",
                time=f"{now:%Y-%m-%dT%H:%M:%SZ}",
                stats=stats,
                vmsnap=vmsnap.__version__,
            )
            key, data = seal_manifest(self._vault, manifest)
            until = self._retain_data(manifest)
            if self._put_manifest(key, data):
                break
        self._finish(key, until)
        return manifest

    def abort(self, *, keep: bool = False) -> None:
        """Give up, end the threads, and remove the packs that nobody can know of yet; idempotent, nothing after
        `commit`.

        Packs that an index object lists stay: another backup may use them already. So do all where a repair may be
        listing them, and those that cannot be removed now, until the next garbage collection. With `keep` those that
        are durable are listed instead, so that the next try finds them.
        """
        if self._done:
            return
        self._done = True
        self._storage.hurry()
        self._close()
        with suppress(StorageError):
            if not collectors(self._storage, self._vault, self._session.key):
                if keep:
                    self._store.list_stored()
                else:
                    for pack in self._store.unlisted:
                        self._storage.delete(pack_key(pack.id))
        self._session.end()

    # -- inside

    def _retain_data(self, manifest: Manifest) -> datetime | None:
        """Retain what the backup needs; returns until when, None where the user does not want that."""
        until = retained_until(self._storage)
        if until:
            retain_data(self._storage, self._vault, [image for _, image in manifest.images], until)
        return until

    def _finish(self, key: str, until: datetime | None) -> None:
        """The manifest is there: see that it was right to put it, retain it too, and end."""
        self._require_session_of(key)
        if until:
            self._or_take_back(key, lambda: self._storage.retain([key], until))
        self._done = True
        self._close()
        self._session.end()

    def _add_image(
        self, name: str, source: DiskReader, chunk_bytes: int, progress: Progress | None, base: BaseImage | None
    ) -> ImageRecord:
        old = self._old_tree(chunk_bytes, base)
        if old and base and base.changed is not None:
            try:
                return self._add_changed(name, source, chunk_bytes, old, base.changed, progress)
            except StaleHint as e:
                self.warnings.append(f"{name} was read whole: {e}")
        runs = runs_to_read(source, name, chunk_bytes, _BLOCK_BYTES // chunk_bytes or 1)
        plain = (Run(first, count, None if data else b"") for first, count, data in runs)
        record = self._add_runs(plain, source, chunk_bytes, old, progress)
        if remark := source.remark():
            self.warnings.append(f"{name} {remark}")
        return record

    def _old_tree(self, chunk_bytes: int, base: BaseImage | None) -> OldTree | None:
        if base is None or (base.record.chunk_bytes, base.record.fanout) != (chunk_bytes, self._chunks.fanout):
            return None
        return OldTree(BlobReader(self._storage, self._vault, self._store.known), base.record)

    def _add_changed(
        self,
        name: str,
        source: DiskReader,
        chunk_bytes: int,
        old: OldTree,
        changed: Iterable[Extent],
        progress: Progress | None,
    ) -> ImageRecord:
        """Add an image of which only what has changed is read.

        :raises StaleHint: it cannot be so
        """
        if old.image.size_bytes != source.size_bytes:
            raise StaleHint(f"it has {source.size_bytes} bytes now, it had {old.image.size_bytes}")
        touched = changed_chunks(changed, source.size_bytes, chunk_bytes)
        runs = runs_beside_base(
            # As long as what one node lists, so that much of it is looked up at once.
            runs_to_read(source, name, chunk_bytes, self._chunks.fanout),
            old,
            touched,
            self._store.contains,
            comparison(source, chunk_bytes, self._store.chunk_ids),
            _BLOCK_BYTES // chunk_bytes or 1,
        )
        return self._add_runs(runs, source, chunk_bytes, old, progress)

    def _add_runs(
        self, runs: Iterable[Run], source: DiskReader, chunk_bytes: int, old: OldTree | None, progress: Progress | None
    ) -> ImageRecord:
        tree = TreeBuilder(source.size_bytes, chunk_bytes, self._chunks.fanout, self._store, old)
        waiting: deque[tuple[int, Future[bytes] | bytes]] = deque()
        done = 0

        def settle(left: int) -> None:
            nonlocal done
            while len(waiting) > left:
                count, stored = waiting.popleft()
                ids = stored if isinstance(stored, bytes) else stored.result()
                if ids:
                    tree.append(ids)
                else:
                    tree.append_holes(count)
                done = min(done + count * chunk_bytes, source.size_bytes)
                if progress:
                    progress(done, source.size_bytes)

        try:
            for first, count, ids in runs:
                # Never more blocks in flight than there are buffers.
                settle(self._ahead - 1)
                if ids is None:
                    block = self._read_block(source, first * chunk_bytes, count * chunk_bytes, chunk_bytes)
                    waiting.append((count, block))
                else:
                    waiting.append((count, ids))
        except StaleHint:
            settle(0)
            raise
        settle(0)
        return tree.finish()

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

    def _require_session_of(self, key: str) -> None:
        """Take the manifest back if the session was gone before it was there: what it names may be deleted already.
        Garbage collection that takes the session for dead later than that has seen the manifest.
        """
        self._or_take_back(key, self._session.require)

    def _or_take_back(self, key: str, step: Callable[[], None]) -> None:
        """Do the last step of a backup; if it fails, there is no backup."""
        try:
            step()
        except BaseException as e:
            try:
                self._storage.delete(key)
            except StorageError:
                raise StorageError(f"the backup failed, and {key} cannot be taken back", cure="delete it") from e
            raise

    def _check_open(self) -> None:
        if self._done:
            raise RepositoryError("the backup is committed or given up already")
        if self._broken:
            raise RepositoryError("an image of this backup failed; it cannot be committed")
        self._store.check()

    def _close(self) -> None:
        # The store first: a worker may be waiting for it.
        self._store.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _read_block(self, source: DiskReader, offset: int, length: int, chunk_bytes: int) -> Future[bytes]:
        length = min(length, source.size_bytes - offset)
        block = self._blocks.get()
        self._read_bytes += length
        if source.parallel_reads:
            return self._threads.submit(self._store_block, block, length, chunk_bytes, source, offset)
        source.read_into(offset, block[:length])
        return self._threads.submit(self._store_block, block, length, chunk_bytes)

    def _store_block(
        self, block: memoryview, length: int, chunk_bytes: int, source: DiskReader | None = None, offset: int = 0
    ) -> bytes:
        """Store the chunks of a block, which is read first where a source is given; returns the ids of all. Runs in a
        worker.
        """
        try:
            content = block[:length]
            if source:
                source.read_into(offset, content)
            return self._store.store_chunks(content, chunk_bytes)
        finally:
            self._blocks.put(block)
