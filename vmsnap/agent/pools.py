"""Storage pools: what shares a place on the storage, so that not too many jobs read it at once.

A pool is named by what the address of a disk says: the mount point of the file system that holds an image file, the
volume group or zpool of a volume, the server of a disk on the network.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")
_VOLUME = re.compile(r"((?:[^-]|--)+)-(?:[^-]|--)+")


def pool_of(address: str, mounts: Collection[str]) -> str:
    """The pool of a disk's physical address; empty where there is none. Pure: the storage is not asked, it may hang.

    :param mounts: of the host, as `mount_points` has them
    """
    if not address.startswith("/"):
        server = urlsplit(address)
        return f"{server.scheme}://{server.netloc.rpartition('@')[2]}" if server.scheme and server.netloc else ""
    path = PurePosixPath(address)
    parts = path.parts[1:]
    if parts[:1] != ("dev",):
        return next((str(each) for each in path.parents if str(each) in mounts), "/")
    if parts[:2] == ("dev", "zvol") and len(parts) > 3:
        return f"/dev/zvol/{parts[2]}"
    volume = _VOLUME.fullmatch(parts[2]) if parts[:2] == ("dev", "mapper") and len(parts) == 3 else None
    if volume:
        # The device mapper writes a dash in a name twice, so that the one between the names is found.
        return f"/dev/{volume[1].replace('--', '-')}"
    if len(parts) == 3 and parts[1] not in ("mapper", "disk"):
        return f"/dev/{parts[1]}"
    return address


def mount_points() -> frozenset[str]:
    """Where file systems are mounted, as proc(5) tells it.

    :raises OSError: /proc cannot be read
    """
    lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    return frozenset(_ESCAPE.sub(lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines)
