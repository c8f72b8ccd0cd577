"""The guest: a workload whose RAM and disks must agree, and which checks that they do.

It works in cycles. The first cycle of a tick counts, logs the count in RAM and stamps one page; each further cycle
completes the write of one record to one disk and submits the next. So a write is nearly always in flight, and the
disks are at different records most of the time: only RAM and disks of one instant, drained, agree.
"""

from __future__ import annotations

import mmap
import os

from vmsnap.errors import HypervisorError
from vmsnap_drivers.hypervisors.simulated.disks import Disks
from vmsnap_drivers.hypervisors.simulated.layout import (
    COMPLETED_OFFSET,
    COUNTER,
    DEAF_OFFSET,
    FIRST_STAMPED_PAGE,
    LOG_BLOCK,
    LOG_ENTRIES,
    LOG_OFFSET,
    PAGE,
    RAM_HEADER,
    RAM_MAGIC,
    STAMP,
    STARTED_OFFSET,
    Slots,
    Superblock,
    expected_stamp,
    latest_record,
    pack_record,
    pack_superblock,
    stamped_pages,
    unpack_record,
    unpack_superblock,
    wrong_stamps,
)


class Guest:
    """The guest's program; all that it knows is in `ram`, on `disks` and in two registers, `cycles` and `step`."""

    def __init__(self, ram: mmap.mmap, disks: Disks, cycles: int = 0, step: int = 0) -> None:
        """Go on with what `ram` holds."""
        self.ram = ram
        self.disks = disks
        self.cycles = cycles
        self.step = step
        self.pages = stamped_pages(len(ram))
        self.fully_checked = False

    @classmethod
    def boot(cls, ram: mmap.mmap, disks: Disks, *, deaf: bool = False) -> Guest:
        """Start from empty RAM: format blank disks, go on after the last record of disks that were used before. A
        `deaf` guest ignores its power button.

        :raises HypervisorError: a disk holds something else
        """
        found = [unpack_superblock(disk.read(PAGE, 0)) for disk in disks.all]
        machine = next((superblock.machine for superblock in found if superblock is not None), os.urandom(16))
        for disk, superblock in zip(disks.all, found, strict=True):
            if superblock is None and disk.read(PAGE, 0).strip(b"\0"):
                raise HypervisorError(f"{disk.image.path} holds something that the simulated guest did not write")
            if superblock is not None and superblock.machine != machine:
                raise HypervisorError(f"{disk.image.path} is a disk of another guest than {disks.all[0].image.path}")
        latest = [latest_record(disk.read, disk.size_bytes, machine) for disk in disks.all]
        counter = max(latest)
        guest = cls(ram, disks)
        guest._write_header(machine, counter, 0)
        ram[DEAF_OFFSET] = deaf
        for index, number in enumerate(latest):
            guest._set(STARTED_OFFSET, index, number)
            guest._set(COMPLETED_OFFSET, index, number)
        for page in range(guest.pages):
            guest._stamp(page, expected_stamp(page, counter, guest.pages))
        guest._write_superblocks(Superblock(machine))
        guest.fully_checked = True
        return guest

    # -- what the guest knows

    def _header(self) -> tuple[bytes, bytes, int, int, int, int]:
        return RAM_HEADER.unpack_from(self.ram)

    def _write_header(self, machine: bytes, counter: int, logged: int) -> None:
        RAM_HEADER.pack_into(self.ram, 0, RAM_MAGIC, machine, counter, self.cycles, logged, len(self.disks.all))

    def _get(self, table: int, index: int) -> int:
        return int(COUNTER.unpack_from(self.ram, table + 8 * index)[0])

    def _set(self, table: int, index: int, number: int) -> None:
        COUNTER.pack_into(self.ram, table + 8 * index, number)

    def _stamp(self, page: int, counter: int) -> None:
        at = (FIRST_STAMPED_PAGE + page) * PAGE
        STAMP.pack_into(self.ram, at, page, counter)
        STAMP.pack_into(self.ram, at + PAGE - STAMP.size, page, counter)

    @property
    def machine(self) -> bytes:
        """The id that RAM and disks of this guest carry."""
        return self._header()[1]

    @property
    def counter(self) -> int:
        """How far it has counted."""
        return self._header()[2]

    @property
    def deaf(self) -> bool:
        """Whether it ignores its power button."""
        return bool(self.ram[DEAF_OFFSET])

    def completed(self) -> list[int]:
        """The last record that each disk has, as RAM knows it."""
        return [self._get(COMPLETED_OFFSET, index) for index in range(len(self.disks.all))]

    # -- working

    def cycle(self) -> bool:
        """Do one cycle; returns whether a tick began with it."""
        self._complete_write()
        begins = self.step == 0
        _, machine, counter, _, logged, _ = self._header()
        self.cycles += 1
        if begins:
            counter += 1
            self._set(LOG_OFFSET, logged % LOG_ENTRIES, counter)
            logged += 1
            self._stamp(counter % self.pages, counter)
        self._write_header(machine, counter, logged)
        if self.step < len(self.disks.all) and not self.disks.all[self.step].image.read_only:
            self._set(STARTED_OFFSET, self.step, counter)
        self.step = (self.step + 1) % (len(self.disks.all) + 1)
        return begins

    def _complete_write(self) -> None:
        for index, disk in enumerate(self.disks.all):
            number = self._get(STARTED_OFFSET, index)
            if number != self._get(COMPLETED_OFFSET, index):
                at = Slots.of(disk.size_bytes).offset(number)
                disk.write(pack_record(self.machine, number), at)
                self._set(COMPLETED_OFFSET, index, number)

    def drain(self) -> None:
        """Complete the writes in flight, and flush."""
        self._complete_write()
        self.disks.flush()

    def power_down(self) -> None:
        """Shut down in order: write the log that was only in RAM, mark the disks clean, flush."""
        self.drain()
        _, machine, counter, _, logged, _ = self._header()
        kept = min(logged, LOG_ENTRIES)
        first = logged - kept
        log = b"".join(COUNTER.pack(self._get(LOG_OFFSET, entry % LOG_ENTRIES)) for entry in range(first, logged))
        if not self.disks.all[0].image.read_only:
            self.disks.all[0].write(log, LOG_BLOCK * PAGE)
            self.disks.flush()
        self._write_superblocks(Superblock(machine, True, counter, len(log)))
        self.disks.flush()

    def _write_superblocks(self, superblock: Superblock) -> None:
        for disk in self.disks.all:
            if not disk.image.read_only:
                disk.write(pack_superblock(superblock), 0)

    # -- checking

    def belongs_to(self, machine: bytes) -> bool:
        """Whether RAM is that machine's, at the instant of the registers."""
        magic, owner, _, cycles, _, disks = self._header()
        return magic == RAM_MAGIC and owner == machine and cycles == self.cycles and disks == len(self.disks.all)

    def quick_check(self) -> str:
        """Compare registers, RAM and disks; returns what disagrees, or nothing."""
        magic, machine, counter, cycles, _, disks = self._header()
        if magic != RAM_MAGIC or disks != len(self.disks.all):
            return "RAM holds no guest of this machine"
        if cycles != self.cycles:
            return f"the vCPU is at cycle {self.cycles}, RAM at {cycles}"
        page = counter % self.pages
        if STAMP.unpack_from(self.ram, (FIRST_STAMPED_PAGE + page) * PAGE) != (page, counter):
            return f"page {page} was not stamped at {counter}"
        return self._check_disks(machine)

    def _check_disks(self, machine: bytes) -> str:
        for index, disk in enumerate(self.disks.all):
            slots = Slots.of(disk.size_bytes)
            wanted = self._get(COMPLETED_OFFSET, index)
            at = slots.offset(wanted)
            if wanted and unpack_record(disk.read(PAGE, at), machine) != wanted:
                return f"{disk.image.device} lacks record {wanted}"
            following = unpack_record(disk.read(PAGE, slots.offset(wanted + 1)), machine)
            if following is not None and following > wanted:
                return f"{disk.image.device} has record {following}, RAM knows of {wanted}"
        return ""

    def full_check(self) -> str:
        """Compare everything, each stamped page and each superblock included; returns what disagrees, or nothing."""
        found = self.quick_check()
        if found:
            return found
        for disk in self.disks.all:
            superblock = unpack_superblock(disk.read(PAGE, 0))
            if superblock is None or superblock.machine != self.machine:
                return f"{disk.image.device} is not this guest's disk"
            latest = latest_record(disk.read, disk.size_bytes, self.machine)
            if latest != self._get(COMPLETED_OFFSET, self.disks.all.index(disk)):
                return f"{disk.image.device} ends at record {latest}"
        wrong = wrong_stamps(memoryview(self.ram), self.counter, len(self.ram))
        if wrong:
            return f"{len(wrong)} pages are not of counter {self.counter}, the first is page {wrong[0]}"
        self.fully_checked = True
        return ""
