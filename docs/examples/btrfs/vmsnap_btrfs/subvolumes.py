"""btrfs itself: what lies where, and its command, which is never waited for without end."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

from vmsnap.errors import SnapshotError

_SUBVOLUME_INODE = 256
"""BTRFS_FIRST_FREE_OBJECTID: the inode number of every subvolume's root (Linux, include/uapi/linux/btrfs_tree.h)."""
_IOC_FS_INFO = 0x8400941F
"""BTRFS_IOC_FS_INFO, which other file systems do not know (Linux, include/uapi/linux/btrfs.h)."""


def subvolume_of(path: Path) -> Path | None:
    """The root of the subvolume in which a file lies; None where that is no btrfs."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(descriptor, _IOC_FS_INFO, bytearray(1024))
        finally:
            os.close(descriptor)
        return next((folder for folder in path.resolve().parents if folder.stat().st_ino == _SUBVOLUME_INODE), None)
    except (OSError, ValueError):
        return None


def is_subvolume(path: Path) -> bool:
    """Whether a subvolume lies there; a folder that only has its place, as in snapshots of what holds it, is none."""
    try:
        return not path.is_symlink() and path.stat().st_ino == _SUBVOLUME_INODE
    except OSError:
        return False


def btrfs(*words: str, timeout_seconds: float) -> None:
    """Run the command.

    :raises SnapshotError: it failed, is not there, or took too long
    """
    what = f"btrfs {' '.join(words)}"
    try:
        subprocess.run(
            ["btrfs", *words],
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_seconds,
        )
    except FileNotFoundError:
        raise SnapshotError("there is no command btrfs", cure="apt-get install btrfs-progs") from None
    except subprocess.TimeoutExpired:
        raise SnapshotError(f"{what}: not done within {timeout_seconds:g} s") from None
    except subprocess.CalledProcessError as e:
        why = (e.stderr.strip().splitlines() or [f"status {e.returncode}"])[-1]
        raise SnapshotError(f"{what}: {why}") from e
