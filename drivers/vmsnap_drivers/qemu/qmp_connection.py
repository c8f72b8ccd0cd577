"""The connection that all borrowers of a `Monitor` share.

Nothing runs in the background: whoever waits for an answer reads the socket, and keeps what is for others (their
answers, the events). Inside the pause there is thus no switch between threads.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from vmsnap.errors import HypervisorError, VmGone
from vmsnap_drivers.qemu.monitor_connection import Event, MonitorError, wall_ahead_ns
from vmsnap_drivers.qemu.qmp_socket import GREETING_TIMEOUT_SECONDS, QmpSocket

_EVENTS_KEPT: Final = 10_000


class QmpConnection:
    """What the borrowers share. Of the threads that wait, one reads the socket (the `_reader`), the others are woken
    when something came for them or when there is no reader any more.
    """

    _open: ClassVar[dict[tuple[int, str], QmpConnection]] = {}
    _open_lock = threading.Lock()

    def __init__(self, path: str) -> None:
        self.path = path
        self.address = str(Path(path).absolute())
        self._socket = QmpSocket(path)
        self.peer_pid = self._socket.peer_pid
        numbers = self._socket.greeting["QMP"]["version"]["qemu"]
        self.version: tuple[int, int, int] = (numbers["major"], numbers["minor"], numbers["micro"])
        self._borrowers = 0
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._reading = False
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any] | None] = {}
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._last_event = 0
        self._gone: VmGone | None = None

    @classmethod
    def get(cls, path: str) -> QmpConnection:
        """The connection to a socket, opened where this process has none that lives; one borrower more.

        Raises what `Monitor.borrow` raises.
        """
        key = (os.getpid(), os.path.realpath(path))
        with cls._open_lock:
            known = cls._open.get(key)
            if known is None or not known._is_alive():
                known = cls(path)
                try:
                    known.execute("qmp_capabilities", None, (), GREETING_TIMEOUT_SECONDS)
                except BaseException:
                    known._socket.close()
                    raise
                cls._open[key] = known
            known._borrowers += 1
            return known

    def give_back(self) -> None:
        """One borrower less; the last one disconnects."""
        with self._open_lock:
            self._borrowers -= 1
            if not self._borrowers:
                self._socket.close()
                for key in [key for key, connection in self._open.items() if connection is self]:
                    del self._open[key]

    def execute(
        self, command: str, arguments: Mapping[str, object] | None, descriptors: Sequence[int], timeout_seconds: float
    ) -> Any:
        """See `Monitor.execute`."""
        return self.execute_all([(command, arguments)], descriptors, timeout_seconds)[0]

    def execute_all(
        self,
        commands: Sequence[tuple[str, Mapping[str, object] | None]],
        descriptors: Sequence[int],
        timeout_seconds: float,
    ) -> list[Any]:
        """See `Monitor.execute_all`."""
        numbers = [next(self._numbers) for _ in commands]
        messages = []
        for number, (command, arguments) in zip(numbers, commands, strict=True):
            message: dict[str, object] = {"execute": command, "id": number}
            if arguments:
                message["arguments"] = dict(arguments)
            messages.append(message)
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._answers.update(dict.fromkeys(numbers))
        try:
            with self._sending:
                self._socket.send(messages, descriptors, timeout_seconds=timeout_seconds)
            # QEMU answers in order.
            self._read_until(lambda: self._answers[numbers[-1]] is not None, deadline)
            answers = [self._answers[number] for number in numbers]
        finally:
            with self._changed:
                for number in numbers:
                    del self._answers[number]
        for (command, _), answer in zip(commands, answers, strict=True):
            if answer is None:
                raise HypervisorError(f"QEMU at {self.path} did not answer {command} within {timeout_seconds:g} s")
            if "error" in answer:
                raise MonitorError(command, answer["error"].get("class", ""), answer["error"].get("desc", ""))
        return [answer["return"] for answer in answers if answer is not None]

    def mark(self) -> int:
        """See `Monitor.mark`."""
        self._read_until(lambda: False, 0)
        return self._last_event

    def events_since(self, mark: int) -> list[Event]:
        """See `Monitor.events_since`."""
        self._read_until(lambda: False, 0)
        with self._changed:
            return [event for event in self._events if event.number > mark]

    def wait_for_event(
        self, names: set[str], since: int, timeout_seconds: float, match: Callable[[Event], bool] | None
    ) -> Event:
        """See `Monitor.wait_for_event`."""
        found: list[Event] = []
        seen = since

        def look() -> bool:
            nonlocal seen
            for event in self._events:
                if event.number > seen and event.name in names and (match is None or match(event)):
                    found.append(event)
                    return True
            seen = max(seen, self._last_event)
            return False

        self._read_until(look, time.monotonic() + timeout_seconds)
        if not found:
            raise HypervisorError(
                f"QEMU at {self.path} sent no event {' or '.join(sorted(names))} within {timeout_seconds:g} s"
            )
        return found[0]

    def _is_alive(self) -> bool:
        try:
            self._read_until(lambda: False, 0)
        except VmGone:
            return False
        return True

    def _read_until(self, done: Callable[[], bool], deadline: float) -> None:
        """Read, or let another thread read, until `done` or the deadline; what is there already is read in any
        case.
        """
        looked = False
        with self._changed:
            while not done():
                if self._gone is not None:
                    raise VmGone(self._gone.message)
                left = deadline - time.monotonic()
                if left <= 0 and looked:
                    return
                if self._reading:
                    looked = self._changed.wait(max(0.0, left)) or left <= 0
                    continue
                looked = True
                self._read(max(0.0, left))

    def _read(self, timeout_seconds: float) -> None:
        self._reading = True
        self._changed.release()
        messages: list[dict[str, Any]] = []
        gone: VmGone | None = None
        try:
            messages = self._socket.receive(timeout_seconds)
        except VmGone as e:
            gone = e
        finally:
            self._changed.acquire()
            self._reading = False
            self._gone = gone or self._gone
            for message in messages:
                self._take(message)
            self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            stamp = message.get("timestamp", {})
            wall_ns = int(stamp.get("seconds", 0)) * 10**9 + int(stamp.get("microseconds", 0)) * 1000
            monotonic_ns = wall_ns - wall_ahead_ns()
            self._last_event += 1
            self._events.append(
                Event(message["event"], message.get("data", {}), wall_ns, monotonic_ns, self._last_event)
            )
        elif message.get("id") in self._answers:
            self._answers[message["id"]] = message
