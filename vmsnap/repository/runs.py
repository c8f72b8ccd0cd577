"""Puts together what belongs side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

_RUN_BYTES: Final = 4 << 20


def runs(contents: Iterable[tuple[int, bytes | memoryview]]) -> Iterator[tuple[int, list[bytes | memoryview]]]:
    """Contents with their offsets, as runs of those that follow one another: where each begins, and its contents.

    Runs are short, so that memory is used again while it is in the processor's cache.
    """
    run: list[bytes | memoryview] = []
    start = end = 0
    for offset, content in contents:
        if run and (offset != end or end - start >= _RUN_BYTES):
            yield start, run
            run = []
        if not run:
            start = end = offset
        run.append(content)
        end += len(content)
    if run:
        yield start, run
