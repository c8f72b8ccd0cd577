"""A reader for snapshots and clones that are block devices of this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import ClassVar

from vmsnap.errors import SnapshotError
from vmsnap.model import Extent
from vmsnap.pagecache import QuietReader
from vmsnap.roles import DiskReader


class DeviceReader(DiskReader):
    """Reads a block device, which is open only while it is read: what is open cannot be removed. Leaves the host's
    page cache as it was.
    """

    parallel_reads: ClassVar[bool] = True

    def __init__(
        self,
        device: str,
        size_bytes: int,
        label: str,
        extents: Callable[[], Iterator[Extent]] | None = None,
        why: Callable[[], str] = str,
        given_up: Callable[[], str] = str,
    ) -> None:
        """Look at it.

        :param label: what messages call it, such as ``the snapshot vg0/x``
        :param extents: tells where data is; None where all of it may be
        :param why: tells why it is lost, when it is; empty where nobody knows better than the kernel
        :param given_up: tells why nobody is to open it any more; empty while that is not so
        :raises SnapshotError: it is gone, or shorter than its disk
        """
        self.size_bytes = size_bytes
        self._device, self._label, self._extents, self._why = device, label, extents, why
        self._given_up = given_up
        descriptor = self._open()
        try:
            found = os.lseek(descriptor, 0, os.SEEK_END)
        except OSError as e:
            raise self._lost(e) from e
        finally:
            os.close(descriptor)
        if found < size_bytes:
            raise SnapshotError(f"{label} is lost: it has {found} bytes, its disk {size_bytes}")

    def extents(self) -> Iterator[Extent]:
        """See `DiskReader.extents`."""
        if self._extents is not None:
            yield from self._extents()
        elif self.size_bytes:
            yield Extent(0, self.size_bytes)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `DiskReader.read_into`."""
        if offset < 0 or offset + len(buffer) > self.size_bytes:
            raise SnapshotError(f"{self._label}: {offset}+{len(buffer)} leaves the disk of {self.size_bytes} bytes")
        descriptor = self._open()
        quiet = QuietReader(descriptor)
        done = 0
        try:
            while done < len(buffer):
                count = quiet.read_into(buffer[done:], offset + done)
                if not count:
                    raise SnapshotError(f"{self._label} is lost: it ends early")
                done += count
        except OSError as e:
            raise self._lost(e) from e
        finally:
            quiet.close()
            os.close(descriptor)

    def close(self) -> None:
        """Nothing is open; see `DiskReader.close`."""

    def _open(self) -> int:
        if why := self._given_up():
            raise SnapshotError(f"{self._label} is lost: {why}")
        try:
            return os.open(self._device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise self._lost(e) from e

    def _lost(self, error: OSError) -> SnapshotError:
        return SnapshotError(f"{self._label} is lost: {self._why() or error.strerror}")
