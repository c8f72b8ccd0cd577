"""Reads images back: any range of them, or all of them into a sparse file."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from vmsnap.errors import AlreadyExists, DamageFound, StorageError, StorageFull
from vmsnap.model import Extent
from vmsnap.repository.blobs import BlobReader, Wanted
from vmsnap.repository.format import ID_BYTES, ZERO_ID, BlobKind
from vmsnap.repository.tree import ImageRecord, Node, child_count, decode_node, leaves, node_bytes, root_node
from vmsnap.roles.snapshot import DiskReader

Progress: TypeAlias = Callable[[int, int | None], None]

_BATCH_BYTES = 4 << 20
_NODES_KEPT = 64
_CACHE_BYTES = 16 << 20


class ImageReader(DiskReader):
    """Random access to one image of a backup. Used by one thread at a time; nothing to close."""

    def __init__(self, blobs: BlobReader, image: ImageRecord, label: str) -> None:
        """:param label: what messages call it: ``disk vda of backup …``"""
        self.image = image
        self.size_bytes = image.size_bytes
        self._blobs = blobs
        self._label = label
        self._nodes: OrderedDict[bytes, bytes] = OrderedDict()
        self._chunks: OrderedDict[int, bytes | memoryview] = OrderedDict()

    def __enter__(self) -> ImageReader:
        return self

    def extents(self) -> Iterator[Extent]:
        """See `DiskReader.extents`: holes are zero. Reads the tree, not the data.

        :raises DamageFound: the tree is damaged
        """
        size = self.image.chunk_bytes
        pending: Extent | None = None
        for first, length, chunk_id in self._chunk_runs():
            zero = chunk_id == ZERO_ID
            if pending and pending.zero == zero:
                pending = Extent(pending.offset, pending.length + length, zero)
                continue
            if pending:
                yield pending
            pending = Extent(first * size, length, zero)
        if pending:
            yield pending

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Blocks.

        :raises DamageFound: what is stored there is missing or not what was written
        :raises StorageError: the storage failed, or the range leaves the image
        """
        if offset < 0 or offset + len(buffer) > self.size_bytes:
            raise StorageError(f"{self._label} ends at {self.size_bytes}")
        at = 0
        while at < len(buffer):
            number, skip = divmod(offset + at, self.image.chunk_bytes)
            count = min(self.image.chunk_length(number) - skip, len(buffer) - at)
            chunk = self._chunk(number)
            buffer[at : at + count] = bytes(count) if chunk is None else chunk[skip : skip + count]
            at += count

    def close(self) -> None:
        """Nothing to close."""

    def restore_to_file(self, path: str | Path, progress: Progress | None = None, *, mode: int = 0o600) -> None:
        """Write the image to a new sparse file, durable on return; all or nothing. Blocks.

        :raises AlreadyExists: there is something of that name; it is untouched
        :raises DamageFound: the backup is damaged; the message names where
        :raises StorageFull: no room for the file
        :raises StorageError: the file cannot be written, or the repository's storage failed
        """
        target = Path(path)
        try:
            fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError as e:
            raise AlreadyExists(f"{target} exists", cure="choose another name") from e
        except OSError as e:
            raise StorageError(f"cannot make {target}: {e.strerror}") from e
        complete = False
        try:
            os.ftruncate(fd, self.size_bytes)
            self.write_data(fd, progress)
            os.fsync(fd)
            complete = True
        except OSError as e:
            raise _file_error(e, target) from e
        finally:
            os.close(fd)
            if not complete:
                with suppress(OSError):
                    target.unlink()

    def write_data(self, fd: int, progress: Progress | None = None) -> None:
        """Write all data of the image to the same places of an open file that reads as zeros; holes are left alone.

        Several threads read ahead and write. Blocks.

        :raises DamageFound: the backup is damaged
        :raises OSError: writing failed
        """

        def store(first: int, ids: bytes) -> None:
            for number, content in self._read_batch(first, ids):
                _write_all(fd, content, number * self.image.chunk_bytes)

        self._in_threads(store, progress)

    def verify(self, found: Callable[[int, int, DamageFound], None], progress: Progress | None = None) -> None:
        """Read and authenticate all of the image. Blocks.

        :param found: called for each damaged range with offset, length and what is wrong, from several threads
        :raises StorageError: the storage failed
        """

        def check(first: int, ids: bytes) -> None:
            size = self.image.chunk_bytes
            numbers, wanted = self._wanted(first, ids)
            for position, content in self._blobs.read_many(BlobKind.DATA, wanted):
                if isinstance(content, DamageFound):
                    found(numbers[position] * size, wanted[position].raw_bytes, content)

        self._in_threads(check, progress)

    # -- inside

    def _in_threads(self, work: Callable[[int, bytes], None], progress: Progress | None) -> None:
        """Call `work` with the first number and the ids of each batch of chunks, in a few threads."""
        workers = max(2, min(len(os.sched_getaffinity(0)), 8))
        done = 0
        waiting: deque[tuple[int, Future[None]]] = deque()

        def settle(left: int) -> None:
            nonlocal done
            while len(waiting) > left:
                length, future = waiting.popleft()
                future.result()
                done = min(done + length, self.size_bytes)
                if progress:
                    progress(done, self.size_bytes)

        with ThreadPoolExecutor(workers, "vmsnap-read") as threads:
            try:
                for first, count, ids in self._batches():
                    settle(2 * workers)
                    waiting.append((count * self.image.chunk_bytes, threads.submit(work, first, ids)))
                settle(0)
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _batches(self) -> Iterator[tuple[int, int, bytes]]:
        size = max(1, _BATCH_BYTES // self.image.chunk_bytes)
        for first, count, ids in leaves(self.image, self._load):
            if ids is None:
                yield first, count, b""
                continue
            for at in range(0, count, size):
                part = ids[at * ID_BYTES : (at + size) * ID_BYTES]
                yield first + at, len(part) // ID_BYTES, part

    def _wanted(self, first: int, ids: bytes) -> tuple[list[int], list[Wanted]]:
        numbers, wanted = [], []
        for position in range(len(ids) // ID_BYTES):
            chunk_id = ids[position * ID_BYTES : (position + 1) * ID_BYTES]
            if chunk_id != ZERO_ID:
                numbers.append(first + position)
                wanted.append(Wanted(chunk_id, self.image.chunk_length(first + position)))
        return numbers, wanted

    def _read_batch(self, first: int, ids: bytes) -> Iterator[tuple[int, bytes | memoryview]]:
        numbers, wanted = self._wanted(first, ids)
        for position, content in self._blobs.read_many(BlobKind.DATA, wanted):
            if isinstance(content, DamageFound):
                raise self._damage(numbers[position], content)
            yield numbers[position], content

    def _damage(self, number: int, cause: DamageFound) -> DamageFound:
        start = number * self.image.chunk_bytes
        end = start + self.image.chunk_length(number)
        return DamageFound(f"{self._label} is damaged from {start} to {end}: {cause.message}")

    def _chunk_runs(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield first chunk, length in bytes and id; runs of holes as one."""
        for first, count, ids in leaves(self.image, self._load):
            if ids is None:
                size = self.image.chunk_bytes
                yield first, min((first + count) * size, self.size_bytes) - first * size, ZERO_ID
                continue
            for number in range(first, first + count):
                at = (number - first) * ID_BYTES
                yield number, self.image.chunk_length(number), ids[at : at + ID_BYTES]

    def _load(self, image: ImageRecord, node: Node) -> bytes:
        ids = self._nodes.get(node.id)
        if ids is None or len(ids) != child_count(image, node) * ID_BYTES:
            try:
                content = self._blobs.read(BlobKind.TREE, node.id, node_bytes(image, node))
                ids = decode_node(image, node, content)
            except DamageFound as e:
                span = image.fanout**node.level * image.chunk_bytes
                start = node.number * span
                end = min(start + span, image.size_bytes)
                raise DamageFound(f"{self._label} is damaged from {start} to {end}: {e.message}") from e
            self._nodes[node.id] = ids
            if len(self._nodes) > _NODES_KEPT:
                self._nodes.popitem(last=False)
        return ids

    def _chunk(self, number: int) -> bytes | memoryview | None:
        """The content of a chunk; None for a hole."""
        if number in self._chunks:
            self._chunks.move_to_end(number)
            return self._chunks[number]
        node = root_node(self.image)
        while node.level and node.id != ZERO_ID:
            ids = self._load(self.image, node)
            below = number // self.image.fanout ** (node.level - 1)
            at = below % self.image.fanout * ID_BYTES
            node = Node(node.level - 1, below, ids[at : at + ID_BYTES])
        if node.id == ZERO_ID:
            return None
        try:
            content = self._blobs.read(BlobKind.DATA, node.id, self.image.chunk_length(number))
        except DamageFound as e:
            raise self._damage(number, e) from e
        self._chunks[number] = content
        if len(self._chunks) * self.image.chunk_bytes > _CACHE_BYTES:
            self._chunks.popitem(last=False)
        return content


def _write_all(fd: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _file_error(error: OSError, target: Path) -> StorageError:
    what = f"cannot write {target}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(what, cure="free some room, or choose another place")
    return StorageError(what)
