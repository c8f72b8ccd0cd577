"""Handles of files, as NFS servers give them: they name a file by its object and generation, in ZFS as elsewhere."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

_MOST_BYTES: Final = 128
"""``MAX_HANDLE_SZ`` of Linux' ``include/uapi/linux/fcntl.h``."""
_AT_FDCWD: Final = -100


def handle_of(path: str) -> str:
    """The handle of a file (name_to_handle_at(2)), in hexadecimal digits: the same through every mount of the same
    content, another one for a file that was made anew under the same name or number.

    :raises OSError: it is not there, or its file system gives no handles
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(struct.pack("<Ii", _MOST_BYTES, 0), 8 + _MOST_BYTES)
    mount = ctypes.c_int()
    if libc.name_to_handle_at(_AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(mount), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    length, _ = struct.unpack_from("<Ii", buffer.raw)
    return buffer.raw[: 8 + length].hex()
