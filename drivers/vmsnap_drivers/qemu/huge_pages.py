"""Brings a QEMU's guest RAM back into huge pages, from outside and while it runs.

Protecting memory costs by the mapped page, and a capture by copy on write leaves the RAM in pages of 4 KiB: the
protection of one of them splits the huge page that it lies in. ``process_madvise(MADV_COLLAPSE)`` (Linux 6.1;
``madvise(2)``, ``mm/khugepaged.c``) puts them together again, by copying 2 MiB at a time; it needs CAP_SYS_NICE.

Only what is full, or nearly, is put together: a block with few pages in it would take 2 MiB of the host instead. The
page of zeros that stands for memory that was only ever read counts as nothing; it is known by its number in
``/proc/PID/pagemap`` (``Documentation/admin-guide/mm/pagemap.rst``), which is shown to CAP_SYS_ADMIN alone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from vmsnap.errors import VmGone
from vmsnap_drivers.qemu.peer import RAM_AT_LEAST_BYTES, Mapping, mappings

HUGE_BYTES: Final = 2 * 1024 * 1024
_PAGE_BYTES: Final = 4096
_FULL_PAGES: Final = 384
"""Of the 512 pages of a block, so that RAM grows by a third at most."""
_PIECE_BYTES: Final = 16 * HUGE_BYTES
"""What one call is asked for: some 10 ms, so that a time limit is kept."""
_LOOK_AT_BYTES: Final = 2 * 1024 * 1024 * 1024
_FAILURES_IN_A_ROW: Final = 4

_PROCESS_MADVISE: Final = 440
_MADV_COLLAPSE: Final = 25
_PRESENT: Final = np.uint64(1 << 63)
_PFN: Final = np.uint64((1 << 55) - 1)
_TRANSIENT: Final = (errno.ENOMEM, errno.EAGAIN, errno.EBUSY)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True)
class Survey:
    """A QEMU's guest RAM as the processor maps it.

    :ivar small_bytes: in pages of 4 KiB
    :ivar huge_bytes: in huge pages
    :ivar ranges: (address, length) of what is full enough to be in huge pages, some of it so already
    :ivar why_not: why nothing can be put together; empty where it can
    """

    small_bytes: int
    huge_bytes: int
    ranges: Sequence[tuple[int, int]]
    why_not: str = ""

    @property
    def collapsible_bytes(self) -> int:
        """About how much of what is in small pages can be put together."""
        return max(0, min(self.small_bytes, sum(length for _, length in self.ranges) - self.huge_bytes))


@dataclass(frozen=True)
class Collapsed:
    """What came of `collapse`: how much is in small and in huge pages now, and why it is not more where it was ended
    early.
    """

    small_bytes: int
    huge_bytes: int
    seconds: float
    why_not: str = ""


def survey(pid: int) -> Survey:
    """Look at the large private anonymous mappings of a process. About 10 ms a GiB.

    :raises VmGone: it has ended
    """
    found = [mapping for mapping in mappings(pid) if mapping.size_bytes >= RAM_AT_LEAST_BYTES]
    small, huge = sum(m.small_bytes for m in found), sum(m.huge_bytes for m in found)
    if os.geteuid() != 0:
        return Survey(small, huge, (), "only root may put another process's pages together")
    ranges: list[tuple[int, int]] = []
    try:
        zero_page = _number_of_the_zero_page()
        with Path("/proc", str(pid), "pagemap").open("rb", buffering=0) as pagemap:
            for mapping in found:
                if mapping.is_private_data and mapping.small_bytes >= HUGE_BYTES:
                    ranges += _full_ranges(pagemap.fileno(), mapping, zero_page)
    except (FileNotFoundError, ProcessLookupError) as e:
        raise VmGone(f"the QEMU process {pid} has ended") from e
    except OSError as e:
        return Survey(small, huge, (), f"its pages cannot be looked at: {e.strerror}")
    # Counted over all large mappings above, so huge pages outside of the ranges make the estimate a low one.
    return Survey(small, huge, tuple(ranges))


def collapse(pid: int, found: Survey, limit_seconds: float) -> Collapsed:
    """Put the pages of `found` together; 0.3 s a GiB. Blocks, `limit_seconds` at most. The process goes on meanwhile.

    :raises VmGone: it has ended
    """
    begun = time.monotonic()
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError as e:
        raise VmGone(f"the QEMU process {pid} has ended") from e
    try:
        why_not = found.why_not or _collapse_pieces(process, found.ranges, begun + limit_seconds)
    finally:
        os.close(process)
    now = [mapping for mapping in mappings(pid) if mapping.size_bytes >= RAM_AT_LEAST_BYTES]
    seconds = time.monotonic() - begun
    return Collapsed(sum(m.small_bytes for m in now), sum(m.huge_bytes for m in now), seconds, why_not)


def _collapse_pieces(process: int, ranges: Sequence[tuple[int, int]], deadline: float) -> str:
    failed = 0
    for start, length in _pieces(ranges):
        if time.monotonic() > deadline:
            return "the time for it was over"
        vector = _Iovec(start, length)
        done = _libc.syscall(_PROCESS_MADVISE, process, ctypes.byref(vector), 1, _MADV_COLLAPSE, 0)
        if done >= 0:
            failed = 0
            continue
        code = ctypes.get_errno()
        failed += 1
        if code not in _TRANSIENT or failed == _FAILURES_IN_A_ROW:
            # ENOSYS, EINVAL: an older kernel. EPERM: a container. ENOMEM: the host's free memory is in small pieces.
            return f"the kernel says: {os.strerror(code)}"
    return ""


def _pieces(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, length in ranges:
        for offset in range(0, length, _PIECE_BYTES):
            yield start + offset, min(_PIECE_BYTES, length - offset)


def _full_ranges(pagemap: int, mapping: Mapping, zero_page: int) -> Iterator[tuple[int, int]]:
    begin = -(-mapping.start // HUGE_BYTES) * HUGE_BYTES
    end = mapping.end // HUGE_BYTES * HUGE_BYTES
    for address in range(begin, end, _LOOK_AT_BYTES):
        pages = (min(end, address + _LOOK_AT_BYTES) - address) // _PAGE_BYTES
        entries = np.frombuffer(os.pread(pagemap, pages * 8, address // _PAGE_BYTES * 8), np.uint64)
        blocks = entries[: len(entries) // 512 * 512].reshape(-1, 512)
        numbers = blocks & _PFN
        is_data = ((blocks & _PRESENT) != 0) & (numbers != 0) & (numbers != np.uint64(zero_page))
        is_full = np.concatenate(([False], is_data.sum(axis=1) >= _FULL_PAGES, [False]))
        edges = np.flatnonzero(is_full[1:] != is_full[:-1]).reshape(-1, 2)
        for first, after in edges.tolist():
            yield address + first * HUGE_BYTES, (after - first) * HUGE_BYTES


def _number_of_the_zero_page() -> int:
    """Its page frame, seen where a page of our own was only read."""
    with mmap.mmap(-1, _PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page.read(1)
        # numpy knows the address of a buffer, also of one that may not be written.
        address = int(np.frombuffer(page, np.uint8).ctypes.data)
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            (entry,) = np.frombuffer(os.pread(pagemap.fileno(), 8, address // _PAGE_BYTES * 8), np.uint64)
    return int(entry & _PFN)
