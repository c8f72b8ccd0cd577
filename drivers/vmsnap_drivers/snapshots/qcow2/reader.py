"""Reading a snapshot out of QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Extent
from vmsnap.roles import DiskReader
from vmsnap_drivers.qemu.nbd import NbdClient, NbdError, NbdRefused
from vmsnap_drivers.qemu.nbd_wire import STATE_ZERO

_STEP_BYTES: Final = 256 * 1024 * 1024
_SECTOR_BYTES: Final = 512
_CLUSTER_BYTES: Final = 64 * 1024
_IN_FLIGHT: Final = 16


class Qcow2Reader(DiskReader):
    """The content of one disk at its instant, over NBD connections of its own.

    Every request stays within one cluster of the filter, 64 KiB. In a request that begins in copied clusters and ends
    in others QEMU before 8.0 takes all for not copied, and reads what the guest wrote since (``hbitmap_status``, fixed
    in February 2023; 7.2.22 has it). That no two requests in flight share a sector matters too: where they do, QEMU
    before 9.2 may abort (``reqlist_init_req``). Larger requests are no faster (1.1 to 1.6 GB/s, 2 cores, page cache).

    :param export: the content
    :param target: the export of the filter's target; None for a disk that nobody writes
    :param timeout_seconds: how long QEMU may send nothing
    :raises SnapshotError: the snapshot is lost
    """

    def __init__(self, disk: Disk, socket: Path, export: str, target: str | None, timeout_seconds: float) -> None:
        self._disk = disk
        self._clients: list[NbdClient] = []
        try:
            self._content = self._connect(socket, export, timeout_seconds)
            self._target = self._connect(socket, target, timeout_seconds) if target is not None else None
        except BaseException:
            self.close()
            raise
        self.size_bytes = disk.size_bytes

    def extents(self) -> Iterator[Extent]:
        """See `DiskReader.extents`. Adjacent extents differ in `zero`.

        For the same reason QEMU 7.2 may tell what is allocated in the disk *now*: what the guest has zeroed since the
        instant would pass for zeros. So a range counts as zeros only if the target,
        asked afterwards, holds no other old content of it, and if the snapshot, asked after that, is still whole: the
        filter copies before the disk changes.

        :raises SnapshotError: the snapshot is lost
        """
        pending: Extent | None = None
        for offset in range(0, self.size_bytes, _STEP_BYTES):
            for found in self._step(offset, min(_STEP_BYTES, self.size_bytes - offset)):
                if pending is not None and pending.zero == found.zero:
                    pending = Extent(pending.offset, pending.length + found.length, found.zero)
                    continue
                if pending is not None:
                    yield pending
                pending = found
        if pending is not None:
            yield pending

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `DiskReader.read_into`."""
        try:
            self._content.read_into(offset, buffer)
        except NbdRefused as e:
            raise self._lost(e) from e

    def close(self) -> None:
        """See `DiskReader.close`."""
        for client in self._clients:
            client.close()

    def _connect(self, socket: Path, export: str, timeout_seconds: float) -> NbdClient:
        try:
            client = NbdClient(
                socket, export, timeout_seconds=timeout_seconds, request_bytes=_CLUSTER_BYTES, in_flight=_IN_FLIGHT
            )
        except NbdError as e:
            raise SnapshotError(f"the snapshot of disk {self._disk.device} cannot be read: {e.message}") from e
        self._clients.append(client)
        if client.size_bytes != self._disk.size_bytes:
            raise SnapshotError(
                f"the snapshot of disk {self._disk.device} has {client.size_bytes} bytes, the disk had "
                f"{self._disk.size_bytes}"
            )
        return client

    def _step(self, offset: int, length: int) -> list[Extent]:
        try:
            found = self._zeros(self._content, offset, length)
            if self._target is None:
                return found
            found = list(_both(found, self._zeros(self._target, offset, length)))
            self._content.read_into(offset, memoryview(bytearray(_SECTOR_BYTES)))
        except NbdRefused as e:
            raise self._lost(e) from e
        return found

    def _zeros(self, client: NbdClient, offset: int, length: int) -> list[Extent]:
        ranges = client.ranges(offset=offset, length=length)
        return [Extent(found.offset, found.length, bool(found.flags & STATE_ZERO)) for found in ranges]

    def _lost(self, error: NbdRefused) -> SnapshotError:
        return SnapshotError(
            f"the snapshot of disk {self._disk.device} is lost, the guest is not harmed: {error.message}",
            cure="most likely there was no room or no time for the old blocks: see the options folder and copy_seconds",
        )


def _both(first: list[Extent], second: list[Extent]) -> Iterator[Extent]:
    """The ranges of both lists, which cover the same; zero where both are."""
    others = iter(second)
    other = next(others)
    for extent in first:
        offset, end = extent.offset, extent.offset + extent.length
        while offset < end:
            if other.offset + other.length <= offset:
                other = next(others)
                continue
            stop = min(end, other.offset + other.length)
            yield Extent(offset, stop - offset, extent.zero and other.zero)
            offset = stop
