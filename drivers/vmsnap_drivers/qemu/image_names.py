"""The names of disk images, as command lines and QEMU's answers have them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def absolute(path: str, cwd: str) -> str:
    """An image's name as an absolute path; URLs and the like stay as they are."""
    if "://" in path or path.startswith(("json:", "/")) or not path:
        return path
    return os.path.normpath(Path(cwd) / path)


def image_name(node: dict[str, Any]) -> str:
    """The name of the image of a block node. QEMU writes it as JSON where options do not fit into a name."""
    filename = str(node["image"].get("filename") or node.get("file", ""))
    found = re.search(r'"filename": "((?:[^"\\]|\\.)*)"', filename) if filename.startswith("json:") else None
    return found[1] if found else filename


def identity_of(address: str) -> str | tuple[int, int]:
    """What tells a disk from all others: device and inode of a file, the number of a block device, else its name."""
    try:
        found = Path(address).stat()
    except (OSError, ValueError):
        return address
    return (-1, found.st_rdev) if found.st_rdev else (found.st_dev, found.st_ino)
