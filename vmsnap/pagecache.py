"""Reading and writing files without changing what the host's page cache holds.

A backup touches every byte of a host's disks once. Read the usual way, that throws out of memory what guests and
services had there, for bytes that nobody will ask for again. Here what was cached stays cached, and what was not is
not there afterwards.

The kernel is asked what is cached (``cachestat``, ``mincore``): that is read from the cache, the rest straight from the
disk (``O_DIRECT``), which costs less time of the processor as well; where a file system cannot do that, it is read the
usual way and dropped (``POSIX_FADV_DONTNEED``). The kernel tells only those who own the file or may write it; for
others everything is read the usual way. What lives in memory anyway (tmpfs) stays there.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from vmsnap.directio import DIRECT_BYTES, PAGE_BYTES, DirectFile, aligned_buffer, aligned_pieces, begins_at_a_page

if TYPE_CHECKING:
    import ctypes

RWF_DONTCACHE: Final = 0x80
"""A flag of pwritev2(2) since Linux 6.14, from its ``include/uapi/linux/fs.h``."""

_SYS_CACHESTAT: Final = 451
"""The number of cachestat(2) on every architecture, since Linux 6.5."""
# What is shorter may as well be cached: it is read again soon, as a rule.
_DIRECT_LEAST_BYTES = 1 << 20
_UNABLE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class QuietReader:
    """Reads an open file, or block device, and leaves the page cache as it was. Several threads may use it at once."""

    def __init__(self, fd: int) -> None:
        """Tell the kernel not to read ahead on this descriptor. It stays the caller's to close, after `close`."""
        self._fd = fd
        self._direct = DirectFile(fd, os.O_RDONLY)
        _advise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read as `os.preadv` does: some bytes from `offset`, none at the end of the file. Blocks.

        :raises OSError: reading failed
        """
        begin = offset // PAGE_BYTES * PAGE_BYTES
        buffer = buffer[: begin + DIRECT_BYTES - offset]
        end = offset + len(buffer)
        cached = _cached_pages(self._fd, begin, end - begin)
        if not cached.startswith(b"\0"):
            stop = cached.find(0)
            return os.preadv(self._fd, [buffer if stop < 0 else buffer[: begin + stop * PAGE_BYTES - offset]], offset)
        # Direct reading leaves alone what is cached in between, so one read brings all that is not.
        end = min(end, begin + (cached.rfind(0) + 1) * PAGE_BYTES)
        buffer = buffer[: end - offset]
        direct = self._direct.descriptor()
        if direct >= 0:
            if offset == begin and len(buffer) % PAGE_BYTES == 0 and begins_at_a_page(buffer):
                aligned = buffer
            else:
                aligned = aligned_buffer()[: -(-(end - begin) // PAGE_BYTES) * PAGE_BYTES]
            try:
                count = os.preadv(direct, [aligned], begin) - (offset - begin)
            except OSError as e:
                if e.errno not in _UNABLE:
                    raise
                self._direct.give_up()
            else:
                count = max(0, min(count, len(buffer)))
                if aligned is not buffer:
                    buffer[:count] = aligned[offset - begin : offset - begin + count]
                return count
        count = os.preadv(self._fd, [buffer], offset)
        for start, length in _runs_not_cached(cached):
            _advise(self._fd, begin + start, length, os.POSIX_FADV_DONTNEED)
        return count

    def read(self, offset: int, length: int) -> bytes:
        """Read a range; shorter where the file ends in it. Blocks.

        :raises OSError: reading failed
        """
        # By way of memory that is used again and again: reading into new memory, page by page, takes longer.
        buffer = aligned_buffer()
        pieces = []
        at, end = offset, offset + length
        while at < end:
            begin = at // PAGE_BYTES * PAGE_BYTES
            whole_pages = -(-(end - begin) // PAGE_BYTES) * PAGE_BYTES
            stop = min(begin + self.read_into(buffer[:whole_pages], begin), end)
            if stop <= at:
                break
            pieces.append(bytes(buffer[at - begin : stop - begin]))
            at = stop
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Close what `read_into` opened; idempotent. No other call may be running."""
        self._direct.close()


class QuietWriter:
    """Writes an open file, large pieces straight to the disk (``O_DIRECT``) where the file system can. Several threads
    may use it at once, each in pages of its own.
    """

    def __init__(self, fd: int) -> None:
        """The descriptor stays the caller's: to be synced, and to be closed after `close`."""
        self._fd = fd
        self._direct = DirectFile(fd, os.O_WRONLY)

    def write_all(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """Write buffers, one after the other, from `offset` on. Durable after ``fsync``. Blocks.

        :raises OSError: writing failed
        """
        if offset % PAGE_BYTES or sum(map(len, buffers)) < _DIRECT_LEAST_BYTES:
            write_all(self._fd, buffers, offset)
            return
        for piece in aligned_pieces(buffers):
            done = self._write_direct(piece[: len(piece) // PAGE_BYTES * PAGE_BYTES], offset)
            if done < len(piece):
                write_all(self._fd, [piece[done:]], offset + done)
            offset += len(piece)

    def close(self) -> None:
        """Close what `write_all` opened; idempotent. No other call may be running."""
        self._direct.close()

    def _write_direct(self, pages: memoryview, offset: int) -> int:
        """Write whole pages past the cache, and return how many bytes were; what is left is to be written as usual,
        which also tells why it could not.
        """
        done = 0
        while done < len(pages) and (direct := self._direct.descriptor()) >= 0:
            try:
                count = os.pwrite(direct, pages[done:], offset + done)
            except OSError as e:
                if e.errno not in _UNABLE:
                    raise
                self._direct.give_up()
                break
            done += count
            if count % PAGE_BYTES:
                break
        return done


def write(fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> int:
    """Write as `os.pwritev` does, and let the kernel begin at once to bring it to the disk, where it can. Blocks.

    `forget` afterwards drops what the kernel kept all the same.

    :raises OSError: writing failed
    """
    try:
        return os.pwritev(fd, buffers, offset, RWF_DONTCACHE)
    except OSError as e:
        if e.errno not in _UNABLE:
            raise
    return os.pwritev(fd, buffers, offset)


def write_all(fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
    """`write` until all is written.

    :raises OSError: writing failed
    """
    views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    at = 0
    while at < len(views):
        # The system takes 1024 buffers in one call at most.
        written = write(fd, views[at : at + 1024], offset)
        offset += written
        while at < len(views) and written >= len(views[at]):
            written -= len(views[at])
            at += 1
        if written:
            views[at] = views[at][written:]


def forget(fd: int, offset: int = 0, length: int = 0) -> None:
    """Drop from the cache what was written and is durable (after ``fsync``); `length` 0: to the end of the file."""
    _advise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def _advise(fd: int, offset: int, length: int, advice: int) -> None:
    try:
        os.posix_fadvise(fd, offset, length, advice)
    except OSError as e:
        # Pipes, and file systems that know no advice: then there is nothing to be done.
        if e.errno not in (errno.ESPIPE, *_UNABLE):
            raise


def _runs_not_cached(cached: bytes) -> Iterator[tuple[int, int]]:
    """Yield begin and length, in bytes, of the runs of pages that are not cached."""
    at = cached.find(0)
    while at >= 0:
        end = cached.find(1, at)
        end = len(cached) if end < 0 else end
        yield at * PAGE_BYTES, (end - at) * PAGE_BYTES
        at = cached.find(0, end)


def _cached_pages(fd: int, offset: int, length: int) -> bytes:
    """A byte a page: 1 for those that are cached, as mincore(2) says; empty where it does not say."""
    import ctypes

    if length <= 0:
        return b""
    libc = _libc()
    count = -(-length // PAGE_BYTES)
    # Most often all of it is cached, or nothing: that is quicker to learn, without a mapping.
    span, found = (ctypes.c_uint64 * 2)(offset, length), (ctypes.c_uint64 * 5)()
    if libc.syscall(_SYS_CACHESTAT, fd, span, found, 0) == 0 and found[0] in (0, count):
        return bytes(count) if not found[0] else b"\1" * count
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        return b""
    try:
        vector = ctypes.create_string_buffer(count)
        return vector.raw if libc.mincore(address, length, vector) == 0 else b""
    finally:
        libc.munmap(address, length)


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes

    size = ctypes.c_size_t
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    libc.mincore.argtypes = (ctypes.c_void_p, size, ctypes.c_char_p)
    return libc
