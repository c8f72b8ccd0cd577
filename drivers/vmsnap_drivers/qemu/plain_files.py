"""Disks of a QEMU that may be taken as what they are on the host: plain files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmsnap.model import Disk
from vmsnap.roles import YES_NO, Option

PLAIN_FILES: Final = Option(
    "plain_files",
    "whether raw disks that are files may be taken as such, by the mechanism file: where it cannot reflink, it copies"
    " them in the pause, or with --freeze overlay after it",
    "no",
    type=YES_NO,
)


def plain_files(disks: Sequence[Disk]) -> tuple[Disk, ...]:
    """The disks, those vouched for whose bytes are those of one file: QEMU has written and flushed all of them when it
    has stopped the guest, and writes nothing to them until that goes on.
    """
    return tuple(
        replace(disk, handle={**disk.handle, "plain_file": "yes"})
        if disk.format == "raw" and Path(disk.handle["file"]).is_file()
        else disk
        for disk in disks
    )
