"""Progress bars on standard error, where that is a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from vmsnap.controller.progress import Progress, ProgressCallback

_INTERVAL_SECONDS = 0.1
_elsewhere: list[ProgressCallback] = []


def report_to(callback: ProgressCallback) -> None:
    """Let `callback` be told of progress from now on, in the place of a terminal."""
    _elsewhere[:] = [callback]


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A callback for the controller's verbs that draws a bar; one that does nothing where there is no terminal."""
    from vmsnap.controller.progress import silent

    if _elsewhere:
        yield _elsewhere[0]
        return
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield silent
        return
    bar = _Bar()
    try:
        yield bar.advance
    finally:
        bar.stop()


@contextmanager
def byte_bar(phase: str) -> Iterator[Callable[[int, int | None], None]]:
    """The same for verbs that count bytes of one phase: called with bytes done and to do."""
    from vmsnap.controller.progress import Progress

    with progress_bar() as callback:
        yield lambda done_bytes, total_bytes: callback(Progress(phase, done_bytes, total_bytes))


class Telling:
    """A callback that tells warnings to people as they come, and hands all else on. `told` are those."""

    def __init__(self, progress: ProgressCallback, note: Callable[[str], None]) -> None:
        self.told: list[str] = []
        self._progress = progress
        self._note = note

    def __call__(self, progress: Progress) -> None:
        """One step, or one warning."""
        if progress.warning:
            self.told.append(progress.warning)
            self._note(progress.warning)
        else:
            self._progress(progress)


class _Bar:
    """One bar; begun with the first call, so that rich is imported only when something moves."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._drawn = 0.0

    def advance(self, progress: object) -> None:
        """Draw how far it has come; often called, seldom drawn."""
        from vmsnap.controller.progress import Progress

        if not isinstance(progress, Progress):
            return
        now = time.monotonic()
        complete = progress.total_bytes is not None and progress.done_bytes >= progress.total_bytes
        if progress.phase == self._phase and now - self._drawn < _INTERVAL_SECONDS and not complete:
            return
        with self._lock:
            self._drawn = now
            self._draw(progress.phase, progress.done_bytes, progress.total_bytes)

    def _draw(self, phase: str, done_bytes: int, total_bytes: int | None) -> None:
        if self._bars is None:
            self._bars = _start_bars()
        if phase != self._phase or self._task is None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(phase, total=total_bytes)
            self._phase = phase
        self._bars.update(self._task, completed=done_bytes, total=total_bytes)

    def stop(self) -> None:
        """Take the bar away; idempotent."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None


def _start_bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bars.start()
    return bars
