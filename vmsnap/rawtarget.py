"""`RawTarget`: an existing raw image file or block device that a backup is written onto."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmsnap.errors import StorageError, StorageFull, UsageError
from vmsnap.imagelock import open_unused
from vmsnap.pagecache import QuietReader, forget, write_all
from vmsnap.roles import DiskWriter

if TYPE_CHECKING:
    import ctypes

_BLKZEROOUT: Final = 0x127F
_KEEP_SIZE_PUNCH_HOLE: Final = 0x01 | 0x02
_UNABLE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
_ZEROS: Final = bytes(1 << 20)


class RawTarget(DiskWriter):
    """A raw file or block device. The host's page cache keeps nothing of it."""

    def __init__(self, path: Path) -> None:
        """Open the disk; changes nothing.

        :raises NotFound: there is none
        :raises UsageError: it is neither a file nor a block device
        :raises Busy: somebody uses it
        """
        self.label = self.address = str(path)
        self._fd = open_unused(path)
        self._is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self.size_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        self._reader = QuietReader(self._fd)

    def fit(self, size_bytes: int) -> None:
        """Give a file that size; see that a block device has it.

        :raises UsageError: the block device is smaller
        """
        if self.size_bytes == size_bytes:
            return
        if self._is_file:
            try:
                os.ftruncate(self._fd, size_bytes)
            except OSError as e:
                raise self._error(e) from e
            self.size_bytes = size_bytes
        elif self.size_bytes < size_bytes:
            raise UsageError(
                f"{self.label} has {self.size_bytes} bytes, the disk in the backup {size_bytes}",
                cure="choose a device that is as large, at least",
            )

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length of what may be something else than zeros; of a block device everything."""
        end = offset + length
        while offset < end and self._is_file:
            data = min(self._seek(offset, os.SEEK_DATA, end), end)
            offset = min(self._seek(data, os.SEEK_HOLE, end), end) if data < end else end
            if offset > data:
                yield data, offset - data
        if offset < end:
            yield offset, end - offset

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Blocks.

        :raises StorageError: it cannot be read
        """
        at = 0
        while at < len(buffer):
            try:
                count = self._reader.read_into(buffer[at:], offset + at)
            except OSError as e:
                raise StorageError(f"cannot read {self.label}: {e.strerror}") from e
            if not count:
                raise StorageError(f"cannot read {self.label}: it became shorter")
            at += count

    def write(self, offset: int, contents: Sequence[bytes | memoryview]) -> None:
        """Write `contents`, one after the other, from `offset` on. Blocks.

        :raises StorageFull: no room
        :raises StorageError: it cannot be written
        """
        try:
            write_all(self._fd, contents, offset)
        except OSError as e:
            raise self._error(e) from e

    def write_zeros(self, offset: int, length: int) -> None:
        """Make zeros of a range; of a file, a hole where the file system can. Blocks.

        :raises StorageError: it cannot be written
        """
        try:
            if _punch_hole(self._fd, offset, length) or (not self._is_file and _zero_out(self._fd, offset, length)):
                return
            for at in range(0, length, len(_ZEROS)):
                write_all(self._fd, [memoryview(_ZEROS)[: length - at]], offset + at)
        except OSError as e:
            raise self._error(e) from e

    def flush(self) -> None:
        """Return when everything written is durable. Blocks.

        :raises StorageError: it could not be written
        """
        try:
            os.fsync(self._fd)
            forget(self._fd)
        except OSError as e:
            raise self._error(e) from e

    def close(self) -> None:
        """Let go of it; idempotent. Not while another thread uses it."""
        if self._fd >= 0:
            self._reader.close()
            os.close(self._fd)
            self._fd = -1

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole follows
                return end
            raise StorageError(f"cannot read {self.label}: {e.strerror}") from e

    def _error(self, error: OSError) -> StorageError:
        what = f"cannot write {self.label}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return StorageFull(what, cure="free some room")
        return StorageError(what)


def _punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make a hole, which reads as zeros, in a file or a block device; False where that cannot be done."""
    import ctypes

    if _libc().fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number))


def _zero_out(fd: int, offset: int, length: int) -> bool:
    """Have the block device write zeros; False where it cannot, or not for so small a range."""
    try:
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
    except OSError as e:
        if e.errno not in _UNABLE:
            raise
        return False
    return True


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    return libc
