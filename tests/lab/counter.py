"""A guest that is up at once where everything is slow, in QEMU within the storage guest: it fits into one sector."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from .machine import LabError
from .qemus import find_qemu
from .started import Started

_SOURCE = Path(__file__).parent / "guest/counter.s"
_LOADED_AT = "0x7c00"
_SECTOR = 512
_COUNTED_AT = 8 * _SECTOR
_OFF = b"OFF!"
_MEMORY_MIB = 16
_SECONDS = 120.0
_POLL_SECONDS = 0.02


def boot_sector(folder: Path) -> bytes:
    """The guest's program, assembled in `folder`."""
    assembled, linked = folder / "counter.o", folder / "counter.bin"
    subprocess.run(["as", "--32", "-o", str(assembled), str(_SOURCE)], check=True)
    layout = ["-m", "elf_i386", "-e", _LOADED_AT, "-Ttext", _LOADED_AT, "--oformat", "binary"]
    subprocess.run(["ld", *layout, "-o", str(linked), str(assembled)], check=True)
    return linked.read_bytes()


def count_in(disk: bytes) -> int:
    """The last count that stands on a disk."""
    return int.from_bytes(disk[_COUNTED_AT : _COUNTED_AT + 4], "little")


def was_shut_down(disk: bytes) -> bool:
    """Whether the guest has switched itself off before it was left alone."""
    return disk[_COUNTED_AT + 4 : _COUNTED_AT + 8] == _OFF


def see_it_count(log: Path) -> None:
    """Wait until a guest whose serial line goes to that file has counted on, and see that it was right.

    :raise LabError: it is stuck, or its RAM and disk differ
    """

    def said() -> str:
        return log.read_text() if log.exists() else ""

    begun, deadline = said(), time.monotonic() + _SECONDS
    while said() == begun:
        if time.monotonic() > deadline:
            raise LabError(f"the counter does not count: {begun[-40:]!r}")
        time.sleep(_POLL_SECONDS)
    if faults := said().replace(".", ""):
        raise LabError(f"the counter's RAM and disk differ: {faults[:40]!r}")


class CounterMachine(Started):
    """QEMU with that guest on a disk that has its program, see `Started`. In its folder ``qmp.sock`` is the monitor,
    and ``serial`` has all that the guest says.
    """

    def __init__(self, folder: Path, disk: Path) -> None:
        self.folder = folder
        self.disk = disk
        self.qmp_socket = folder / "qmp.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def counts_on(self) -> None:
        """See `see_it_count`."""
        see_it_count(self.folder / "serial")

    def kill(self) -> None:
        """See `Started.kill`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def start(self) -> None:
        """Start QEMU, and wait until the guest counts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = find_qemu("10.0").command(
            "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,accel=tcg", "-name", "counter",
            "-m", f"{_MEMORY_MIB}", "-qmp", f"unix:{self.qmp_socket},server=on,wait=off",
            "-blockdev", f"driver=raw,node-name=disk0,file.driver=host_device,file.filename={self.disk}",
            "-device", "virtio-blk-pci,drive=disk0,id=disk0,bootindex=1", "-serial", f"file:{self.folder / 'serial'}",
        )  # fmt: skip
        self._process = subprocess.Popen(command, start_new_session=True)
        self.counts_on()
