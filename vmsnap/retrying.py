"""Tries again what remote storage failed at for the moment: one wrapper, for every backend.

What is tried again is decided by the error alone: a `TransientStorageError` is, everything else is final. Waits grow,
and are random, so that many hosts that were cut off together do not come back together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeVar

import tenacity

from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError, TransientStorageError
from vmsnap.roles import ObjectInfo, StorageBackend, StorageProperties, WrappedStorage

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on.

    The wait before try n+1 is random, up to ``first_wait_seconds * 2**(n-1)`` and `longest_wait_seconds`; and half of
    that at least where the storage said that it is overloaded. After `attempts`, or when the next wait would end later
    than `patience_seconds` after the first try began, the last error is final.
    """

    attempts: int = 12
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 20.0
    patience_seconds: float = 180.0


class RetryingStorage(WrappedStorage):
    """Storage whose calls are tried again when they fail for the moment.

    - A `put` with `if_absent` whose answer was lost may have stored the object: when the next try finds one, it is
      looked at, and our own bytes are a success.
    - A `list` goes on behind the last object that it has shown.
    - `doctor` is not tried again: it says how things are now.
    """

    def __init__(self, inner: StorageBackend, policy: RetryPolicy | None = None) -> None:
        """No I/O."""
        super().__init__(inner)
        self._policy = policy or RetryPolicy()
        self._hurry = threading.Event()

    def create(self) -> None:
        """See the role."""
        self._call(lambda _: self.inner.create())

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See the role."""

        def attempt(first: bool) -> None:
            try:
                self.inner.put(key, data, if_absent=if_absent)
            except ObjectExists:
                if first or not self._is_there(key, data):
                    raise

        self._call(attempt)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See the role."""
        return self._call(lambda _: self.inner.get(key, offset, length))

    def stat(self, key: str) -> ObjectInfo:
        """See the role."""
        return self._call(lambda _: self.inner.stat(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See the role."""
        last = ""
        while True:
            # Whatever comes is progress, and begins a new count of tries.
            objects, found = self._call(partial(self._list_behind, prefix, last))
            try:
                while found:
                    yield found
                    last = found.key
                    found = next(objects, None)
                return
            except TransientStorageError:
                continue

    def delete(self, key: str) -> None:
        """See the role."""
        self._call(lambda _: self.inner.delete(key))

    def properties(self) -> StorageProperties:
        """See the role."""
        return self._call(lambda _: self.inner.properties())

    def retain(self, keys: Iterable[str], until: datetime) -> None:
        """See the role."""
        every = tuple(keys)
        self._call(lambda _: self.inner.retain(every, until))

    def retained(self, keys: Iterable[str]) -> dict[str, datetime]:
        """See the role."""
        every = tuple(keys)
        return self._call(lambda _: self.inner.retained(every))

    def hurry(self) -> None:
        """Calls that wait for their next try fail now, with what failed before. Later calls are as ever."""
        waiting, self._hurry = self._hurry, threading.Event()
        waiting.set()
        self.inner.hurry()

    def _call(self, attempt: Callable[[bool], T]) -> T:
        """`attempt` until it succeeds; it is told whether this is the first time."""
        begun, hurry, policy = time.monotonic(), self._hurry, self._policy
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientStorageError),
            wait=self._wait,
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(policy.attempts),
                tenacity.stop_before_delay(policy.patience_seconds),
                tenacity.stop_when_event_set(hurry),
            ),
            sleep=tenacity.sleep_using_event(hurry),
            reraise=True,
        )
        count = 0
        failed: TransientStorageError | None = None

        def once() -> T:
            nonlocal count, failed
            if failed and hurry.is_set():
                raise failed  # woken up: not tried again
            count += 1
            try:
                return attempt(count == 1)
            except TransientStorageError as e:
                failed = e
                raise

        try:
            return tries(once)
        except TransientStorageError as e:
            if count > 1:
                e.add_note(f"it was tried {count} times in {time.monotonic() - begun:.0f} seconds")
            raise

    def _list_behind(self, prefix: str, last: str, _: bool) -> tuple[Iterator[ObjectInfo], ObjectInfo | None]:
        """A listing that goes on behind the key `last`, and the first object of that."""
        objects = self.inner.list(prefix)
        for found in objects:
            if not last or found.key > last:
                return objects, found
        return objects, None

    def _wait(self, state: tenacity.RetryCallState) -> float:
        policy = self._policy
        wait = tenacity.wait_random_exponential(policy.first_wait_seconds, policy.longest_wait_seconds)(state)
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, TransientStorageError) and error.overloaded:
            most = policy.first_wait_seconds * 2.0 ** (state.attempt_number - 1)
            return max(wait, min(most, policy.longest_wait_seconds) / 2)
        return wait

    def _is_there(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Whether the object is, byte by byte, what was to be put."""
        view = memoryview(data).cast("B")
        try:
            return self.inner.stat(key).size_bytes == len(view) and self.inner.get(key) == view
        except ObjectNotFound as e:
            raise StorageError(f"{key} was there and is gone: somebody else deletes what is being stored") from e
