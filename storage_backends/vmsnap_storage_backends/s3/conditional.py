"""Finds out whether a service's conditional puts are atomic, since not every one that takes them is.

Some look whether the object is there when a request begins, and let two that overlap both succeed (OpenStack Swift
2.38 does); some take the condition and pass over it. So two conditional puts of a temporary object are made to overlap:
the body of the first one is held back until the second one is through. Exactly one of them may succeed.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from typing import Any

# A service that lets the second put wait for the first one is let go on after this.
_HOLD_SECONDS = 3.0


class _HeldBody(io.BytesIO):
    """A body that cannot be read while it is held."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reached = threading.Event()
        self.free = threading.Event()
        self.armed = False

    def read(self, size: int | None = -1) -> bytes:
        if self.armed:
            self.reached.set()
            self.free.wait()
        return super().read(size)


def overlapping_puts_exclude_each_other(client: Any, put: Callable[[Any], bool]) -> bool:
    """Try it.

    :param put: puts the temporary object with this body under the condition; False where the condition did not hold
    :raises Exception: what `put` raises
    """
    body = _HeldBody(b"1")

    def sending(request: Any, **_: Any) -> None:
        # What is read before is read to be signed.
        body.armed = request.body is body or getattr(request.body, "_fileobj", None) is body

    client.meta.events.register("before-send.s3.PutObject", sending)
    try:
        with ThreadPoolExecutor(2, "vmsnap-s3-probe") as threads:
            try:
                first = threads.submit(put, body)
                _wait(body.reached, first.done)
                second = threads.submit(put, b"2")
                with suppress(TimeoutError):
                    second.exception(_HOLD_SECONDS)
            finally:
                body.free.set()
            return first.result() + second.result() == 1
    finally:
        client.meta.events.unregister("before-send.s3.PutObject", sending)


def _wait(event: threading.Event, ended: Callable[[], bool]) -> None:
    while not event.wait(0.05) and not ended():
        pass
