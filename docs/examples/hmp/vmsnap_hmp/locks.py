"""Whether a disk is in use: QEMU locks the images that it has open (QEMU, block/file-posix.c)."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_GET_LOCK = 36
"""F_OFD_GETLK (Linux, include/uapi/asm-generic/fcntl.h)."""
_MAY_WRITE = 101
"""RAW_LOCK_PERM_BASE + BLK_PERM_WRITE's bit: locked by whoever may write to the image."""
_FLOCK = "hhqqi4x"


def is_written_by_somebody(image: Path) -> bool:
    """Whether a QEMU has it open for writing.

    :raises OSError: it cannot be opened
    """
    descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _MAY_WRITE, 1, 0)
        answer = fcntl.fcntl(descriptor, _GET_LOCK, asked)
        kind: int = struct.unpack(_FLOCK, answer)[0]
        return kind != fcntl.F_UNLCK
    finally:
        os.close(descriptor)
