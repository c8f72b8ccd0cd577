"""Whether a pre-copy of a VM can be trusted to have every page as it was at the instant.

Where a RAM block's bits lie in whole words of the dirty bitmap (its length is a multiple of 64 pages; its begin always
is), ``cpu_physical_memory_sync_dirty_bitmap`` (``include/exec/ram_addr.h``) takes them over by words. TCG's TLB must be
told then that those pages are clean again, else later writes to them go unseen.

- Before QEMU 9.0 it is not told at all. Seen on 7.2: 3 of 18 captures did not restore.
- Since ("physmem: Fix migration dirty bitmap coherency with TCG memory access", 2024; still so in 2025) it is told the
  block's range without the block's own offset: right for the block at offset 0, which is the RAM of a VM with one
  piece of it, and wrong for each other one. Seen on 10.0 with RAM in three pieces: 4 of 9 captures did not
  restore.

With KVM no page goes unseen.
"""

from __future__ import annotations

import re
from typing import Final

from vmsnap_drivers.qemu.monitor import Monitor

_FIRST_THAT_TELLS: Final = (9, 0, 0)
_SYNCED_BY_WORDS_BYTES: Final = 64 * 4096
_BLOCK: Final = re.compile(
    r"^\s*(?P<name>\S+)\s+\d+ \S+\s+(?P<offset>0x[0-9a-f]+)\s+(?P<used>0x[0-9a-f]+)\s+0x[0-9a-f]+"
    r"(?:\s+0x[0-9a-f]+\s+(?P<access>r[ow]))?\s*$",
    re.MULTILINE,
)
"""A line of ``info ramblock``; who may write is told since QEMU 8.1."""
_READ_ONLY: Final = re.compile(r"rom|bios")


def why_pages_would_be_lost(monitor: Monitor) -> str:
    """Why a pre-copy of this VM could hold pages that are older than the instant; empty where it could not.

    :raises VmGone: QEMU ended
    """
    if monitor.execute("query-kvm")["enabled"]:
        return ""
    text = monitor.execute("human-monitor-command", {"command-line": "info ramblock"})
    lost = blocks_that_lose(text, monitor.version)
    if not lost:
        return ""
    cure = "KVM does not" if monitor.version >= _FIRST_THAT_TELLS else "KVM, or QEMU 9.0, does not"
    return f"under TCG this QEMU loses track of pages written in {', '.join(lost)}; {cure}"


def blocks_that_lose(text: str, version: tuple[int, int, int]) -> list[str]:
    """The RAM blocks of which a pre-copy under TCG could have old pages, by what ``info ramblock`` says."""
    return [
        block["name"]
        for block in _BLOCK.finditer(text)
        if (block["access"] == "rw" if block["access"] else not _READ_ONLY.search(block["name"]))
        and not int(block["used"], 16) % _SYNCED_BY_WORDS_BYTES
        and (version < _FIRST_THAT_TELLS or int(block["offset"], 16))
    ]
