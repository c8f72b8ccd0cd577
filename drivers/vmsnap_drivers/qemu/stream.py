"""Takes a machine's memory and device state out of QEMU's migration stream, while the stream comes in.

Works on the streams of copy on write (``background-snapshot``) and of pre-copy, QEMU 7.2 and 10.0: the pages go into
RAM images (:mod:`~vmsnap_drivers.qemu.ram_image`), everything after the last ram section into a file, untouched.

Measured by ``benchmarks/stream.py`` (one thread of a 2-core Xeon VM, from a file, images on tmpfs, 1 GiB of RAM)::

    mix                   stream GB/s   RAM GB/s
    pages only                    1.9        1.9
    runs of 1 to 2000             1.7        3.4
    runs of 1 to 10               1.4        2.8
    alternating                   1.1        2.2
    1 page in 20                  0.2        3.3
    zeros only                   0.25        110

Copying into the kernel and out of it takes most of that: ``pwrite`` of new pages alone does 3.2 GB/s on this machine.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmsnap_drivers.qemu.ram_image import RamImage, image_path
from vmsnap_drivers.qemu.ram_records import PAGE_AGAIN, ZERO_AGAIN, RecordMover, refused_flags
from vmsnap_drivers.qemu.stream_buffer import StreamBuffer
from vmsnap_drivers.qemu.stream_format import (
    COMMAND_SWITCHOVER_START,
    DEFAULT_PAGE_BYTES,
    FLAG_EOS,
    FLAG_MEM_SIZE,
    FLAG_PAGE,
    FLAG_ZERO,
    RAM_SECTION_NAME,
    RAM_SECTION_VERSION,
    SECTION_COMMAND,
    SECTION_END,
    SECTION_EOF,
    SECTION_FOOTER,
    SECTION_FULL,
    SECTION_PART,
    SECTION_START,
    WORD_BYTES,
    ZERO_RECORD_BYTES,
    CapturedMemory,
    RamBlock,
    RamSection,
    StreamError,
    check_blocks,
    check_device_state_end,
)
from vmsnap_drivers.qemu.stream_preamble import read_preamble

DEVICE_STATE_NAME: Final = "device-state"
BUFFER_BYTES: Final = 2 * 1024 * 1024
SMALLEST_BUFFER_BYTES: Final = 128 * 1024
"""Room for a record of the largest page size (64 KiB) and the longest command (64 KiB)."""

MAX_RAM_BYTES: Final = 4 * 1024**4
MAX_DEVICE_STATE_BYTES: Final = 64 * 1024**2
MAX_BLOCKS: Final = 4096


class MigrationStreamReader:
    """Reads one stream from its header to its end. Use it once.

    Memory taken: the buffer, as much again while records are moved, and one byte per page of RAM.

    :param fd: where the stream comes from: a pipe, a UNIX socket, or a regular file at its offset. It is not closed.
        The end of a pipe or socket is seen only when every copy of its other end is closed, the caller's too.
    :param folder: an existing folder, best on a tmpfs, for the RAM images and the device state (files of mode 0600)
    :param buffer_bytes: size of the buffer, at least 128 KiB
    :param max_ram_bytes: refuse a stream that says it has more RAM
    :param max_device_state_bytes: refuse a stream with a longer device state
    :param stall_timeout_seconds: give up when nothing comes for that long; ``None`` waits for ever
    :param on_progress: called after each read with the number of bytes read so far, in the reading thread
    :raises ValueError: when the buffer is too small
    """

    def __init__(
        self,
        fd: int,
        folder: Path,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        max_ram_bytes: int = MAX_RAM_BYTES,
        max_device_state_bytes: int = MAX_DEVICE_STATE_BYTES,
        stall_timeout_seconds: float | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        if buffer_bytes < SMALLEST_BUFFER_BYTES:
            raise ValueError(f"the buffer needs {SMALLEST_BUFFER_BYTES} bytes or more")
        self._source = StreamBuffer(
            fd, buffer_bytes=buffer_bytes, stall_timeout_seconds=stall_timeout_seconds, on_progress=on_progress
        )
        self._folder = folder
        self._max_ram_bytes = max_ram_bytes
        self._max_device_state_bytes = max_device_state_bytes
        self._page_bytes = DEFAULT_PAGE_BYTES
        self._images: dict[str, RamImage] = {}
        self._current: RamImage | None = None
        self._made: list[Path] = []
        self.absent_pages = 0

    absent_pages: int
    """After :meth:`run`: pages that the stream never mentioned, and that read as zeros. Not 0 only where the guest gave
    pages away by a balloon with free page hints."""

    @property
    def read_bytes(self) -> int:
        """Bytes of the stream read so far."""
        return self._source.read_bytes

    def run(self) -> CapturedMemory:
        """Read the whole stream, blocking until its end.

        After a failure no file of it is left in the folder.

        :raises StreamError: when the stream is damaged, ends early, stalls, or has something in it that cannot be
            taken (another device that sends its state in parts, multifd, compression, postcopy, …), or when an image
            cannot be written
        """
        try:
            with contextlib.ExitStack() as stack:
                return self._run(stack)
        except BaseException:
            for path in self._made:
                path.unlink(missing_ok=True)
            raise

    def _run(self, stack: contextlib.ExitStack) -> CapturedMemory:
        source = self._source
        preamble = read_preamble(source)
        self._page_bytes = preamble.page_bytes
        section = self._read_start(stack)
        records = RecordMover(source, self._page_bytes)
        self._read_records(records)
        self._read_footer(section)
        ended = False
        while (kind := source.peek()) in (SECTION_START, SECTION_PART, SECTION_END, SECTION_COMMAND):
            source.take(1)
            if kind == SECTION_COMMAND:
                self._read_command()
                continue
            section_id = source.take_number(4)
            if kind == SECTION_START:
                raise self._refused_device()
            if section_id != section.section_id or ended:
                raise StreamError(f"a part of section {section_id} should not be there, before byte {source.position}")
            self._read_records(records)
            self._read_footer(section)
            ended = kind == SECTION_END
        if kind not in (SECTION_FULL, SECTION_EOF):
            raise StreamError(f"no section can begin with {kind:#04x}, as at byte {source.position} of the stream")
        device_state = self._read_device_state()
        self.absent_pages = sum(image.absent_pages for image in self._images.values())
        return CapturedMemory(
            blocks=tuple(image.block for image in self._images.values()),
            page_bytes=self._page_bytes,
            preamble=preamble.content,
            ram_section=section,
            device_state=device_state,
        )

    def _read_start(self, stack: contextlib.ExitStack) -> RamSection:
        source = self._source
        while (kind := source.take_number(1)) == SECTION_COMMAND:
            self._read_command()
        if kind not in (SECTION_START, SECTION_FULL):
            raise StreamError(f"the ram section should begin at byte {source.position - 1}, not a section {kind:#04x}")
        section_id = source.take_number(4)
        name = source.take_text(source.take_number(1), "the name of a section")
        instance_id = source.take_number(4)
        version = source.take_number(4)
        if kind == SECTION_FULL or name != RAM_SECTION_NAME:
            raise self._refused(name)
        if version != RAM_SECTION_VERSION:
            raise StreamError(f"the ram section has version {version}; only {RAM_SECTION_VERSION} is known")
        self._read_blocks(stack)
        return RamSection(section_id, instance_id, version)

    def _read_blocks(self, stack: contextlib.ExitStack) -> None:
        source = self._source
        word = source.take_number(WORD_BYTES)
        flags = word & (self._page_bytes - 1)
        if flags != FLAG_MEM_SIZE:
            raise StreamError(f"the ram section begins with flags {flags:#x} instead of the list of RAM blocks")
        total_bytes = left_bytes = word - flags
        if total_bytes > self._max_ram_bytes:
            raise StreamError(f"the stream has {total_bytes} bytes of RAM; {self._max_ram_bytes} are allowed")
        blocks: list[RamBlock] = []
        while left_bytes:
            name = source.take_text(source.take_number(1), "the name of a RAM block")
            block = RamBlock(name, source.take_number(8))
            if block.length_bytes > left_bytes or len(blocks) == MAX_BLOCKS:
                raise StreamError(f"the RAM blocks of the stream are not {total_bytes} bytes together")
            blocks.append(block)
            check_blocks((block,), self._page_bytes)
            left_bytes -= block.length_bytes
        check_blocks(tuple(blocks), self._page_bytes)
        for index, block in enumerate(blocks):
            path = image_path(self._folder, index, block.name)
            self._images[block.name] = stack.enter_context(RamImage(path, block, self._page_bytes))
            self._made.append(path)

    def _read_records(self, records: RecordMover) -> None:
        """Read page records up to and including the end of this section's content."""
        source = self._source
        mask = self._page_bytes - 1
        while True:
            if self._current is not None:
                records.move(self._current)
            source.need(WORD_BYTES)
            word = int.from_bytes(source.unread()[:WORD_BYTES], "big")
            flags = word & mask
            if flags == FLAG_EOS:
                source.begin += WORD_BYTES
                return
            if flags in (PAGE_AGAIN, ZERO_AGAIN) and self._current is not None:
                source.need(WORD_BYTES + self._page_bytes if flags & FLAG_PAGE else ZERO_RECORD_BYTES)
            elif flags in (FLAG_PAGE, FLAG_ZERO):
                source.begin += WORD_BYTES
                self._read_named_record(word - flags, flags)
            else:
                raise refused_flags(flags, source.position)

    def _read_named_record(self, address: int, flags: int) -> None:
        source = self._source
        name = source.take_text(source.take_number(1), "the name of a RAM block")
        image = self._images.get(name)
        if image is None:
            raise StreamError(f"a page before byte {source.position} is of the unknown RAM block {name!r:.80}")
        number = address // self._page_bytes
        if number >= image.page_count:
            raise StreamError(f"the stream has a page at address {address:#x}, beyond the block {name!r:.80}")
        if flags == FLAG_PAGE:
            image.write_page(number, memoryview(source.take(self._page_bytes)))
        elif source.take_number(1) == 0:
            image.zero_page(number)
        else:
            raise StreamError(f"the record before byte {source.position} of the stream fills a page with non-zeros")
        self._current = image

    def _read_footer(self, section: RamSection) -> None:
        source = self._source
        footer = source.take_number(1)
        section_id = source.take_number(4)
        if footer != SECTION_FOOTER or section_id != section.section_id:
            raise StreamError(f"the ram section does not end properly at byte {source.position} of the stream")

    def _read_command(self) -> None:
        source = self._source
        command = source.take_number(2)
        source.take(source.take_number(2))
        # QEMU 10.0 marks the switch-over, for VFIO devices only (MIG_CMD_SWITCHOVER_START); loading works without it.
        if command != COMMAND_SWITCHOVER_START:
            raise StreamError(
                f"the stream has the command {command}, which needs an answer or another channel",
                cure="turn the migration capabilities return-path, postcopy-ram and x-colo off",
            )

    def _refused_device(self) -> StreamError:
        source = self._source
        return self._refused(source.take_text(source.take_number(1), "the name of a section"))

    def _refused(self, name: str) -> StreamError:
        return StreamError(
            f"the device {name!r:.80} sends its state in parts or before the RAM, which cannot be captured",
            cure="remove the device, or turn off the migration capability that makes it do so",
        )

    def _read_device_state(self) -> Path:
        path = self._folder / DEVICE_STATE_NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._made.append(path)
            try:
                self._copy_to_end(fd)
                with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as state:
                    check_device_state_end(state, self._page_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            raise StreamError(f"cannot keep the device state in {path}: {error.strerror}") from error
        return path

    def _copy_to_end(self, fd: int) -> None:
        source = self._source
        kept_bytes = 0
        while source.begin < source.end or source.fill():
            unread = source.unread()
            kept_bytes += len(unread)
            if kept_bytes > self._max_device_state_bytes:
                raise StreamError(f"the device state is longer than {self._max_device_state_bytes} bytes")
            while unread:
                unread = unread[os.write(fd, unread) :]
            source.begin = source.end
