"""The page records of a ram section, found and moved in bulk.

A record is a 64-bit word, page address and flags, then the page (flag PAGE) or one byte (flag ZERO); ``ram_save_page``
and ``save_zero_page`` in QEMU's ``migration/ram.c``, 7.2 and 10.0. Where a record begins is known only from the one
before, so the *runs* of records of one kind are found first: within a run the flags lie at a fixed stride (4104 or 9
bytes), and a strided slice of the buffer with ``lstrip`` counts them at C speed, about 0.4 µs a run whatever its
length. Then everything else is a handful of numpy calls per buffer, not per run or page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmsnap_drivers.qemu.ram_image import Pages, RamImage
from vmsnap_drivers.qemu.stream_buffer import StreamBuffer
from vmsnap_drivers.qemu.stream_format import (
    FLAG_CONTINUE,
    FLAG_PAGE,
    FLAG_ZERO,
    REFUSED_FLAGS,
    WORD_BYTES,
    ZERO_RECORD_BYTES,
    StreamError,
)

PAGE_AGAIN: Final = FLAG_PAGE | FLAG_CONTINUE
ZERO_AGAIN: Final = FLAG_ZERO | FLAG_CONTINUE

# Runs in real streams are mostly short or very long; a short one is counted by a short slice.
_FIRST_LOOK_RECORDS: Final = 16
# In bulk the first record costs 60 µs and each further one 0.1 to 1 µs, one by one each costs 2 to 4 µs. A background
# snapshot flushes every page by itself, so that a reader that keeps up sees a few at a time.
_FEW_RECORDS: Final = 16
_FLAGS_AT: Final = WORD_BYTES - 1


@dataclass(frozen=True)
class Runs:
    """Runs of records in a buffer, in order; run *i* has ``counts[i]`` records from byte ``begins[i]`` on.

    :ivar end: the first byte after the last run
    """

    begins: list[int]
    counts: list[int]
    are_pages: list[bool]
    end: int


def find_runs(data: bytearray, begin: int, end: int, page_bytes: int) -> Runs:
    """Find the runs of complete records without a block name from ``begin`` on.

    Stops at the first record of another kind, or that is not whole before ``end``. Looks only at the low byte of the
    flags, so :class:`RecordMover` checks the rest.
    """
    begins: list[int] = []
    counts: list[int] = []
    are_pages: list[bool] = []
    page_record_bytes = WORD_BYTES + page_bytes
    while end - begin >= ZERO_RECORD_BYTES:
        flags = data[begin + _FLAGS_AT]
        if flags == PAGE_AGAIN:
            stride = page_record_bytes
        elif flags == ZERO_AGAIN:
            stride = ZERO_RECORD_BYTES
        else:
            break
        whole = (end - begin) // stride
        if not whole:
            break
        count = 1
        # A look at the second record is cheaper than a slice, and where both kinds alternate it is often enough.
        if whole > 1 and data[begin + stride + _FLAGS_AT] == flags:
            same = bytes((flags,))
            looked = min(whole, _FIRST_LOOK_RECORDS)
            first = begin + _FLAGS_AT
            count = looked - len(data[first : first + looked * stride : stride].lstrip(same))
            if count == looked < whole:
                count = whole - len(data[first : first + whole * stride : stride].lstrip(same))
        begins.append(begin)
        counts.append(count)
        are_pages.append(stride == page_record_bytes)
        begin += count * stride
    return Runs(begins, counts, are_pages, begin)


def refused_flags(flags: int, position: int) -> StreamError:
    """The error for a record with these flags.

    :param position: where in the stream the record begins
    """
    if flags in (PAGE_AGAIN, ZERO_AGAIN):
        return StreamError(f"the first page of the stream, at byte {position}, names no RAM block")
    for flag, meaning in REFUSED_FLAGS.items():
        if flags & flag:
            return StreamError(
                f"the stream uses {meaning} (flags {flags:#x} at byte {position})",
                cure="turn that migration capability off",
            )
    return StreamError(f"the record at byte {position} of the stream has flags {flags:#x}, which have no meaning")


class RecordMover:
    """Moves the records of one stream's buffer into RAM images.

    :param source: the buffer that the records are in
    :param page_bytes: page size of the stream
    """

    def __init__(self, source: StreamBuffer, page_bytes: int) -> None:
        self._source = source
        self._page_bytes = page_bytes
        self._words = source.words_at_any_offset()
        self._pages = source.pages_at_any_offset(page_bytes)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(source.data, np.uint8)

    def move(self, image: RamImage) -> None:
        """Move all whole records without a block name that are unread in the buffer.

        :param image: image of the block that they belong to
        :raises StreamError: when a record is not as it must be, or the image cannot take it
        """
        source = self._source
        runs = find_runs(source.data, source.begin, source.end, self._page_bytes)
        if sum(runs.counts) > _FEW_RECORDS:
            self._move_many(runs, image)
        else:
            self._move_few(runs, image)
        source.begin = runs.end

    def _move_few(self, runs: Runs, image: RamImage) -> None:
        data, view = self._source.data, self._source.view
        mask = self._page_bytes - 1
        for begin, count, is_page in zip(runs.begins, runs.counts, runs.are_pages, strict=True):
            expected = PAGE_AGAIN if is_page else ZERO_AGAIN
            stride = WORD_BYTES + self._page_bytes if is_page else ZERO_RECORD_BYTES
            for position in range(begin, begin + count * stride, stride):
                word = int.from_bytes(data[position : position + WORD_BYTES], "big")
                number = word // self._page_bytes
                if word & mask != expected or number >= image.page_count:
                    raise self._bad_record(word, position, image)
                if is_page:
                    image.write_page(number, view[position + WORD_BYTES : position + stride])
                elif data[position + WORD_BYTES]:
                    raise self._bad_filling(position)
                else:
                    image.zero_page(number)

    def _move_many(self, runs: Runs, image: RamImage) -> None:
        counts = np.array(runs.counts)
        are_pages = np.array(runs.are_pages)
        strides = np.where(are_pages, WORD_BYTES + self._page_bytes, ZERO_RECORD_BYTES)
        total = int(counts.sum())
        # Record k of run i is at begins[i] + (k - records before the run) × strides[i].
        bases = np.array(runs.begins) - (np.cumsum(counts) - counts) * strides
        positions = np.repeat(bases, counts) + np.arange(total) * np.repeat(strides, counts)
        holds_page = np.repeat(are_pages, counts)

        words = self._words[positions]
        flags = words & np.uint64(self._page_bytes - 1)
        wrong = flags != np.where(holds_page, np.uint64(PAGE_AGAIN), np.uint64(ZERO_AGAIN))
        numbers = words // np.uint64(self._page_bytes)
        wrong |= numbers >= np.uint64(image.page_count)
        if wrong.any():
            first = int(wrong.argmax())
            raise self._bad_record(int(words[first]), int(positions[first]), image)
        filling = self._bytes[positions[~holds_page] + WORD_BYTES]
        if filling.any():
            raise self._bad_filling(int(positions[~holds_page][filling.argmax()]))

        numbers_signed: Pages = numbers.astype(np.int64)
        if total > 1 and not (np.diff(numbers_signed) > 0).all():
            # A page may be there more than once: the last record counts.
            last = total - 1 - np.unique(numbers_signed[::-1], return_index=True)[1]
            last.sort()
            positions, holds_page, numbers_signed = positions[last], holds_page[last], numbers_signed[last]
        if holds_page.any():
            image.write_pages(numbers_signed[holds_page], self._pages[positions[holds_page] + WORD_BYTES])
        if not holds_page.all():
            image.zero_pages(numbers_signed[~holds_page])

    def _offset(self, position: int) -> int:
        return self._source.position + position - self._source.begin

    def _bad_filling(self, position: int) -> StreamError:
        return StreamError(f"the record at byte {self._offset(position)} of the stream fills a page with non-zeros")

    def _bad_record(self, word: int, position: int, image: RamImage) -> StreamError:
        flags = word & (self._page_bytes - 1)
        if flags not in (PAGE_AGAIN, ZERO_AGAIN):
            return refused_flags(flags, self._offset(position))
        return StreamError(
            f"the record at byte {self._offset(position)} of the stream is for address {word - flags:#x}, beyond"
            f" the block {image.block.name!r}"
        )
