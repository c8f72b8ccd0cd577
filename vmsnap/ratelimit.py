"""A limit on how much is moved to and from storage in a second, for all threads and both repositories of a copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vmsnap.errors import StorageError
from vmsnap.roles import StorageBackend, WrappedStorage


class RateLimit:
    """Lets bytes through one direction: what begins to move keeps everything else back for as long as it may take.

    So in every stretch of time no more is begun than the rate allows, besides one object. May be used by several
    threads at once, who go on in the order in which they came.
    """

    def __init__(
        self,
        bytes_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        """:param clock: seconds of a clock that never goes back
        :param wait: waits so many seconds, or until the event is set
        """
        self._bytes_per_second = bytes_per_second
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._free_at = clock()
        self._given_up = threading.Event()

    def take(self, size_bytes: int) -> None:
        """Return when so many bytes may begin to move. Blocks.

        :raises StorageError: what is being done was given up meanwhile
        """
        given_up = self._given_up
        with self._lock:
            start = max(self._free_at, self._clock())
            self._free_at = start + size_bytes / self._bytes_per_second
        while (left := start - self._clock()) > 0 and not given_up.is_set():
            self._wait(given_up, left)
        if given_up.is_set():
            raise StorageError("what waited for its turn under the rate limit was given up")

    def hurry(self) -> None:
        """Those that wait fail now, and nobody waits for them. Later calls are as ever."""
        with self._lock:
            self._free_at = self._clock()
            given_up, self._given_up = self._given_up, threading.Event()
        given_up.set()


class LimitedStorage(WrappedStorage):
    """Storage to and from which no more is moved than two limits allow. Objects are put whole and count whole; what is
    got counts before it is got where its length is known, else behind it.
    """

    def __init__(self, inner: StorageBackend, up: RateLimit, down: RateLimit) -> None:
        """No I/O."""
        super().__init__(inner)
        self._up = up
        self._down = down

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See the role."""
        self._up.take(memoryview(data).nbytes)
        self.inner.put(key, data, if_absent=if_absent)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See the role."""
        if length is not None and length > 0:
            self._down.take(length)
            return self.inner.get(key, offset, length)
        data = self.inner.get(key, offset, length)
        self._down.take(len(data))
        return data

    def hurry(self) -> None:
        """See the role."""
        self._up.hurry()
        self._down.hurry()
        self.inner.hurry()
