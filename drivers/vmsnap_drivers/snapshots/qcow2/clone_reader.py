"""Reading a clone after its VM has ended."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from vmsnap.errors import SnapshotError
from vmsnap.model import Extent
from vmsnap.pagecache import QuietReader
from vmsnap.roles import DiskReader


class CloneReader(DiskReader):
    """The present content of a sparse raw file; its holes are the zero extents. Leaves the page cache as it was.

    :raises SnapshotError: the file is gone, or has not the disk's size
    """

    parallel_reads: ClassVar[bool] = True

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SnapshotError(f"the clone {path} is lost: {e.strerror}") from e
        self._quiet = QuietReader(self._fd)
        found = os.fstat(self._fd).st_size
        if found != size_bytes:
            self.close()
            raise SnapshotError(f"the clone {path} has {found} bytes instead of {size_bytes}")

    def extents(self) -> Iterator[Extent]:
        """See `DiskReader.extents`."""
        at = 0
        while at < self.size_bytes:
            try:
                begin = min(os.lseek(self._fd, at, os.SEEK_DATA), self.size_bytes)
                end = (
                    min(os.lseek(self._fd, begin, os.SEEK_HOLE), self.size_bytes) if begin < self.size_bytes else begin
                )
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise SnapshotError(f"the clone {self._path} cannot be read: {e.strerror}") from e
                begin = end = self.size_bytes
            if begin > at:
                yield Extent(at, begin - at, zero=True)
            if end > begin:
                yield Extent(begin, end - begin)
            at = end

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `DiskReader.read_into`."""
        if offset < 0 or offset + len(buffer) > self.size_bytes:
            raise SnapshotError(f"{self._path}: {len(buffer)} bytes from {offset} leave its {self.size_bytes} bytes")
        done = 0
        while done < len(buffer):
            try:
                count = self._quiet.read_into(buffer[done:], offset + done)
            except OSError as e:
                raise SnapshotError(f"the clone {self._path} cannot be read: {e.strerror}") from e
            if not count:
                raise SnapshotError(f"the clone {self._path} ends early")
            done += count

    def close(self) -> None:
        """See `DiskReader.close`."""
        if self._fd >= 0:
            self._quiet.close()
            os.close(self._fd)
            self._fd = -1
