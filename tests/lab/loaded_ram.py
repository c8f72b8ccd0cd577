"""Fills gigabytes of RAM from files when QEMU starts: under emulation the guest would take too long."""

import os
from collections.abc import Iterator
from pathlib import Path

from .qemus import cache_folder

MIB = 1024 * 1024
PIECE_MIB = 128
_HALF_PAGE_BYTES = 2048
# QEMU puts the initramfs at the top of the RAM below 4 GiB; what is loaded must end before it.
_INITRAMFS_MIB = 32
# By machine type: RAM smaller than the first lies below 4 GiB as a whole; of more, the second does.
_BELOW_4G_MIB = {
    "pc": (0xE0000000 // MIB, 0xC0000000 // MIB),
    "q35": (0xB0000000 // MIB, 0x80000000 // MIB),
}


def loaded_ram_arguments(loaded_mib: int, memory_mib: int, *, above_mib: int, machine_type: str) -> list[str]:
    """The ``-device loader`` arguments that fill `loaded_mib` of RAM from `above_mib` on.

    No two pages are the same; half of each is random, half compresses well. The guest's kernel must
    be kept out with ``mem=``. QEMU keeps the files in memory of its own, besides the guest's RAM.

    :param loaded_mib: a multiple of `PIECE_MIB`.
    :param memory_mib: all of the machine's RAM.
    :param machine_type: ``pc`` or ``q35``: they have different holes below 4 GiB.
    :raise ValueError: when it does not fit.
    """
    addresses = list(_places(memory_mib, above_mib, machine_type))
    pieces, rest = divmod(loaded_mib, PIECE_MIB)
    if rest or pieces > len(addresses):
        room = len(addresses) * PIECE_MIB
        raise ValueError(f"cannot load {loaded_mib} MiB: not a multiple of {PIECE_MIB}, or more than {room}")
    arguments = []
    for piece, address_mib in enumerate(addresses[:pieces]):
        file = _piece_file(piece)
        arguments += ["-device", f"loader,file={file},addr={address_mib * MIB:#x},force-raw=on"]
    return arguments


def _places(memory_mib: int, above_mib: int, machine_type: str) -> Iterator[int]:
    undivided, divided = _BELOW_4G_MIB[machine_type]
    below_mib = memory_mib if memory_mib < undivided else divided
    for begin, end in ((above_mib, below_mib - _INITRAMFS_MIB), (4096, 4096 + memory_mib - below_mib)):
        yield from range(begin, end - PIECE_MIB + 1, PIECE_MIB)


def _piece_file(piece: int) -> Path:
    path = cache_folder() / f"loaded-{piece:03}.bin"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        filler = b"vmsnap lab, half a page that compresses well. " * 64
        with unfinished.open("wb") as output:
            for _ in range(PIECE_MIB * MIB // (2 * _HALF_PAGE_BYTES)):
                output.write(os.urandom(_HALF_PAGE_BYTES) + filler[:_HALF_PAGE_BYTES])
        unfinished.replace(path)
    return path
