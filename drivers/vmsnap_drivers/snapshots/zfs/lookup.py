"""What of ZFS a path of this host is, by what the kernel shows: no command."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from vmsnap.errors import SnapshotError

FUSE_SOCKET: Final = Path("/var/run/zfs/zfs_socket")
"""Where zfs-fuse listens (its ``src/zfs-fuse/cmd_listener.c``)."""
NODES: Final = Path("/dev/zvol")
NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.: -]*(/[A-Za-z0-9_.: -]+)*")
"""Names of file systems and volumes (zfs(8), zfsconcepts(7))."""
_BLKZNAME: Final = 0x8100127D
"""``_IOR(0x12, 125, char[256])``, from ``include/sys/fs/zfs.h`` of OpenZFS 2.1: the name of the volume that
a block device is.
"""
_NAME_BYTES: Final = 256
_SECTOR_BYTES: Final = 512
_NODE: Final = re.compile(r"zd[0-9]+")
_NODE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Place:
    """A volume, or a file in a file system: then `path` is the file's within that, and empty for a volume."""

    dataset: str
    path: str
    size_bytes: int


def look_up(address: str) -> Place | None:
    """What lies at that address; None where it is nothing of ZFS. Never raises."""
    if not address.startswith("/"):
        return None
    try:
        status = os.stat(address)  # noqa: PTH116 - an address, not a path of ours
        if stat.S_ISBLK(status.st_mode):
            return _volume(address, status)
        if stat.S_ISREG(status.st_mode):
            return _file(Path(address).resolve(strict=True), status)
    except (OSError, ValueError, RuntimeError):
        return None  # nothing is there, or nothing that we may look at; whoever takes it says what
    return None


def node_of(volume: str, seconds: float = _NODE_SECONDS) -> Path:
    """The device of a volume, which comes into being some time after the volume. Blocks.

    :raises SnapshotError: it does not, within so many seconds
    """
    deadline = time.monotonic() + seconds
    while True:
        if (node := _node(volume)) is not None:
            return node
        if time.monotonic() > deadline:
            raise SnapshotError(
                f"no device of the volume {volume} appears within {seconds:g} s", cure="see that udev runs"
            )
        time.sleep(_POLL_SECONDS)


def has_node(volume: str) -> bool:
    """Whether the volume has a device."""
    return _node(volume) is not None


def _node(volume: str) -> Path | None:
    link = NODES / volume
    if link.exists():
        return link
    # Where no udev runs there are no links.
    for entry in Path("/sys/block").glob("zd*"):
        device = Path("/dev", entry.name)
        try:
            if _NODE.fullmatch(entry.name) and _volume_at(str(device)) == volume:
                return device
        except OSError:  # it is just coming, or going
            continue
    return None


def _volume(address: str, status: os.stat_result) -> Place | None:
    entry = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
    if not _NODE.fullmatch(entry.resolve(strict=True).name):  # a partition of one is none
        return None
    name = _volume_at(address)
    if not NAME.fullmatch(name):  # a snapshot's device is none
        return None
    return Place(name, "", int((entry / "size").read_text()) * _SECTOR_BYTES)


def _volume_at(device: str) -> str:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        answer = fcntl.ioctl(descriptor, _BLKZNAME, bytes(_NAME_BYTES))
    finally:
        os.close(descriptor)
    return answer.partition(b"\0")[0].decode()


def _file(path: Path, status: os.stat_result) -> Place | None:
    for dataset, root, point in _mounts(f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"):
        if path.is_relative_to(point):
            within = PurePosixPath(root, path.relative_to(point)).relative_to("/")
            return Place(dataset, str(within), status.st_size)
    return None


def _mounts(device: str) -> Iterator[tuple[str, str, str]]:
    """Data set, root and mount point of the mounts of a device number that ZFS made (proc_pid_mountinfo(5)), the newest
    first.
    """
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        before, _, after = line.partition(" - ")
        fields, kind, source = before.split(), *after.split()[:2]
        if fields[2] != device:
            continue
        dataset = _unescaped(source)
        if NAME.fullmatch(dataset) and (kind == "zfs" or (kind.startswith("fuse") and FUSE_SOCKET.exists())):
            yield dataset, _unescaped(fields[3]), _unescaped(fields[4])


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
