"""The names of disk images, as command lines and QEMU's answers have them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

_ISCSI_PORT: Final = 3260


def absolute(path: str, cwd: str) -> str:
    """An image's name as an absolute path; URLs and the like stay as they are."""
    if "://" in path or path.startswith(("json:", "/")) or not path:
        return path
    return os.path.normpath(Path(cwd) / path)


def image_name(node: dict[str, Any]) -> str:
    """The name of the image of a block node. QEMU writes it as JSON where options do not fit into a name, as those of a
    LUN never do (``block/iscsi.c``): that becomes a URL.
    """
    filename = str(node["image"].get("filename") or node.get("file", ""))
    if filename.startswith("json:") and (lun := _lun_of(filename.removeprefix("json:"))):
        return lun
    found = re.search(r'"filename": "((?:[^"\\]|\\.)*)"', filename) if filename.startswith("json:") else None
    return found[1] if found else filename


def _lun_of(text: str) -> str:
    """The URL of the LUN in a node's options; empty where there is none."""
    try:
        options = json.loads(text)
        while options.get("driver") == "raw":
            options = options["file"]
        if options.get("driver") != "iscsi":
            return ""
        portal = options["portal"]
        if not re.search(r"[^:]:\d+$", portal):
            portal = f"{portal}:{_ISCSI_PORT}"
        return f"iscsi://{portal}/{options['target']}/{options.get('lun', 0)}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def identity_of(address: str) -> str | tuple[int, int]:
    """What tells a disk from all others: device and inode of a file, the number of a block device, else its name."""
    try:
        found = Path(address).stat()
    except (OSError, ValueError):
        return address
    return (-1, found.st_rdev) if found.st_rdev else (found.st_dev, found.st_ino)
