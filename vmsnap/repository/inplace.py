"""Writing an image onto a disk that holds something already: only what differs is fetched and written.

The disk's content is compared by computing the ids of its chunks; those that are as the backup has them are neither
fetched from the repository nor written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vmsnap.errors import Interrupted, VmsnapError
from vmsnap.repository.format import ID_BYTES, ZERO_ID
from vmsnap.repository.tree import ImageRecord

if TYPE_CHECKING:
    from vmsnap.roles import DiskWriter

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class RestoreStats:
    """What writing onto a disk did. `compared_bytes` were read from it, `written_bytes` of it were changed, to data or
    to zeros; the rest is known to be zeros on both sides.
    """

    compared_bytes: int
    written_bytes: int


class Overwriting:
    """One run over a target; its `batch` may be called by several threads at once."""

    def __init__(
        self,
        image: ImageRecord,
        target: DiskWriter,
        chunk_id: Callable[[memoryview], bytes],
        contents: Callable[[int, bytes], Iterator[tuple[int, Sequence[bytes | memoryview]]]],
    ) -> None:
        """:param chunk_id: the id of a chunk with that content
        :param contents: yields, from the first number and the ids of some chunks, where content belongs, and the
            content; nothing for ids of zeros
        """
        self._image = image
        self._target = target
        self._chunk_id = chunk_id
        self._contents = contents
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._begun = False
        self._compared_bytes = 0
        self._written_bytes = 0

    @property
    def stats(self) -> RestoreStats:
        """What was done so far."""
        return RestoreStats(self._compared_bytes, self._written_bytes)

    @contextmanager
    def told_if_torn(self) -> Iterator[None]:
        """Have errors say so when the target is neither its old self nor the backup."""
        try:
            yield
        except (VmsnapError, Interrupted) as e:
            if not self._begun:
                raise
            raise type(e)(
                f"{e.message}; {self._target.label} now holds neither its old content nor the backup",
                cure=f"{e.cure}; then run the same again, which finishes it".removeprefix("; then "),
            ) from e

    def fit(self) -> None:
        """Give the target the image's size.

        :raises UsageError: it cannot have it
        """
        before = self._target.size_bytes
        self._target.fit(self._image.size_bytes)
        self._begun = self._target.size_bytes != before

    def batch(self, first: int, count: int, ids: bytes) -> None:
        """Make the target like the image for `count` chunks from `first` on; no `ids`: all of them are zeros."""
        size = self._image.chunk_bytes
        start = first * size
        end = min(start + count * size, self._image.size_bytes)
        if ids:
            self._chunks(first, ids, start, end)
            return
        done = first
        for offset, length in self._target.data_ranges(start, end - start):
            # By whole chunks, as everywhere: so what is written does not depend on where the target has holes.
            chunk = max(done, offset // size)
            stop = min(-(-(offset + length) // size), first + count)
            done = max(done, stop)
            step = max(1, _PIECE_BYTES // size)
            for at in range(chunk, stop, step):
                number = min(step, stop - at)
                self._chunks(at, ZERO_ID * number, at * size, min((at + number) * size, end))

    def _chunks(self, first: int, ids: bytes, start: int, end: int) -> None:
        size = self._image.chunk_bytes
        with self._piece(start, end - start) as found:
            zeros = _zero_chunks(found, size) if found is not None else None
            wanted = bytearray(ids)
            to_zero = []
            for position in range(len(ids) // ID_BYTES):
                at = slice(position * ID_BYTES, (position + 1) * ID_BYTES)
                is_zero = zeros is None or zeros[position]
                if ids[at] == ZERO_ID:
                    if not is_zero:
                        to_zero.append(position)
                elif found is None or is_zero:
                    continue
                elif self._chunk_id(found[position * size : (position + 1) * size]) == ids[at]:
                    wanted[at] = ZERO_ID  # nothing to be fetched
        for begin, stop in _runs(to_zero):
            offset = start + begin * size
            length = min(start + stop * size, end) - offset
            self._count(written_bytes=length)
            self._target.write_zeros(offset, length)
        if wanted.count(0) != len(wanted):
            for offset, contents in self._contents(first, bytes(wanted)):
                self._count(written_bytes=sum(map(len, contents)))
                self._target.write(offset, contents)

    @contextmanager
    def _piece(self, offset: int, length: int) -> Iterator[memoryview | None]:
        """The target's content there, in a buffer that the thread uses again; None where it is zeros."""
        if next(self._target.data_ranges(offset, length), None) is None:
            yield None
            return
        buffer = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._buffers.buffer = bytearray(length)
        with memoryview(buffer)[:length] as found:
            self._target.read_into(offset, found)
            self._count(compared_bytes=length)
            yield found

    def _count(self, *, compared_bytes: int = 0, written_bytes: int = 0) -> None:
        with self._lock:
            self._compared_bytes += compared_bytes
            self._written_bytes += written_bytes
            self._begun = self._begun or written_bytes > 0


def _zero_chunks(content: memoryview, chunk_bytes: int) -> Sequence[bool]:
    """For each chunk whether it is zeros."""
    zeros: list[bool] = []
    for at in range(0, len(content), chunk_bytes):
        chunk = np.frombuffer(content[at : at + chunk_bytes], np.uint8)
        # Most chunks of data show it in their first page.
        zeros.append(not chunk[:4096].any() and not chunk.any())
    return zeros


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of the runs of ascending numbers."""
    for at, position in enumerate(positions):
        if not at or positions[at - 1] != position - 1:
            begin = position
        if at + 1 == len(positions) or positions[at + 1] != position + 1:
            yield begin, position + 1
