"""Who uses a block device of this host, asked without opening it: one whose target is gone may not answer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

_FIELD_OF_DEVICE = 2
"""Where /proc/self/mountinfo has major:minor (proc(5)), counted from 0."""


def users_of(disk: str) -> list[str]:
    """Processes that have a disk or a part of it open, what of the kernel lies on it, where it is mounted; as messages
    have them. Other users' processes are seen by root alone.

    :param disk: the kernel's name of the disk, such as ``sdb``
    """
    folder = Path("/sys/block", disk)
    parts = [folder, *folder.glob(f"{disk}*")]
    numbers = {number for part in parts if (number := _number_of(part))}
    above = sorted(path.name for part in parts for path in part.glob("holders/*"))
    return [*_processes(numbers), *above, *_mounts(numbers)]


def _number_of(part: Path) -> str:
    try:
        return (part / "dev").read_text().strip()
    except OSError:  # it is just going
        return ""


def _processes(numbers: set[str]) -> Iterator[str]:
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if any(_is_open_there(descriptor, numbers) for descriptor in (process / "fd").iterdir()):
                yield f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:  # it ended meanwhile, or belongs to another user
            continue


def _is_open_there(descriptor: Path, numbers: set[str]) -> bool:
    try:
        status = descriptor.stat()
    except OSError:  # closed meanwhile
        return False
    return stat.S_ISBLK(status.st_mode) and f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" in numbers


def _mounts(numbers: set[str]) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[_FIELD_OF_DEVICE] in numbers:
            yield f"the mount {fields[4]}"
