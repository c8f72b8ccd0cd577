"""Reads images back: any range of them, or all of them into a sparse file."""

from __future__ import annotations

import errno
import io
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vmsnap.errors import AlreadyExists, DamageFound, StorageError, StorageFull
from vmsnap.model import Extent
from vmsnap.pagecache import QuietWriter, forget
from vmsnap.repository.blobs import BlobReader, Wanted
from vmsnap.repository.format import ID_BYTES, ZERO_ID, BlobKind
from vmsnap.repository.loss import is_within
from vmsnap.repository.manifest import LostRange
from vmsnap.repository.nodes import TreeReader
from vmsnap.repository.runs import runs
from vmsnap.repository.second_process import Piece, SecondProcess
from vmsnap.repository.tree import ImageRecord, Node, child_count, leaves, root_node, span_of
from vmsnap.roles.snapshot import DiskReader

if TYPE_CHECKING:
    from vmsnap.repository.inplace import RestoreStats
    from vmsnap.roles import DiskWriter

Progress: TypeAlias = Callable[[int, int | None], None]
LoadIds: TypeAlias = Callable[[ImageRecord, Node], bytes]

_BATCH_BYTES = 4 << 20
_HOLES_BYTES = 1 << 30
_FILE_BUFFER_BYTES = 128 << 10
_CACHE_BYTES = 16 << 20


class ImageReader(DiskReader):
    """Random access to one image of a backup. Used by one thread at a time; nothing to close."""

    def __init__(self, blobs: BlobReader, image: ImageRecord, label: str, lost: Sequence[LostRange] = ()) -> None:
        """:param label: what messages call it: ``disk vda of backup …``
        :param lost: ranges of which the user accepts that what is lost there reads as zeros
        """
        self.image = image
        self._lost = lost
        self.size_bytes = image.size_bytes
        self._blobs = blobs
        self._label = label
        self._tree = TreeReader(blobs)
        self._chunks: OrderedDict[int, bytes | memoryview | None] = OrderedDict()

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
        end = -(-(offset + len(buffer)) // self.image.chunk_bytes)
        while at < len(buffer):
            number, skip = divmod(offset + at, self.image.chunk_bytes)
            count = min(self.image.chunk_length(number) - skip, len(buffer) - at)
            chunk = self._chunk(number, end)
            buffer[at : at + count] = bytes(count) if chunk is None else chunk[skip : skip + count]
            at += count

    def close(self) -> None:
        """Close the cache of what was read, if there is one; idempotent."""
        self._blobs.close()

    def as_file(self) -> io.BufferedReader:
        """The image as a buffered, seekable file object; closing it closes this reader."""
        from vmsnap.repository.imagefile import ImageFile

        return io.BufferedReader(ImageFile(self), _FILE_BUFFER_BYTES)

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
            forget(fd)
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

        Several threads read ahead and write, and a second process where that helps. Blocks.

        :raises DamageFound: the backup is damaged
        :raises OSError: writing failed
        """
        with closing(QuietWriter(fd)) as file, closing(self._blobs.second_process(fd)) as other:
            self._write_to(lambda offset, contents: file.write_all(contents, offset), progress, other)

    def write_to_empty(self, target: DiskWriter, progress: Progress | None = None) -> None:
        """Write all data of the image to a target that is as large and reads as zeros; durable on return. Blocks.

        :raises DamageFound: the backup is damaged
        :raises StorageError: the repository's storage failed, or the target cannot be written
        """
        self._write_to(target.write, progress)
        target.flush()

    def restore_onto(self, target: DiskWriter, progress: Progress | None = None) -> RestoreStats:
        """Make `target` like the image, whatever it holds: what differs is fetched and written, and nothing else.
        Durable on return. Blocks; several threads compare and write.

        Before anything is changed it is seen that the target can have the image's size and that the repository knows
        all chunks. What fails after that leaves the target neither old nor new, and the error says so; doing it again
        finishes it.

        :raises UsageError: the target cannot have the image's size; it is unchanged
        :raises DamageFound: the backup is damaged
        :raises StorageError: the repository's storage failed, or the target cannot be read or written
        """
        from vmsnap.repository.inplace import Overwriting

        for first, _, ids in self._batches(self._load):
            self._check_known(first, ids)
        work = Overwriting(self.image, target, self._blobs.data_id, self._adjacent)
        with work.told_if_torn():
            work.fit()
            self._in_threads(work.batch, progress)
            target.flush()
        return work.stats

    def chunk_lists(self) -> Iterator[tuple[int, int, bytes]]:
        """The image's chunks in order, in small batches: the first one's number, their count, their ids (none: holes).
        Reads the tree, not the data.

        :raises DamageFound: the tree is damaged, where that is not accepted
        """
        return self._batches(self._load)

    def read_chunks(self, first: int, ids: bytes) -> Iterator[tuple[int, bytes | memoryview]]:
        """The number and content of each of these chunks that is no hole, in the order in which they are stored. May be
        called by several threads at once. Blocks.

        :param first: the number of the first one
        :raises DamageFound: one is damaged, where that is not accepted; those that are accepted come as zeros
        :raises StorageError: the storage failed
        """
        return self._read_batch(first, ids)

    def verify(self, found: Callable[[int, int, DamageFound], None], progress: Progress | None = None) -> None:
        """Read and authenticate all of the image; go on behind what is damaged. Blocks.

        :param found: called for each damaged range with offset, length and what is wrong, from several threads
        :raises StorageError: the storage failed
        """

        def check(first: int, _count: int, ids: bytes) -> None:
            size = self.image.chunk_bytes
            numbers, wanted = self._wanted(first, ids)
            for position, content in self._blobs.read_many(BlobKind.DATA, wanted):
                if isinstance(content, DamageFound):
                    found(numbers[position] * size, wanted[position].raw_bytes, content)

        def load(image: ImageRecord, node: Node) -> bytes:
            try:
                return self._tree.load(image, node).ids
            except DamageFound as e:
                found(*span_of(image, node), e)
                return _holes_below(image, node)

        self._in_threads(check, progress, load)

    # -- inside

    def _in_threads(
        self, work: Callable[[int, int, bytes], None], progress: Progress | None, load: LoadIds | None = None
    ) -> None:
        """Call `work` with the first number, the count and the ids (none: holes) of each batch of chunks, in a few
        threads.
        """
        # Some wait for the storage or the disk while the others decrypt, unpack and hash.
        workers = min(len(os.sched_getaffinity(0)), 8) + 4
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
                for first, count, ids in self._batches(load or self._load):
                    settle(2 * workers)
                    waiting.append((count * self.image.chunk_bytes, threads.submit(work, first, count, ids)))
                settle(0)
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _batches(self, load: LoadIds) -> Iterator[tuple[int, int, bytes]]:
        size = max(1, _BATCH_BYTES // self.image.chunk_bytes)
        for first, count, ids in leaves(self.image, load):
            if ids is None:
                holes = max(1, _HOLES_BYTES // self.image.chunk_bytes)
                for at in range(0, count, holes):
                    yield first + at, min(holes, count - at), b""
                continue
            for at in range(0, count, size):
                part = ids[at * ID_BYTES : (at + size) * ID_BYTES]
                yield first + at, len(part) // ID_BYTES, part

    def _write_to(
        self,
        write: Callable[[int, Sequence[bytes | memoryview]], None],
        progress: Progress | None,
        other: SecondProcess | None = None,
    ) -> None:
        def store(first: int, _count: int, ids: bytes) -> None:
            if other and ids and other.write(lambda: self._pieces(first, ids)):
                return
            for offset, contents in self._adjacent(first, ids):
                write(offset, contents)

        self._in_threads(store, progress)

    def _pieces(self, first: int, ids: bytes) -> list[Piece]:
        """Where the chunks of a batch lie and belong; empty where some of them are not known."""
        numbers, wanted = self._wanted(first, ids)
        places = self._blobs.index.find_many([want.id for want in wanted])
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return []
        size = self.image.chunk_bytes
        return [Piece(place, want, number * size) for place, want, number in zip(known, wanted, numbers, strict=True)]

    def _check_known(self, first: int, ids: bytes) -> None:
        """See that the index has the chunks of a batch.

        :raises DamageFound: it lacks one whose loss is not accepted
        """
        numbers, wanted = self._wanted(first, ids)
        known = self._blobs.index.contains([want.id for want in wanted])
        for number, want, there in zip(numbers, wanted, known, strict=True):
            if not there:
                self._accept(
                    number, DamageFound(f"chunk {want.id.hex()[:16]} is missing: no pack that is known has it")
                )

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
                self._accept(numbers[position], content)
                content = bytes(wanted[position].raw_bytes)
            yield numbers[position], content

    def _accept(self, number: int, damage: DamageFound) -> None:
        """Return where the user accepts that this chunk is lost.

        :raises DamageFound: else
        """
        self._accept_range(number * self.image.chunk_bytes, self.image.chunk_length(number), damage)

    def _accept_range(self, start: int, length: int, damage: DamageFound) -> None:
        if not is_within(self._lost, start, length):
            message = f"{self._label} is damaged from {start} to {start + length}: {damage.message}"
            raise DamageFound(message, cure="vmsnap repair saves what can be saved") from damage

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
        try:
            return self._tree.load(image, node).ids
        except DamageFound as e:
            self._accept_range(*span_of(image, node), e)
            return _holes_below(image, node)

    def _adjacent(self, first: int, ids: bytes) -> Iterator[tuple[int, list[bytes | memoryview]]]:
        """The content of a batch in runs of chunks that follow one another: where each begins, and its chunks."""
        size = self.image.chunk_bytes
        return runs((number * size, content) for number, content in self._read_batch(first, ids))

    def _chunk(self, number: int, end: int) -> bytes | memoryview | None:
        """The content of a chunk, None for a hole; reads those that follow with it, before `end` at most unless the
        caller goes on where the last one stopped.
        """
        if number not in self._chunks:
            ahead = max(1, _BATCH_BYTES // self.image.chunk_bytes)
            goes_on = bool(self._chunks) and next(reversed(self._chunks)) == number - 1
            self._read_ahead(number, ahead if goes_on else min(end - number, ahead))
        self._chunks.move_to_end(number)
        return self._chunks[number]

    def _read_ahead(self, first: int, count: int) -> None:
        """Bring `count` chunks into the cache, or fewer where a node of the tree ends."""
        ids = self._ids(first)[: count * ID_BYTES]
        numbers = range(first, first + len(ids) // ID_BYTES)
        try:
            found = dict(self._read_batch(first, ids))
        except DamageFound:
            # What is damaged farther on costs nobody what was asked for.
            numbers = range(first, first + 1)
            found = dict(self._read_batch(first, ids[:ID_BYTES]))
        for number in reversed(numbers):  # so that the first is the last to go
            self._chunks[number] = found.get(number)
        while len(self._chunks) * self.image.chunk_bytes > _CACHE_BYTES and len(self._chunks) > len(numbers):
            self._chunks.popitem(last=False)

    def _ids(self, number: int) -> bytes:
        """The ids of a chunk and of those that follow it in the same node; zeros for a hole."""
        node = root_node(self.image)
        while node.level and node.id != ZERO_ID:
            ids = self._load(self.image, node)
            below = number // self.image.fanout ** (node.level - 1)
            at = below % self.image.fanout * ID_BYTES
            if node.level == 1:
                return ids[at:]
            node = Node(node.level - 1, below, ids[at : at + ID_BYTES])
        last = min((number // self.image.fanout + 1) * self.image.fanout, self.image.chunks)
        return bytes((last - number) * ID_BYTES)


def _holes_below(image: ImageRecord, node: Node) -> bytes:
    """The ids of a node's children if all of them were zeros."""
    return bytes(child_count(image, node) * ID_BYTES)


def _file_error(error: OSError, target: Path) -> StorageError:
    what = f"cannot write {target}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(what, cure="free some room, or choose another place")
    return StorageError(what)
