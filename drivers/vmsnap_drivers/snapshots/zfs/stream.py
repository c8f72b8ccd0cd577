"""Where something has changed between two instants, found in the stream of ``zfs send -i``.

The stream tells of each block that was written since, and brings its content, which is skipped: it comes in large
pieces, of which one header a block is looked at. The records are those of ``include/sys/zfs_ioctl.h``
(``dmu_replay_record_t``) of OpenZFS 2.1, which zfs-fuse 0.7 has in an older form with the same sizes; the lengths of
their payloads those of ``module/zfs/dmu_recv.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import IO, Final

from vmsnap.errors import SnapshotError
from vmsnap_drivers.runs import Runs

VOLUME_OBJECT: Final = 1
"""The object that holds a volume's content (``ZVOL_OBJ``)."""
_MAGIC: Final = 0x2F5BACBAC
_RECORD_BYTES: Final = 312
_BUFFER_BYTES: Final = 4 << 20
_HEAD: Final = struct.Struct("<II")
_BEGIN, _OBJECT, _FREE_OBJECTS, _WRITE, _FREE, _END, _WRITE_BY_REFERENCE, _SPILL, _EMBEDDED, _RANGE, _REDACT = range(11)
_THREE: Final = struct.Struct("<8xQQQ")
"""Object, offset and length of most records."""
_WRITE_RECORD: Final = struct.Struct("<8xQ8xQQ8xxxB45xQ")
"""Object, offset, logical size, kind of compression, compressed size."""
_OBJECT_RECORD: Final = struct.Struct("<8xQ12xI4xI")
"""Object, bonus length, raw bonus length."""
_SPILL_RECORD: Final = struct.Struct("<16xQ16xQ")
"""Length, compressed size."""
_EMBEDDED_RECORD: Final = struct.Struct("<8xQQQ20xI")
"""Object, offset, length, physical size."""


def find(pipe: IO[bytes], wanted: int, size_bytes: int, runs: Runs, given_up: Callable[[], str] = str) -> None:
    """Read the stream to its end, and add to `runs` where the object `wanted`, of that size, may have changed.

    :param given_up: tells why nobody is to read it any more, as the snapshot cannot go before; empty otherwise
    :raises SnapshotError: it is no such stream, the object is another one than before, more has changed around it
        than it is large, so that reading all of it costs less, or it is given up
    """
    source = _Source(pipe, 2 * size_bytes + _BUFFER_BYTES, given_up)
    at = source.take(_RECORD_BYTES)
    kind, payload_bytes = _HEAD.unpack_from(source.buffer, at)
    if kind != _BEGIN or struct.unpack_from("<Q", source.buffer, at + 8)[0] != _MAGIC:
        raise SnapshotError("zfs send does not speak as expected")
    source.skip(payload_bytes)
    while True:
        at = source.take(_RECORD_BYTES)
        kind = _HEAD.unpack_from(source.buffer, at)[0]
        if kind == _WRITE:
            number, offset, length, compression, compressed_bytes = _WRITE_RECORD.unpack_from(source.buffer, at)
            if number == wanted:
                runs.add(offset, min(offset + length, size_bytes))
            source.skip(compressed_bytes if compression else length)
        elif kind in (_FREE, _WRITE_BY_REFERENCE, _REDACT, _EMBEDDED):
            number, offset, length = _THREE.unpack_from(source.buffer, at)
            if number == wanted:
                runs.add(offset, min(offset + length, size_bytes))
            if kind == _EMBEDDED:
                source.skip(_whole_words(_EMBEDDED_RECORD.unpack_from(source.buffer, at)[3]))
        elif kind == _OBJECT:
            _, bonus_bytes, raw_bytes = _OBJECT_RECORD.unpack_from(source.buffer, at)
            source.skip(raw_bytes or _whole_words(bonus_bytes))
        elif kind == _SPILL:
            length, compressed_bytes = _SPILL_RECORD.unpack_from(source.buffer, at)
            source.skip(compressed_bytes or length)
        elif kind == _FREE_OBJECTS:
            first, count = struct.unpack_from("<8xQQ", source.buffer, at)
            if first <= wanted < first + count:
                raise SnapshotError("the disk's file was removed and made anew")
        elif kind == _END:
            source.see_the_end()
            return
        elif kind != _RANGE:
            raise SnapshotError(f"zfs send sends a record of the kind {kind}, which nobody knows")


class _Source:
    """A pipe, read in large pieces. What `take` gave stands in `buffer` until the next call."""

    def __init__(self, pipe: IO[bytes], most_bytes: int, given_up: Callable[[], str]) -> None:
        self.buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self.buffer)
        self._pipe = pipe
        self._left_bytes = most_bytes
        self._given_up = given_up
        self._at = self._end = 0

    def take(self, count: int) -> int:
        """Where in `buffer` the next so many bytes are."""
        if self._end - self._at < count:
            rest = bytes(self._view[self._at : self._end])
            self._view[: len(rest)] = rest
            self._at, self._end = 0, len(rest)
            self._fill(len(rest))
            if self._end < count:
                raise SnapshotError("zfs send ends early")
        at, self._at = self._at, self._at + count
        return at

    def skip(self, count: int) -> None:
        """Pass over so many bytes."""
        while count > self._end - self._at:
            count -= self._end - self._at
            self._at = self._end = 0
            self._fill(0)
            if not self._end:
                raise SnapshotError("zfs send ends early")
        self._at += count

    def see_the_end(self) -> None:
        """Read what may follow, and is nothing of ours."""
        while self._end:
            self._fill(0)

    def _fill(self, begin: int) -> None:
        if why := self._given_up():
            raise SnapshotError(why)
        count = self._pipe.readinto(self._view[begin:])  # type: ignore[attr-defined]
        self._end = begin + (count or 0)
        self._left_bytes -= count or 0
        if self._left_bytes < 0:
            raise SnapshotError("more has changed in the disk's file system than the disk is large")


def _whole_words(count: int) -> int:
    return -(-count // 8) * 8
