"""A guest with gigabytes of touched RAM that takes no more of the host's memory than that.

The lab fills RAM with ``-device loader``, whose files QEMU keeps beside the RAM: twice the memory. Here QEMU starts
with empty RAM, and once the guest runs, the part that its kernel was told to leave alone is written from outside,
through ``/proc/PID/mem``. The pages are ordinary anonymous ones, made by a write, as the guest itself would make them.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.lab import LabMachine, QemuBuild
from tests.lab import serial as console
from tests.lab.machine import Disk
from tests.lab.serial import Stall
from vmsnap.host import TMPFS

MIB = 1 << 20
GIB = 1 << 30

OWN_MIB = 256
"""What the guest's kernel uses."""
_TABLES_MIB = 32
"""At the top of the RAM below 4 GiB: the firmware's ACPI tables, and the initramfs while the guest boots."""
_BELOW_4G_MIB = (3584, 3072)
"""Machine type ``pc``: RAM smaller than the first lies below 4 GiB as a whole; of more, the second does."""
_PIECE_MIB = 32
_RANDOM_BYTES = 512
_SPARE_BYTES = 1536 * MIB
_STALL_LINES_SECONDS = 30.0
_POLL_SECONDS = 0.02

LOAD = {"stamp_mib": 64, "dirty_pages": 32, "pause_us": 5000, "stall_us": 500}
"""The workload's settings: each count, some 100 of them a second, writes 32 pages of RAM and a record on the disk."""


class GuestMemoryError(Exception):
    """The guest's RAM could not be filled from outside."""


class FilledMachine(LabMachine):
    """A lab guest, `filled_bytes` of whose RAM can be filled from outside; its kernel uses 256 MiB beside them."""

    def __init__(self, folder: Path, qemu: QemuBuild, filled_bytes: int) -> None:
        """Describe it; nothing is started.

        :param filled_bytes: a multiple of 32 MiB.
        """
        super().__init__(
            folder,
            qemu,
            memory_mib=memory_mib_for(filled_bytes),
            round_memory=True,
            disks=(Disk("qcow2"),),
            settings=LOAD,
            extra_arguments=("-qmp", f"unix:{folder.absolute() / 'witness.sock'},server=on,wait=off"),
        )
        self.filled_bytes = filled_bytes
        self.witness_socket = folder.absolute() / "witness.sock"

    def __enter__(self) -> FilledMachine:
        self.start()
        return self

    def command(self) -> list[str]:
        """The argv of the lab, the guest's kernel kept in the first 256 MiB."""
        argv = super().command()
        argv[argv.index("-append") + 1] += f" mem={OWN_MIB}M"
        return argv

    def fill(self) -> None:
        """Write the RAM beyond the kernel's, see `fill_memory`."""
        fill_memory(self, self.oracle.hmp)

    def stalls_since(self, begun: int) -> list[Stall]:
        """What the guest measured since its console had said `begun` characters, up to now and a second more.

        :raises GuestMemoryError: it says nothing more
        """
        # Two lines from now on: the first still tells of the time before it, the second is wholly new.
        wanted = len(console.stalls(self.serial_text()[begun:])) + 2
        self.await_console(lambda: len(console.stalls(self.serial_text()[begun:])) >= wanted)
        return console.stalls(self.serial_text()[begun:])

    def await_console(self, condition: Callable[[], bool]) -> None:
        """Wait until what the guest says fulfils `condition`.

        :raises GuestMemoryError: it complains, or does not say it in half a minute
        """
        deadline = time.monotonic() + _STALL_LINES_SECONDS
        while not condition():
            if self.faults() or self.ended() or time.monotonic() > deadline:
                raise GuestMemoryError(f"the guest is not well: {self.faults() or self.serial_text()[-300:]}")
            time.sleep(_POLL_SECONDS)


def fill_memory(machine: LabMachine, hmp: Callable[[str], str]) -> None:
    """Write RAM beyond the 256 MiB that the guest's kernel uses: pages of which an eighth is random, the same ones each
    32 MiB. Blocks.

    For QEMU a page is zero or not; that they come again spares the repository's time, which is not measured.

    :param hmp: asks the human monitor of QEMU.
    :raises GuestMemoryError: what was written does not stand in the guest's RAM
    """
    piece = _pattern()
    with Path("/proc", str(machine.pid), "mem").open("r+b", buffering=0) as memory:
        for guest_address in _pieces(machine.memory_mib):
            memory.seek(_host_address(hmp, guest_address))
            for begin in range(0, len(piece), MIB):
                memory.write(piece[begin : begin + MIB])
            _check(hmp, guest_address, piece)


def memory_mib_for(filled_bytes: int) -> int:
    """How much memory a guest needs of which so much is filled."""
    return filled_bytes // MIB + OWN_MIB + _TABLES_MIB


def _pieces(memory_mib: int) -> Iterator[int]:
    """Guest-physical addresses of the pieces to fill."""
    undivided, divided = _BELOW_4G_MIB
    below_mib = memory_mib if memory_mib < undivided else divided
    spans = ((OWN_MIB, below_mib - _TABLES_MIB), (4096, 4096 + memory_mib - below_mib))
    for begin, end in spans:
        yield from range(begin * MIB, end * MIB, _PIECE_MIB * MIB)


def _host_address(hmp: Callable[[str], str], guest_address: int) -> int:
    answer = hmp(f"gpa2hva {guest_address:#x}")
    found = re.search(r"is (0x[0-9a-f]+)", answer)
    if found is None:
        raise GuestMemoryError(f"QEMU has no RAM at {guest_address:#x}: {answer}")
    return int(found[1], 16)


def _check(hmp: Callable[[str], str], guest_address: int, piece: bytes) -> None:
    """Ask QEMU itself for the first word of the last page."""
    offset = len(piece) - 4096
    answer = hmp(f"xp /1gx {guest_address + offset:#x}")
    if int(answer.split()[-1], 16) != int.from_bytes(piece[offset : offset + 8], "little"):
        raise GuestMemoryError(f"RAM at {guest_address + offset:#x} was not filled: {answer}")


@dataclass(frozen=True)
class Room:
    """Whether a guest fits on this host now, and why not."""

    needed_bytes: int
    available_bytes: int

    @property
    def suffices(self) -> bool:
        """Whether it fits."""
        return self.needed_bytes <= self.available_bytes

    def __str__(self) -> str:
        return f"needs {self.needed_bytes / GIB:.1f} GiB of memory, {self.available_bytes / GIB:.1f} GiB are available"


def room_for(filled_bytes: int, repository_folder: Path) -> Room:
    """Look at the host: the guest's RAM, one duplicate of it (or one stream of stop-and-copy), and something to spare.

    A repository that lies in memory, too, counts with a quarter of the RAM.
    """
    ram = filled_bytes + (OWN_MIB + _TABLES_MIB) * MIB
    in_memory = repository_folder.stat().st_dev == TMPFS.stat().st_dev
    needed = 2 * ram + (ram // 4 if in_memory else 0) + _SPARE_BYTES
    meminfo = Path("/proc/meminfo").read_text()
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    available = int(found[1]) * 1024 if found else 0
    return Room(needed, min(available, shutil.disk_usage(TMPFS).free + ram))


def _pattern() -> bytes:
    pages = np.empty((_PIECE_MIB * MIB // 4096, 4096), np.uint8)
    pages[:, :] = np.frombuffer((b"vmsnap benchmark, compresses well; " * 128)[:4096], np.uint8)
    random = np.random.default_rng(1).bytes(len(pages) * _RANDOM_BYTES)
    pages[:, :_RANDOM_BYTES] = np.frombuffer(random, np.uint8).reshape(len(pages), _RANDOM_BYTES)
    return pages.tobytes()
