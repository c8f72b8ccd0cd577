"""A reader for snapshots and clones that are raw image files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from vmsnap.errors import SnapshotError
from vmsnap.model import Extent
from vmsnap.pagecache import QuietReader
from vmsnap.roles.snapshot import DiskReader


class FileReader(DiskReader):
    """Reads a raw image file; its holes are the zero extents. Leaves the host's page cache as it was."""

    parallel_reads: ClassVar[bool] = True

    def __init__(self, path: Path, size_bytes: int, what: str = "the snapshot") -> None:
        """Open it.

        :param what: what messages call it
        :raises SnapshotError: it is gone, or has another size than its disk
        """
        self.size_bytes = size_bytes
        self._label = f"{what} {path}"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SnapshotError(f"{self._label} is lost: {e.strerror}") from e
        self._quiet = QuietReader(self._fd)
        found = os.fstat(self._fd).st_size
        if found != size_bytes:
            self.close()
            raise SnapshotError(f"{self._label} is lost: it has {found} bytes, its disk {size_bytes}")

    def extents(self) -> Iterator[Extent]:
        """Data where the file has blocks, zeros where it has holes.

        :raises SnapshotError: the file system cannot tell
        """
        at = 0
        while at < self.size_bytes:
            begin, end = next_data(self._fd, at, self.size_bytes)
            if begin > at:
                yield Extent(at, begin - at, zero=True)
            if end > begin:
                yield Extent(begin, end - begin)
            at = end

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `DiskReader.read_into`."""
        if offset < 0 or offset + len(buffer) > self.size_bytes:
            raise SnapshotError(f"{self._label}: {offset}+{len(buffer)} leaves the disk of {self.size_bytes} bytes")
        done = 0
        while done < len(buffer):
            try:
                count = self._quiet.read_into(buffer[done:], offset + done)
            except OSError as e:
                raise SnapshotError(f"{self._label} cannot be read: {e.strerror}") from e
            if not count:
                raise SnapshotError(f"{self._label} ends early")
            done += count

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            self._quiet.close()
            os.close(self._fd)
            self._fd = -1


def next_data(fd: int, at: int, size_bytes: int) -> tuple[int, int]:
    """Begin and end of the next range with blocks from `at` on; both the end of the file where there is none.

    :raises SnapshotError: the file system cannot tell
    """
    try:
        begin = min(os.lseek(fd, at, os.SEEK_DATA), size_bytes)
        return begin, min(os.lseek(fd, begin, os.SEEK_HOLE), size_bytes)
    except OSError as e:
        if e.errno != errno.ENXIO:  # nothing but a hole follows
            raise SnapshotError(f"cannot ask for the blocks of the file: {e.strerror}") from e
        return size_bytes, size_bytes
