"""Direct I/O (``O_DIRECT``): the memory that it wants, and files opened for it."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

PAGE_BYTES: Final = mmap.PAGESIZE
"""Places in memory and in files are multiples of it: enough for every disk."""
DIRECT_BYTES: Final = 9 << 20
"""What `aligned_buffer` has room for, wherever in a page it begins: a block of a source, or a usual part of a pack."""
_HUGE_PAGE_BYTES = 2 << 20


class DirectFile:
    """An open file, opened once more for direct I/O when that is first asked for."""

    def __init__(self, fd: int, access: int) -> None:
        self._fd = fd
        self._access = access
        self._direct: int | None = None  # -1: cannot be had
        self._opened: list[int] = []
        self._opening = threading.Lock()

    def descriptor(self) -> int:
        """For direct I/O; -1 where the file system cannot, there is no /proc, or the file may not be opened again."""
        with self._opening:
            if self._direct is None:
                try:
                    flags = self._access | os.O_DIRECT | os.O_CLOEXEC
                    self._direct = os.open(f"/proc/self/fd/{self._fd}", flags)
                    self._opened.append(self._direct)
                except OSError:
                    self._direct = -1
            return self._direct

    def give_up(self) -> None:
        """Have no direct I/O from now on. Others may be at it: the descriptor is closed at the end."""
        with self._opening:
            self._direct = -1

    def close(self) -> None:
        """Close the descriptor; idempotent. Nobody may be using it."""
        with self._opening:
            for fd in self._opened:
                os.close(fd)
            self._opened.clear()
            self._direct = None


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


def aligned_buffer() -> memoryview:
    """This thread's memory for direct I/O, `DIRECT_BYTES` and a page; whoever asks next gets the same."""
    if _buffers.memory is None:
        _buffers.memory = direct_buffer(DIRECT_BYTES + PAGE_BYTES)
    return _buffers.memory


def aligned_pieces(buffers: Sequence[bytes | bytearray | memoryview]) -> Iterator[memoryview]:
    """The content of buffers as few long pieces that begin at a page of memory; all but the last are whole pages."""
    if len(buffers) == 1 and isinstance(buffers[0], memoryview) and begins_at_a_page(buffers[0]):
        yield buffers[0]
        return
    gathered, used = aligned_buffer(), 0
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        while len(rest):
            count = min(len(rest), len(gathered) - used)
            gathered[used : used + count] = rest[:count]
            rest, used = rest[count:], used + count
            if used == len(gathered):
                yield gathered
                used = 0
    if used:
        yield gathered[:used]


def begins_at_a_page(buffer: memoryview) -> bool:
    """Whether it can be read into by direct I/O; False also for what cannot be written to, and is not asked then."""
    return not buffer.readonly and _address(buffer) % PAGE_BYTES == 0


def _address(buffer: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
