"""Writes a migration stream that makes QEMU load a captured machine again.

Blocks whose RAM the destination has already, because it maps their images (``memory-backend-file``), get no pages: the
incoming side does not ask for all pages (``ram_load_precopy``, ``migration/ram.c``, 7.2 and 10.0). What remains is the
small ROM and video blocks and the device state, so such a load takes milliseconds whatever the size of RAM.
"""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmsnap.model import RamImage
from vmsnap_drivers.qemu.ram_image import image_path, next_data, opened_image
from vmsnap_drivers.qemu.ram_records import PAGE_AGAIN, ZERO_AGAIN
from vmsnap_drivers.qemu.stream_format import (
    FLAG_CONTINUE,
    FLAG_EOS,
    FLAG_MEM_SIZE,
    RAM_SECTION_NAME,
    SECTION_END,
    SECTION_FOOTER,
    SECTION_START,
    WORD_BYTES,
    ZERO_RECORD_BYTES,
    CapturedMemory,
    RamBlock,
    StreamError,
)

_CHUNK_BYTES: Final = 1024 * 1024
_ZERO_PAGES_AT_ONCE: Final = 64 * 1024


def write_stream(fd: int, captured: CapturedMemory, images: Path, mapped: frozenset[str] = frozenset()) -> int:
    """Write the stream, blocking until QEMU has taken all of it. The descriptor is not closed.

    Pages of zeros are sent as such and not left out: the destination fills its ROM blocks by itself, maybe otherwise.

    :param fd: pipe, UNIX socket or file, blocking or not
    :param captured: what was captured; its device state is read from ``captured.device_state``
    :param images: folder of the RAM images; only those of blocks that are not in ``mapped`` are read
    :param mapped: names of blocks whose RAM the destination has already
    :return: number of bytes written
    :raises StreamError: when a name in ``mapped`` is no block, an image or the device state cannot be read, or the
        reader is gone
    """
    unknown = mapped - {block.name for block in captured.blocks}
    if unknown:
        raise StreamError(f"the captured machine has no RAM block {sorted(unknown)[0]!r}")
    out = _Output(fd)
    section = captured.ram_section
    section_id = section.section_id.to_bytes(4, "big")
    name = RAM_SECTION_NAME.encode()
    end_of_section = FLAG_EOS.to_bytes(WORD_BYTES, "big") + bytes((SECTION_FOOTER,)) + section_id
    out.write(captured.preamble)
    out.write(
        b"".join(
            (
                bytes((SECTION_START,)),
                section_id,
                bytes((len(name),)),
                name,
                section.instance_id.to_bytes(4, "big"),
                section.version.to_bytes(4, "big"),
                (captured.ram_bytes | FLAG_MEM_SIZE).to_bytes(WORD_BYTES, "big"),
                *(_named(block) + block.length_bytes.to_bytes(8, "big") for block in captured.blocks),
                end_of_section,
            )
        )
    )
    out.write(bytes((SECTION_END,)) + section_id)
    for index, block in enumerate(captured.blocks):
        if block.name not in mapped:
            _write_block(out, block, image_path(images, index, block.name), captured.page_bytes)
    out.write(end_of_section)
    _write_file(out, captured.device_state)
    return out.written_bytes


def gather_images(place: Path, images: Sequence[RamImage], blocks: Sequence[str], mapped: Collection[str] = ()) -> Path:
    """Make the folder `place`, in which the images of the blocks that are not mapped have the names that
    `write_stream` looks for; `blocks` are all of them, in the stream's order. It is the caller's to remove. On another
    file system than theirs they are copied: guest RAM, which belongs on no disk.
    """
    place.mkdir(mode=0o700)
    for image in images:
        if image.region not in mapped and image.region in blocks:
            target = image_path(place, blocks.index(image.region), image.region)
            try:
                target.hardlink_to(image.path)
            except OSError:
                shutil.copyfile(image.path, target)
    return place


def _named(block: RamBlock) -> bytes:
    name = block.name.encode("utf-8")
    return bytes((len(name),)) + name


def _write_block(out: _Output, block: RamBlock, path: Path, page_bytes: int) -> None:
    encoder = _RecordEncoder(page_bytes)
    page_count = block.length_bytes // page_bytes
    with opened_image(path, block) as fd:
        try:
            _write_first_record(out, block, os.pread(fd, page_bytes, 0))
            done = 1
            while done < page_count:
                data = min(page_count, next_data(fd, done * page_bytes, block.length_bytes) // page_bytes)
                for first in range(done, data, _ZERO_PAGES_AT_ONCE):
                    out.write(encoder.zero_records(first, min(_ZERO_PAGES_AT_ONCE, data - first)))
                count = min(encoder.pages_at_once, page_count - data)
                if count:
                    out.write(encoder.records(fd, data, count))
                done = data + count
        except OSError as error:
            raise StreamError(f"cannot read the RAM image {path}: {error.strerror}") from error


def _write_first_record(out: _Output, block: RamBlock, page: bytes) -> None:
    """The record of page 0, the one that names the block for all that follow."""
    if page.count(0) < len(page):
        out.write((PAGE_AGAIN & ~FLAG_CONTINUE).to_bytes(WORD_BYTES, "big") + _named(block) + page)
    else:
        out.write((ZERO_AGAIN & ~FLAG_CONTINUE).to_bytes(WORD_BYTES, "big") + _named(block) + b"\0")


class _RecordEncoder:
    """Makes page records in bulk, in buffers of its own; what it returns is valid until the next call."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self.pages_at_once = max(1, _CHUNK_BYTES // page_bytes)
        self._pages: npt.NDArray[np.uint8] = np.empty((self.pages_at_once, page_bytes), np.uint8)
        self._out = bytearray(self.pages_at_once * (WORD_BYTES + page_bytes) + page_bytes)
        # Overlapping items, one for each byte of the buffer, so that a record can begin at any.
        self._word_at: npt.NDArray[np.uint64] = np.ndarray((len(self._out) - 7,), ">u8", self._out, 0, (1,))
        self._page_at: npt.NDArray[Any] = np.ndarray(
            (len(self._out) - page_bytes + 1,), f"V{page_bytes}", self._out, 0, (1,)
        )
        self._byte_at: npt.NDArray[np.uint8] = np.frombuffer(self._out, np.uint8)

    def zero_records(self, first: int, count: int) -> memoryview:
        """Records of ``count`` zero pages from page ``first`` on."""
        records = np.zeros(count, np.dtype([("word", ">u8"), ("fill", "u1")]))
        addresses = np.arange(first, first + count, dtype=np.uint64) * np.uint64(self._page_bytes)
        records["word"] = addresses | np.uint64(ZERO_AGAIN)
        return memoryview(records.tobytes())

    def records(self, fd: int, first: int, count: int) -> memoryview:
        """Records of ``count`` pages of an image, at most ``pages_at_once``, from page ``first`` on.

        :raises OSError: when the image cannot be read
        """
        pages = self._pages[:count]
        content = pages.reshape(-1).data
        got = 0
        while got < len(content):
            read = os.preadv(fd, [content[got:]], first * self._page_bytes + got)
            if not read:
                raise OSError(0, "the file became shorter")
            got += read
        has_data = pages.view(np.uint64).any(axis=1)
        lengths = np.where(has_data, WORD_BYTES + self._page_bytes, ZERO_RECORD_BYTES)
        ends = np.cumsum(lengths)
        positions = ends - lengths
        addresses = np.arange(first, first + count, dtype=np.uint64) * np.uint64(self._page_bytes)
        self._word_at[positions] = addresses | np.where(has_data, np.uint64(PAGE_AGAIN), np.uint64(ZERO_AGAIN))
        self._byte_at[positions[~has_data] + WORD_BYTES] = 0
        self._page_at[positions[has_data] + WORD_BYTES] = pages.view(f"V{self._page_bytes}")[has_data, 0]
        return memoryview(self._out)[: int(ends[-1])]


class _Output:
    """Writes all of what it is given, however little the descriptor takes at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.written_bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        left = memoryview(content)
        while left:
            try:
                count = os.write(self._fd, left)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
                continue
            except OSError as error:
                raise StreamError(
                    f"the stream for loading broke off after {self.written_bytes} bytes: {error.strerror}"
                ) from error
            self.written_bytes += count
            left = left[count:]


def _write_file(out: _Output, path: Path) -> None:
    try:
        with path.open("rb") as file:
            while content := file.read(_CHUNK_BYTES):
                out.write(content)
    except OSError as error:
        raise StreamError(f"cannot read the device state {path}: {error.strerror}") from error
