"""Ctrl-C and SIGTERM: stop at the next safe moment, clean up; the second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vmsnap.errors import Interrupted


class Interruption:
    """Turns SIGINT and SIGTERM into `Interrupted`, raised in the main thread.

    While `deferred` is in force (the pause window, and cleaning up), a first signal waits for its end. A second one
    is raised at once, also where the first has been raised and is what is cleaned up after: the guardian and
    ``vmsnap recover`` deal with what that leaves.
    """

    def __init__(self) -> None:
        self.second: Callable[[str], object] | None = None
        """Called with a second signal's name before it is raised: where the process is ours it ends there, as a call
        that hangs in another thread would be waited for.
        """
        self._deferring = 0
        self._arrivals = 0
        self._pending: str | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take over the two signals, and give them back. In other threads than the main one signals never arrive."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._arrivals = 0
        before = {number: signal.signal(number, self._arrived) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, *, quietly: bool = False) -> Iterator[None]:
        """Let the signal wait until this ends; raises `Interrupted` then if one came, unless an error is under way
        already (or it is `quietly` forgotten, since what it asks for is being done).
        """
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
        if quietly:
            self._pending = None
        self.raise_pending()

    def raise_pending(self) -> None:
        """Raise `Interrupted` if a signal came and nothing defers it."""
        if self._pending and not self._deferring:
            name, self._pending = self._pending, None
            raise Interrupted(f"stopped by {name}")

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._arrivals += 1
        if self._deferring and self._arrivals == 1:
            self._pending = name
            return
        if self._arrivals > 1 and self.second is not None:
            self.second(name)
        raise Interrupted(f"stopped by {name}")
