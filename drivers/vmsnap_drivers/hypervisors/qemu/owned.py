"""What of this driver's is on this host: duplicates in memory, loaded VMs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from vmsnap.model import OwnedResource
from vmsnap.roles import DriverContext
from vmsnap_drivers.hypervisors.qemu.launch import read_mark
from vmsnap_drivers.hypervisors.qemu.record import DUPLICATE_MARK


def duplicate_folders(context: DriverContext) -> Iterator[Path]:
    """The folders of our duplicates."""
    for place in (context.memory_dir, context.spool_dir):
        if place is not None and place.is_dir():
            yield from (mark.parent for mark in sorted(place.glob(f"*/{DUPLICATE_MARK}")))


def discard(context: DriverContext, name: str) -> None:
    """Remove the duplicate of that name; idempotent."""
    for folder in duplicate_folders(context):
        if folder.name == name:
            shutil.rmtree(folder)


def list_owned(context: DriverContext) -> list[OwnedResource]:
    """All duplicates and loaded VMs, those whose process has ended included."""
    found = [OwnedResource("duplicate", folder.name, folder.name, "qemu") for folder in duplicate_folders(context)]
    runs = context.state_dir / "qemu" / "run"
    for folder in sorted(runs.iterdir()) if runs.is_dir() else ():
        if read_mark(folder) is not None:
            found.append(OwnedResource("vm", folder.name, folder.name, "qemu"))
    return found
