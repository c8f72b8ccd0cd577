"""Reads a thin volume: what its pool has no blocks for is zero and is not read, unless there is something below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

from vmsnap.errors import SnapshotError
from vmsnap.model import Extent
from vmsnap_drivers.devicereader import DeviceReader
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.thinmap import ThinMaps
from vmsnap_drivers.snapshots.lvm.volumes import named


class ThinReader(DeviceReader):
    """A reader of the active thin volume ``/dev/GROUP/NAME``. Where nobody can say which blocks it has, all is read."""

    def __init__(
        self,
        lvm: Lvm,
        maps: ThinMaps,
        group: str,
        name: str,
        size_bytes: int,
        label: str,
        why: Callable[[], str] = str,
        given_up: Callable[[], str] = str,
    ) -> None:
        """See `DeviceReader`; the volume may be larger than `size_bytes`."""
        super().__init__(f"/dev/{group}/{name}", size_bytes, label, why=why, given_up=given_up)
        self._lvm, self._maps, self._group, self._name = lvm, maps, group, name
        self._remark = ""

    def extents(self) -> Iterator[Extent]:
        """See `DiskReader.extents`."""
        self._remark = ""
        found = self._known_extents()
        try:
            first = list(islice(found, 1))  # later ones raise nothing
        except SnapshotError as e:
            self._remark = f"was read whole: {e}"
            first, found = [], super().extents()
        for extent in chain(first, found):
            if extent.offset < self.size_bytes:
                yield Extent(extent.offset, min(extent.length, self.size_bytes - extent.offset), extent.zero)

    def remark(self) -> str:
        """See `DiskReader.remark`."""
        return self._remark

    def _known_extents(self) -> Iterator[Extent]:
        volume = named(self._lvm.volumes([self._group]), self._group, self._name)
        if volume is None:
            raise SnapshotError(f"{self._group}/{self._name} is gone")  # as reading it says with its reason
        if self._lvm.has_external_origin(self._group, self._name):
            # What the pool has no block for is the origin's, which lies outside of the pool and has data everywhere.
            yield Extent(0, volume.size_bytes)
        else:
            yield from self._maps.extents(volume)
