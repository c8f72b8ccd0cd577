"""Disks that nobody uses: opened so that nobody else can use them meanwhile, or refused.

QEMU says what it does to an image by locks on single bytes of the file (``block/file-posix.c``): byte 100 + n is
locked by those who use permission n, byte 200 + n by those who do not share it. Here the same is done, so that no QEMU
starts on a disk that is being written, and none that runs is overlooked. What the kernel uses itself (mounted, part of
a RAID, mapped) it refuses to open exclusively; files behind loop devices are looked up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final

from vmsnap.errors import Busy, NotFound, StorageError, UsageError

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_USED: Final = 100
_UNSHARED: Final = 200
_PERMISSIONS: Final = 4
"""Consistent read, write, write unchanged, resize: QEMU's numbers 0 to 3."""
_LOOP_FILES: Final = "/sys/block"


def open_unused(path: Path) -> int:
    """Open a disk, a plain file or a block device, for reading and writing; nobody else uses it until it is closed.

    :raises NotFound: there is none
    :raises UsageError: it is neither a file nor a block device
    :raises Busy: somebody uses it
    :raises StorageError: it cannot be opened
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFound(f"there is no {path}", cure="vmsnap export --output makes new files") from e
    except OSError as e:
        raise StorageError(f"cannot look at {path}: {e.strerror}") from e
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise UsageError(f"{path} is neither a file nor a block device", cure="name a disk")
    exclusive = os.O_EXCL if stat.S_ISBLK(mode) else 0
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise Busy(f"{path} is in use", cure="unmount it, or stop what uses it") from e
        raise StorageError(f"cannot open {path}: {e.strerror}") from e
    try:
        refuse_loop_file(path)
        _lock(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_loop_file(path: Path) -> None:
    """Refuse a file that the kernel uses as a block device.

    :raises Busy: it does
    """
    for note in Path(_LOOP_FILES).glob("loop*/loop/backing_file"):
        try:
            used = Path(note.read_text().rstrip("\n")).samefile(path)
        except OSError:  # detached meanwhile, or its file was removed
            continue
        if used:
            device = note.parent.parent.name
            raise Busy(f"{path} is in use: it lies behind /dev/{device}", cure=f"losetup -d /dev/{device}")


def _lock(fd: int, path: Path) -> None:
    """Take the locks first and look then, as QEMU does: of two that begin at once, at least one sees the other."""
    try:
        for base in (_USED, _UNSHARED):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, base, _PERMISSIONS, 0))
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, base, _PERMISSIONS, 0))
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                raise Busy(f"{path} is in use: QEMU or one of its tools holds it", cure="stop the VM first")
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise Busy(f"{path} is in use: somebody has locked it", cure="stop the VM first") from e
        raise StorageError(f"{path} cannot be locked against use by QEMU: {e.strerror}") from e
