"""Calls that go on side by side, each on a thread of its own, for drivers that would else wait for each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Generic, TypeVar

from vmsnap.errors import VmsnapError

T = TypeVar("T")

_HEAR_EACH_SECONDS: Final = 0.1
"""A signal that comes right before the main thread waits for a lock is not heard until that ends: so it never waits
longer.
"""


class Abreast(Generic[T]):
    """One call for each name.

    The calls may use nothing that belongs to the thread which makes this, the state database least of all. A call that
    never ends keeps no process from ending.
    """

    def __init__(self, calls: Mapping[str, Callable[[], T]]) -> None:
        self._changed = threading.Condition()
        self._results: dict[str, T] = {}
        self._failure: BaseException | None = None
        self._threads = {
            name: threading.Thread(target=self._do, args=(name, call), name=f"vmsnap {name}", daemon=True)
            for name, call in calls.items()
        }

    def begin(self) -> None:
        """Begin them all.

        :raises VmsnapError: the system gives no thread; those that were begun go on
        """
        for name, thread in self._threads.items():
            try:
                thread.start()
            except RuntimeError as e:
                raise VmsnapError(f"no thread can be had for {name}", cure="raise the limit: ulimit -u") from e

    def await_settled(self, seconds: float) -> bool:
        """Wait until all are done, or one has failed; False where that is not so within `seconds`."""
        with self._changed:
            return self._changed.wait_for(self._is_settled, seconds)

    def results(self) -> dict[str, T]:
        """What the calls gave, in the order in which they were named.

        Blocks until all are done, or the first has failed: the others go on then. Whatever fails later is a note of
        that failure.

        :raises BaseException: what the call raised that failed first
        """
        with self._changed:
            while not self._changed.wait_for(self._is_settled, _HEAR_EACH_SECONDS):
                pass  # Python has looked for signals
            if self._failure is not None:
                raise self._failure
            return {name: self._results[name] for name in self._threads}

    def await_end(self, name: str, seconds: float) -> bool:
        """Wait until a call has ended, one way or the other; False where it has not within `seconds`. Idempotent."""
        thread = self._threads[name]
        deadline = time.monotonic() + seconds
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(_HEAR_EACH_SECONDS)
        return not thread.is_alive()

    def _is_settled(self) -> bool:
        return self._failure is not None or len(self._results) == len(self._threads)

    def _do(self, name: str, call: Callable[[], T]) -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - it is raised where the results are asked for
            with self._changed:
                if self._failure is None:
                    self._failure = error
                else:
                    self._failure.add_note(f"{name} failed as well: {error}")
                self._changed.notify_all()
        else:
            with self._changed:
                self._results[name] = result
                self._changed.notify_all()
