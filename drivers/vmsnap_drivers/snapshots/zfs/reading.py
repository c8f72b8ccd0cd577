"""Where an image file has data, told without keeping it open: what is open cannot be removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap.model import Extent
from vmsnap.roles.filereader import next_data

_AT_ONCE: Final = 1024


def extents_of(path: str, size_bytes: int, given_up: Callable[[], str] = str) -> Iterator[Extent]:
    """Data where the file has blocks, zeros where it has holes, to `size_bytes`.

    :param given_up: tells why nobody is to open it any more; empty while that is not so
    :raises SnapshotError: it is gone, or its file system cannot tell
    """
    at = 0
    while at < size_bytes:
        if why := given_up():
            raise SnapshotError(f"{path} is lost: {why}")
        found: list[Extent] = []
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SnapshotError(f"{path} is lost: {e.strerror}") from e
        try:
            while at < size_bytes and len(found) < _AT_ONCE:
                begin, end = next_data(descriptor, at, size_bytes)
                if begin > at:
                    found.append(Extent(at, begin - at, zero=True))
                if end > begin:
                    found.append(Extent(begin, end - begin))
                at = end
        finally:
            os.close(descriptor)
        yield from found
