"""Which logical volume a block device of this host is, by what the kernel shows: no command, no permission needed."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# "LVM-", the group's and the volume's UUID, and for a layer below a volume its name (lib/activate/dev_manager.c of LVM)
_UUID: Final = re.compile(r"LVM-([A-Za-z0-9]{32})([A-Za-z0-9]{32})")
_SECTOR_BYTES: Final = 512


@dataclass(frozen=True)
class Device:
    """A block device that is a logical volume; the UUIDs are without hyphens."""

    group_uuid: str
    volume_uuid: str
    size_bytes: int


def look_up(address: str) -> Device | None:
    """The logical volume at that address; None where it is something else, or nothing. Never raises."""
    if not address.startswith("/"):
        return None
    try:
        status = os.stat(address)  # noqa: PTH116 - an address, not a path of ours
        if not stat.S_ISBLK(status.st_mode):
            return None
        entry = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
        found = _UUID.fullmatch((entry / "dm/uuid").read_text().strip())
        return Device(found[1], found[2], int((entry / "size").read_text()) * _SECTOR_BYTES) if found else None
    except (OSError, ValueError):
        return None
