"""Where the bytes of an image come from besides snapshot mechanisms: sparse files and bytes; and which chunks of a
source must be read at all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from vmsnap.errors import HypervisorError, ProtocolError
from vmsnap.model import Extent
from vmsnap.pagecache import QuietReader
from vmsnap.roles.snapshot import DiskReader


class SparseFileReader(DiskReader):
    """Reads a file, such as a RAM image; its holes, and what lies behind its end, are zeros. Leaves the host's page
    cache as it was.
    """

    parallel_reads: ClassVar[bool] = True

    def __init__(self, path: str | Path, size_bytes: int) -> None:
        """Open the file.

        :raises HypervisorError: it cannot be opened
        """
        self.path = Path(path)
        self.size_bytes = size_bytes
        self._fd = -1
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise HypervisorError(f"cannot read {self.path}: {e.strerror}") from e
        self._quiet = QuietReader(self._fd)

    def extents(self) -> Iterator[Extent]:
        """See `DiskReader.extents`; asks the file system, data first."""
        at = 0
        while at < self.size_bytes:
            data = self._seek(at, os.SEEK_DATA)
            if data > at:
                yield Extent(at, data - at, zero=True)
            if data < self.size_bytes:
                at = self._seek(data, os.SEEK_HOLE)
                yield Extent(data, at - data)
            else:
                at = data

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return min(os.lseek(self._fd, offset, whence), self.size_bytes)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole follows
                return self.size_bytes
            raise HypervisorError(f"cannot read {self.path}: {e.strerror}") from e

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `DiskReader.read_into`.

        :raises HypervisorError: the file cannot be read
        """
        at = 0
        while at < len(buffer):
            try:
                count = self._quiet.read_into(buffer[at:], offset + at)
            except OSError as e:
                raise HypervisorError(f"cannot read {self.path}: {e.strerror}") from e
            if not count:
                buffer[at:] = bytes(len(buffer) - at)
                return
            at += count

    def close(self) -> None:
        """Close the file; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._quiet.close()
            os.close(fd)


class BytesReader(DiskReader):
    """Reads bytes that are in memory already."""

    def __init__(self, content: bytes | bytearray | memoryview) -> None:
        self._content = memoryview(content).cast("B")
        self.size_bytes = len(self._content)

    def extents(self) -> Iterator[Extent]:
        """One extent of data."""
        if self.size_bytes:
            yield Extent(0, self.size_bytes)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `DiskReader.read_into`."""
        buffer[:] = self._content[offset : offset + len(buffer)]

    def close(self) -> None:
        """Nothing to close."""


def runs_to_read(source: DiskReader, name: str, chunk_bytes: int, run_chunks: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the source's chunks in order, in runs: the first one's number, their count, whether they must be read.

    A chunk is read whole as soon as any of it may hold data. Runs to be read have `run_chunks` chunks at most.

    :raises ProtocolError: the source's extents leave a gap, overlap, or end elsewhere than the source
    """
    done = 0  # chunks that were yielded
    start = end = 0  # chunks to be read that were not
    at = 0
    for extent in source.extents():
        if extent.offset != at or extent.length < 0 or at + extent.length > source.size_bytes:
            raise ProtocolError(f"{name}: an extent at {extent.offset} where {at} should follow")
        at += extent.length
        if extent.zero or not extent.length:
            continue
        first, last = max(extent.offset // chunk_bytes, end), -(-at // chunk_bytes)
        if first > end:
            if end > start:
                yield start, end - start, True
                done = end
            yield done, first - done, False
            done = start = first
        end = max(last, end)
        while end - start >= run_chunks:
            yield start, run_chunks, True
            start += run_chunks
            done = start
    if at != source.size_bytes:
        raise ProtocolError(f"{name}: the extents end at {at}, the source at {source.size_bytes}")
    if end > start:
        yield start, end - start, True
        done = end
    chunks = -(-source.size_bytes // chunk_bytes)
    if chunks > done:
        yield done, chunks - done, False
