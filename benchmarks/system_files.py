"""Real files to measure with: a part of this system's /usr, the same one at every run on the same system."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

_SOURCE = Path("/usr")
_BLOCK_BYTES = 4096


def copy_files(target: Path, budget_bytes: int, *, seed: int = 3) -> int:
    """Copy files of /usr into a new folder until they fill so many bytes in blocks of 4 KiB; returns how many they do.

    Which ones come first is drawn by `seed`, so that a small part is of the same mix as a large one. Less than the
    budget is copied where /usr has less.
    """
    used = 0
    for path, size_bytes in _drawn(seed):
        blocks = -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        if used + blocks > budget_bytes:
            continue
        place = target / path.relative_to(_SOURCE)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        used += blocks
        if used >= budget_bytes * 0.999:
            break
    return used


def _drawn(seed: int) -> list[tuple[Path, int]]:
    files = sorted(_regular_files())
    random.Random(seed).shuffle(files)
    return files


def _regular_files() -> Iterator[tuple[Path, int]]:
    seen = set()
    for folder, _, names in os.walk(_SOURCE):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            if status.st_size and status.st_ino not in seen:  # a second name of a file would only deduplicate
                seen.add(status.st_ino)
                yield path, status.st_size
