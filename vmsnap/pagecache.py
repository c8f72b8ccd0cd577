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
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ctypes

RWF_DONTCACHE: Final = 0x80
"""A flag of pwritev2(2) since Linux 6.14, from its ``include/uapi/linux/fs.h``."""

_SYS_CACHESTAT: Final = 451
"""The number of cachestat(2) on every architecture, since Linux 6.5."""
# A block of a source, or a usual part of a pack, in one read.
_DIRECT_BYTES = 9 << 20
_PAGE_BYTES = mmap.PAGESIZE
_HUGE_PAGE_BYTES = 2 << 20
_UNABLE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class QuietReader:
    """Reads an open file, or block device, and leaves the page cache as it was. Several threads may use it at once."""

    def __init__(self, fd: int) -> None:
        """Tell the kernel not to read ahead on this descriptor. It stays the caller's to close, after `close`."""
        self._fd = fd
        self._direct: int | None = None  # -1: cannot be had
        self._opened: list[int] = []
        self._opening = threading.Lock()
        _advise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read as `os.preadv` does: some bytes from `offset`, none at the end of the file. Blocks.

        :raises OSError: reading failed
        """
        begin = offset // _PAGE_BYTES * _PAGE_BYTES
        buffer = buffer[: begin + _DIRECT_BYTES - offset]
        end = offset + len(buffer)
        cached = _cached_pages(self._fd, begin, end - begin)
        if not cached.startswith(b"\0"):
            stop = cached.find(0)
            return os.preadv(self._fd, [buffer if stop < 0 else buffer[: begin + stop * _PAGE_BYTES - offset]], offset)
        # Direct reading leaves alone what is cached in between, so one read brings all that is not.
        end = min(end, begin + (cached.rfind(0) + 1) * _PAGE_BYTES)
        buffer = buffer[: end - offset]
        direct = self._opened_direct()
        if direct >= 0:
            if offset == begin and len(buffer) % _PAGE_BYTES == 0 and _begins_at_a_page(buffer):
                aligned = buffer
            else:
                aligned = _aligned_buffer()[: -(-(end - begin) // _PAGE_BYTES) * _PAGE_BYTES]
            try:
                count = os.preadv(direct, [aligned], begin) - (offset - begin)
            except OSError as e:
                if e.errno not in _UNABLE:
                    raise
                self._give_up_direct()
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
        buffer = _aligned_buffer()
        pieces = []
        at, end = offset, offset + length
        while at < end:
            begin = at // _PAGE_BYTES * _PAGE_BYTES
            whole_pages = -(-(end - begin) // _PAGE_BYTES) * _PAGE_BYTES
            stop = min(begin + self.read_into(buffer[:whole_pages], begin), end)
            if stop <= at:
                break
            pieces.append(bytes(buffer[at - begin : stop - begin]))
            at = stop
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Close what `read_into` opened; idempotent. No other call may be running."""
        with self._opening:
            for fd in self._opened:
                os.close(fd)
            self._opened.clear()
            self._direct = None

    def _opened_direct(self) -> int:
        with self._opening:
            if self._direct is None:
                self._direct = _open_direct(self._fd)
                if self._direct >= 0:
                    self._opened.append(self._direct)
            return self._direct

    def _give_up_direct(self) -> None:
        # Others may be reading by it: it is closed at the end.
        with self._opening:
            self._direct = -1


def _open_direct(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:  # the file system cannot, there is no /proc, or the file may not be opened again
        return -1


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


def direct_buffer(size_bytes: int) -> memoryview:
    """Memory that a disk is best read into: at the begin of a page, as direct I/O wants it, and in huge pages where the
    kernel has them. A block of 4 MiB in small pages is a thousand pieces, which become several requests to the disk; in
    huge ones it is two, and one request. That made reading up to twice as fast.

    It is let go of with the last view of it. A process that is forked meanwhile does not get it: were a page shared
    when the disk writes to it, either process could end up with the other's copy (open(2), on O_DIRECT and fork).
    """
    memory = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -_address(memoryview(memory)) % _HUGE_PAGE_BYTES
    return memoryview(memory)[begin : begin + size_bytes]


class _Buffers(threading.local):
    """One buffer a thread, used again and again: new memory costs as much time as the reading."""

    def __init__(self) -> None:
        self.memory: memoryview | None = None

    def forget(self) -> None:
        self.memory = None


_buffers = _Buffers()
# A forked child has the address, and no memory there.
os.register_at_fork(after_in_child=_buffers.forget)


def _aligned_buffer() -> memoryview:
    if _buffers.memory is None:
        _buffers.memory = direct_buffer(_DIRECT_BYTES + _PAGE_BYTES)
    return _buffers.memory


def _begins_at_a_page(buffer: memoryview) -> bool:
    return _address(buffer) % _PAGE_BYTES == 0


def _address(buffer: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


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
        yield at * _PAGE_BYTES, (end - at) * _PAGE_BYTES
        at = cached.find(0, end)


def _cached_pages(fd: int, offset: int, length: int) -> bytes:
    """A byte a page: 1 for those that are cached, as mincore(2) says; empty where it does not say."""
    import ctypes

    if length <= 0:
        return b""
    libc = _libc()
    count = -(-length // _PAGE_BYTES)
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
