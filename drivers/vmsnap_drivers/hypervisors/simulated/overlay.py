"""Overlays of the simulated hypervisor: what a guest writes while its disk is frozen.

A sparse file as large as the disk: a block that was written to it is allocated (lseek(2), SEEK_DATA), all others are
the disk's. So the file tells by itself what it holds, to whoever finds it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from vmsnap import durable
from vmsnap.errors import HypervisorError
from vmsnap_drivers.hypervisors.simulated.layout import PAGE

_PIECE_BYTES = 1 << 20
_COMMIT_SLACK_NS = 5_000_000_000
"""A commit writes to the disk, and set the overlay's time when it began."""


def make_overlay(path: Path, size_bytes: int) -> None:
    """Make an empty one, durably.

    :raises OSError: it exists, or cannot be made
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    durable.sync(path.parent)


class Overlay:
    """One that is open, above the disk that is open as `base`."""

    def __init__(self, path: Path, base: int) -> None:
        """Open it.

        :raises OSError: it is not there
        """
        self.path = path
        self._base = base
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def read(self, size_bytes: int, offset: int) -> bytes:
        """What the guest sees there."""
        first = offset // PAGE * PAGE
        end = -(-(offset + size_bytes) // PAGE) * PAGE
        blocks = bytearray()
        for at in range(first, end, PAGE):
            blocks += os.pread(self._descriptor if self._holds(at) else self._base, PAGE, at)
        return bytes(blocks[offset - first : offset - first + size_bytes])

    def write(self, data: bytes, offset: int) -> None:
        """Take it from the guest, in whole blocks."""
        first = offset // PAGE * PAGE
        end = -(-(offset + len(data)) // PAGE) * PAGE
        blocks = bytearray(self.read(end - first, first))
        blocks[offset - first : offset - first + len(data)] = data
        os.pwrite(self._descriptor, blocks, first)

    def is_empty(self) -> bool:
        """Whether nothing was written to it."""
        return next(self._extents(), None) is None

    def flush(self) -> None:
        """Bring it to its own disk."""
        os.fdatasync(self._descriptor)

    def commit(self) -> None:
        """Write what it holds into the disk, durably. Idempotent: it stays as it is."""
        os.utime(self._descriptor)
        os.fsync(self._descriptor)
        for begin, end in self._extents():
            for at in range(begin, end, _PIECE_BYTES):
                os.pwrite(self._base, os.pread(self._descriptor, min(_PIECE_BYTES, end - at), at), at)
        os.fdatasync(self._base)

    def check_newer(self) -> None:
        """See that nobody used the disk without it; asked where its VM is gone.

        :raises HypervisorError: somebody did: both have data that the other lacks
        """
        if os.fstat(self._base).st_mtime_ns > os.fstat(self._descriptor).st_mtime_ns + _COMMIT_SLACK_NS:
            raise HypervisorError(
                f"the overlay {self.path} with the guest's last writes is kept: its disk was written to after it",
                cure=f"to give them up: delete {self.path}",
            )

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def _holds(self, block: int) -> bool:
        try:
            return os.lseek(self._descriptor, block, os.SEEK_DATA) == block
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            return False  # no data from there on

    def _extents(self) -> Iterator[tuple[int, int]]:
        end = 0
        while True:
            try:
                begin = os.lseek(self._descriptor, end, os.SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                return
            end = os.lseek(self._descriptor, begin, os.SEEK_HOLE)
            yield begin, end
