"""A list of ranges that may be longer than memory should hold: in a file without a name, what adjoins is one."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_RUN: Final = struct.Struct("<QQ")
_RUNS_AT_ONCE: Final = 4096


class Runs:
    """Such a list, for a ``with``: first `add` to it, then iterate."""

    def __init__(self, folder: Path) -> None:
        """Begin with none; the file lies in `folder`, which is there."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._begin = self._end = 0

    def add(self, begin: int, end: int) -> None:
        """Append the range from `begin` to before `end`; an empty one is left out."""
        if end <= begin:
            return
        if begin != self._end:
            self._write()
            self._begin = begin
        self._end = end

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Begin and end of each, in the order in which they were added."""
        self._write()
        self._begin = self._end = 0
        self._file.seek(0)
        while block := self._file.read(_RUN.size * _RUNS_AT_ONCE):
            yield from _RUN.iter_unpack(block)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self) -> None:
        if self._end > self._begin:
            self._file.write(_RUN.pack(self._begin, self._end))
