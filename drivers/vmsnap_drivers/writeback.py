"""What this host's page cache has of block devices, and what lies behind them has not.

Whoever flushes a device has brought what he wrote behind it. QEMU does so at a pause, except where a disk has
``cache=unsafe``: what the guest saw completed may be in the page cache alone then, and a snapshot that is taken behind
the device would miss it. Files are no matter: their file system knows its own page cache.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from vmsnap.errors import SnapshotError


def write_back(addresses: Iterable[str]) -> None:
    """Bring to block devices what was written to them; nothing where all is there, or where there is a file. Blocks.

    :raises SnapshotError: a device is gone, or does not take it
    """
    for address in addresses:
        try:
            descriptor = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if stat.S_ISBLK(os.fstat(descriptor).st_mode):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise SnapshotError(f"what was written to {address} cannot be brought there: {e.strerror}") from e
