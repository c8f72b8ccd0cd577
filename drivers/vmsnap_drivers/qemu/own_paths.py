"""Files and sockets of a VM's own, in place of those of the VM that it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class OwnPaths:
    """Gives out paths in one folder, each once. No I/O."""

    def __init__(self, folder: Path, taken: Iterable[str] = ()) -> None:
        """:param taken: names in the folder that are not to be given out"""
        self._folder = folder
        self._names = set(taken)

    def give(self, path: str) -> Path:
        """A path of that base name, with a number before it where that was given out."""
        name = Path(path).name
        number = 1
        while name in self._names:
            number += 1
            name = f"{number}-{Path(path).name}"
        self._names.add(name)
        return self._folder / name
