"""How the controller tells how far a long verb has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How far a long verb has come: `phase` for people, bytes done and to do (None where that is not known).

    `warning` is one line about what will cost the verb its success unless somebody helps; given once, empty otherwise.
    """

    phase: str
    done_bytes: int = 0
    total_bytes: int | None = None
    warning: str = ""


ProgressCallback = Callable[[Progress], None]
"""Called from the verb's own threads, often; must be quick and must not raise."""


def silent(_: Progress) -> None:
    """The callback of those who do not want to know."""


class Bars:
    """Progress over several images as one bar."""

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress = progress
        self._shown = Progress("")
        self._phase = ""
        self._before_bytes = 0
        self._total_bytes: int | None = None

    def show(self, phase: str, done_bytes: int, total_bytes: int | None) -> None:
        """Say how far a phase has come."""
        self._shown = Progress(phase, done_bytes, total_bytes)
        self._progress(self._shown)

    def warn(self, warning: str) -> None:
        """Say what threatens; at any time, by any thread."""
        self._progress(replace(self._shown, warning=warning))

    def begin(self, phase: str, total_bytes: int) -> None:
        """A phase of several parts begins."""
        self._phase, self._before_bytes, self._total_bytes = phase, 0, total_bytes
        self.show(phase, 0, total_bytes)

    def part(self, done_bytes: int, _part_bytes: int | None) -> None:
        """How far the present part has come."""
        self.show(self._phase, self._before_bytes + done_bytes, self._total_bytes)

    def part_done(self, size_bytes: int) -> None:
        """The present part is done."""
        self._before_bytes += size_bytes
        self.part(0, None)
