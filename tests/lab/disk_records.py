"""The records and the log that the guest keeps on its disks, read from and written to raw images.

Layout of a disk, in 64-bit little-endian words; a record fills 4096 bytes:

========  =========================================================================================
1 MiB     the ring: record n lies in slot n % slots. A record: magic, seed of the boot, n, the
          disk's number, then a pattern made of n and seed. A slot never written is zero.
64 MiB    (disk 0 only) the log, kept in RAM and written at an orderly end: magic, seed, the last
          count, zeros up to 4096 bytes; then 7680 words, word n % 7680 holding n
========  =========================================================================================
"""

import struct
from pathlib import Path

RING_OFFSET = 1 << 20
LOG_OFFSET = 64 << 20
RECORD_BYTES = 4096
DEFAULT_SLOTS = 256
_LOG_ENTRIES = 7680
_RECORD_MAGIC = int.from_bytes(b"VRECORD1", "little")
_LOG_MAGIC = int.from_bytes(b"VSMLOGS1", "little")
_MASK = (1 << 64) - 1


def record(seed: int, count: int, disk: int) -> bytes:
    """The record of `count` on disk number `disk`, as the guest of that seed writes it."""
    pattern = ((count * 0x9E3779B97F4A7C15 ^ word * 0xBF58476D1CE4E5B9 ^ seed) & _MASK for word in range(4, 512))
    return struct.pack("<512Q", _RECORD_MAGIC, seed, count, disk, *pattern)


def read_ring(image: Path, slots: int = DEFAULT_SLOTS) -> bytes:
    """The whole ring of a raw image."""
    with image.open("rb") as file:
        file.seek(RING_OFFSET)
        return file.read(slots * RECORD_BYTES)


def write_ring(image: Path, ring: bytes) -> None:
    """Overwrite the ring of a raw image; a test's way to do damage."""
    with image.open("r+b") as file:
        file.seek(RING_OFFSET)
        file.write(ring)


def newest_record(image: Path, disk: int, slots: int = DEFAULT_SLOTS) -> int:
    """The newest count on a raw image, 0 when the ring is empty.

    :raise ValueError: when the ring is not what a guest leaves behind: a record is damaged, or is not of the
        last `slots` counts, or is of another boot or disk.
    """
    ring = read_ring(image, slots)
    found = [ring[at : at + RECORD_BYTES] for at in range(0, len(ring), RECORD_BYTES)]
    _, seed, newest, _ = max((struct.unpack("<4Q", page[:32]) for page in found), key=lambda head: int(head[2]))
    for count in range(max(newest - slots, 0) + 1, newest + 1):
        if found[count % slots] != record(seed, count, disk):
            raise ValueError(f"{image}: record {count} is damaged or missing, the newest is {newest}")
    return int(newest)


def flushed_count(image: Path) -> int | None:
    """The last count of the log on a raw image of disk 0; None when the guest did not end in order.

    :raise ValueError: when the log is damaged.
    """
    with image.open("rb") as file:
        file.seek(LOG_OFFSET)
        magic, _, last = struct.unpack("<3Q", file.read(24))
        file.seek(LOG_OFFSET + RECORD_BYTES)
        entries = struct.unpack(f"<{_LOG_ENTRIES}Q", file.read(8 * _LOG_ENTRIES))
    if magic != _LOG_MAGIC:
        return None
    for count in range(max(last - _LOG_ENTRIES, 0) + 1, last + 1):
        if entries[count % _LOG_ENTRIES] != count:
            raise ValueError(f"{image}: the log lacks {count}, its last is {last}")
    return int(last)
