"""Where the simulated guest keeps its things in RAM and on its disks, and how one reads them without asking it.

RAM: a header page, a log of the last counters, pages that are stamped in turn, and pages that were never touched.
Disk: a superblock, room for the log (used on disk 0 only), and record slots spread over the rest. Record N lies in
slot N modulo the number of slots, so that each disk tells which record came last.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PAGE = 4096
MAX_DISKS = 32
MIN_MEMORY_BYTES = 1 << 20
MIN_DISK_BYTES = 256 << 10

RAM_MAGIC = b"SIMGUEST"
RAM_HEADER = struct.Struct("<8s16sQQQI")
"""Magic, machine id, counter, cycles, entries in the log, number of disks."""
COUNTER = struct.Struct("<Q")
DEAF_OFFSET = 128
"""Not zero where the guest ignores its power button: a byte of RAM, so that what is captured is deaf too."""
STARTED_OFFSET = 256
COMPLETED_OFFSET = STARTED_OFFSET + 8 * MAX_DISKS
LOG_OFFSET = PAGE
LOG_PAGES = 8
LOG_ENTRIES = LOG_PAGES * PAGE // 8
FIRST_STAMPED_PAGE = 1 + LOG_PAGES
STAMP = struct.Struct("<QQ")
"""Page number, counter; at both ends of a stamped page."""

DISK_MAGIC = "vmsnap simulated disk"
LOG_BLOCK = 1
FIRST_SLOT_BLOCK = LOG_BLOCK + LOG_PAGES
MAX_SLOTS = 64
RECORD_MAGIC = b"RECORD\0\1"
RECORD = struct.Struct("<8s16sQ")
CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Superblock:
    """What block 0 of a disk says: whose it is, and whether the guest was shut down in order (at which counter, and
    with how many bytes of log).
    """

    machine: bytes
    clean: bool = False
    counter: int = 0
    log_bytes: int = 0


@dataclass(frozen=True)
class Slots:
    """The record slots of a disk of one size."""

    count: int
    stride_blocks: int

    @classmethod
    def of(cls, size_bytes: int) -> Slots:
        """The slots of a disk of `size_bytes`."""
        room = size_bytes // PAGE - FIRST_SLOT_BLOCK
        count = min(MAX_SLOTS, room)
        return cls(count, room // count)

    def offset(self, record: int) -> int:
        """Where record number `record` lies."""
        return (FIRST_SLOT_BLOCK + (record % self.count) * self.stride_blocks) * PAGE


def pack_superblock(superblock: Superblock) -> bytes:
    """Block 0 of a disk."""
    text = json.dumps(
        {
            "magic": DISK_MAGIC,
            "machine": superblock.machine.hex(),
            "clean": superblock.clean,
            "counter": superblock.counter,
            "log_bytes": superblock.log_bytes,
        }
    )
    return text.encode().ljust(PAGE, b"\0")


def unpack_superblock(block: bytes) -> Superblock | None:
    """What block 0 says; None when it is no superblock of ours."""
    try:
        text = json.loads(block.rstrip(b"\0"))
        if text["magic"] != DISK_MAGIC:
            return None
        return Superblock(bytes.fromhex(text["machine"]), text["clean"], text["counter"], text["log_bytes"])
    except (ValueError, KeyError, TypeError):
        return None


def pack_record(machine: bytes, number: int) -> bytes:
    """One record: a whole block, so that half of it written is seen."""
    body = RECORD.pack(RECORD_MAGIC, machine, number)
    body += COUNTER.pack(number) * ((PAGE - len(body) - CHECKSUM.size) // COUNTER.size)
    body = body.ljust(PAGE - CHECKSUM.size, b"\0")
    return body + CHECKSUM.pack(zlib.crc32(body))


def unpack_record(block: bytes, machine: bytes) -> int | None:
    """The number of the record in this block; None when it holds no whole record of that machine."""
    if len(block) != PAGE or not block.startswith(RECORD_MAGIC):
        return None
    _, owner, number = RECORD.unpack_from(block)
    (checksum,) = CHECKSUM.unpack_from(block, PAGE - CHECKSUM.size)
    if owner != machine or checksum != zlib.crc32(memoryview(block)[: -CHECKSUM.size]):
        return None
    return int(number)


def latest_record(read: Callable[[int, int], bytes], size_bytes: int, machine: bytes) -> int:
    """The highest record on a disk of which `read` gives so many bytes from an offset; 0 when there is none."""
    slots = Slots.of(size_bytes)
    found = (unpack_record(read(PAGE, slots.offset(slot)), machine) for slot in range(slots.count))
    return max((number for number in found if number is not None), default=0)


@dataclass(frozen=True)
class DiskContent:
    """What an image file of a simulated guest says by itself."""

    machine: bytes
    latest: int
    clean: bool
    counter: int
    log: tuple[int, ...]


def read_disk(path: Path) -> DiskContent | None:
    """Read an image file without asking any VM; None when it is not a simulated guest's disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        superblock = unpack_superblock(os.pread(descriptor, PAGE, 0))
        if superblock is None:
            return None
        log = os.pread(descriptor, superblock.log_bytes, LOG_BLOCK * PAGE)
        size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        latest = latest_record(partial(os.pread, descriptor), size_bytes, superblock.machine)
    finally:
        os.close(descriptor)
    entries = tuple(number for (number,) in COUNTER.iter_unpack(log))
    return DiskContent(superblock.machine, latest, superblock.clean, superblock.counter, entries)


@dataclass(frozen=True)
class RamContent:
    """What a RAM image of a simulated guest says by itself."""

    machine: bytes
    counter: int
    cycles: int
    completed: tuple[int, ...]
    wrong_pages: tuple[int, ...]


def stamped_pages(memory_bytes: int) -> int:
    """How many pages the guest stamps: half of its RAM, so that the other half stays untouched."""
    return memory_bytes // PAGE // 2 - FIRST_STAMPED_PAGE


def expected_stamp(page: int, counter: int, pages: int) -> int:
    """The counter that stamped page number `page` (of `pages`) last, when the guest's counter is `counter`."""
    return counter - (counter - page) % pages if counter >= page else 0


def wrong_stamps(ram: bytes | memoryview, counter: int, memory_bytes: int) -> tuple[int, ...]:
    """The numbers of the stamped pages whose stamp is not that of this counter."""
    pages = stamped_pages(memory_bytes)
    wrong = []
    for page in range(pages):
        at = (FIRST_STAMPED_PAGE + page) * PAGE
        wanted = (page, expected_stamp(page, counter, pages))
        if STAMP.unpack_from(ram, at) != wanted or STAMP.unpack_from(ram, at + PAGE - STAMP.size) != wanted:
            wrong.append(page)
    return tuple(wrong)


def read_ram(path: Path) -> RamContent | None:
    """Read a RAM image without asking any VM; None when it is not a simulated guest's."""
    ram = path.read_bytes()
    if not ram.startswith(RAM_MAGIC):
        return None
    _, machine, counter, cycles, _, disks = RAM_HEADER.unpack_from(ram)
    completed = struct.unpack_from(f"<{disks}Q", ram, COMPLETED_OFFSET)
    return RamContent(machine, counter, cycles, completed, wrong_stamps(ram, counter, len(ram)))
