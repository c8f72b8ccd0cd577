"""The duplicates in memory, each in a folder that its driver has marked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from vmsnap.model import OwnedResource
from vmsnap.roles import DriverContext
from vmsnap_drivers.qemu.capture.record import duplicate_mark


def duplicate_folders(driver: str, context: DriverContext) -> Iterator[Path]:
    """The folders of the driver's duplicates."""
    for place in (context.memory_dir, context.spool_dir):
        if place is not None and place.is_dir():
            yield from (mark.parent for mark in sorted(place.glob(f"*/{duplicate_mark(driver)}")))


def discard(driver: str, context: DriverContext, name: str) -> None:
    """Remove the duplicate of that name; idempotent."""
    for folder in duplicate_folders(driver, context):
        if folder.name == name:
            shutil.rmtree(folder)


def list_owned(driver: str, context: DriverContext) -> list[OwnedResource]:
    """All duplicates of the driver's."""
    folders = duplicate_folders(driver, context)
    return [OwnedResource("duplicate", folder.name, folder.name, driver) for folder in folders]
