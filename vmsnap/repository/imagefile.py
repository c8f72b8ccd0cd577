"""An image of a backup as a file object of Python's."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vmsnap.roles.snapshot import DiskReader


class ImageFile(io.RawIOBase):
    """A disk, or RAM, to be read at any offset; closing it closes `reader`. Used by one thread at a time.

    Reads raise what the reader raises, above all `DamageFound` and `StorageError`.
    """

    def __init__(self, reader: DiskReader) -> None:
        self._reader = reader
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The offset of the next read."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase.seek`; it may go behind the end, where nothing is read.

        :raises ValueError: an offset before the begin, or an unknown `whence`
        """
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"whence {whence} is not supported")
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._reader.size_bytes}[whence]
        if begin + offset < 0:
            raise ValueError(f"there is nothing at offset {begin + offset}")
        self._at = begin + offset
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        """See `io.RawIOBase.readinto`: all that fits, or what is left of the image. Blocks.

        :raises ValueError: it is closed
        """
        if self.closed:
            raise ValueError("I/O operation on closed file")
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._reader.size_bytes - self._at))
        if count:
            self._reader.read_into(self._at, view[:count])
        self._at += count
        return count

    def close(self) -> None:
        """Close it and its reader; idempotent."""
        if not self.closed:
            self._reader.close()
        super().close()
