"""Disks that exist, which a person named by their addresses, and onto which disks of a backup are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from vmsnap.controller.drivers import Drivers
from vmsnap.errors import NotFound, UsageError
from vmsnap.model import Disk
from vmsnap.repository import Manifest
from vmsnap.roles import DiskWriter, SnapshotMechanism

THE_ONE = ""
"""In place of a device: the only disk of the backup."""


@contextmanager
def opened(drivers: Drivers, manifest: Manifest, onto: Mapping[str, str]) -> Iterator[Mapping[str, DiskWriter]]:
    """The disks at the addresses `onto`, by the device whose content they are to get, each opened for writing by the
    snapshot mechanism that handles it. Changes nothing. Whoever has written one closes it; the rest is closed at the
    end.

    :raises NotFound: the backup has no such device, or there is no disk at an address
    :raises UsageError: an address says nothing, is there twice, or the disk has another size
    :raises Busy: somebody uses a disk
    :raises VmsnapError: a disk cannot be reached
    """
    with ExitStack() as stack:
        made: dict[str, DiskWriter] = {}
        for disk in _wanted(manifest, onto):
            made[disk.device] = stack.enter_context(_mechanism(drivers, disk, stack).writer(disk))
        yield made


def _wanted(manifest: Manifest, onto: Mapping[str, str]) -> Iterator[Disk]:
    sizes = {disk.device: disk.size_bytes for disk in manifest.disks}
    twice = next((address for address, count in Counter(onto.values()).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"two disks cannot both be written onto {twice}")
    for device, address in onto.items():
        if device == THE_ONE and len(sizes) != 1:
            raise UsageError(
                f"backup {manifest.backup} has {len(sizes)} disks: {', '.join(sizes)}",
                cure=f"say which of them goes to {address}: DEVICE={address}",
            )
        found = next(iter(sizes)) if device == THE_ONE else device
        if found not in sizes:
            raise NotFound(f"backup {manifest.backup} has no disk {found!r}", cure=f"it has: {', '.join(sizes)}")
        yield Disk(found, address, sizes[found])


def _mechanism(drivers: Drivers, disk: Disk, stack: ExitStack) -> SnapshotMechanism:
    for name in drivers.mechanism_names():
        mechanism = drivers.mechanism(name)
        stack.callback(mechanism.close)
        if mechanism.writes and mechanism.handles(disk):
            return mechanism
    raise UsageError(
        f"{disk.address} is no disk that a backup can be written onto: no snapshot mechanism knows it",
        cure="a LUN is known where its portal is one of this host or of an appliance that is configured; see the docs:"
        " iscsi",
    )
