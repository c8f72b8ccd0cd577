"""What stands behind a `Monitor`, whichever way it goes to QEMU: its errors, its events, and what a connection does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vmsnap.errors import HypervisorError
from vmsnap.model import Moment

_CLOCK_READINGS: Final = 20
_CLOSE_ENOUGH_NS: Final = 20_000


class MonitorError(HypervisorError):
    """QEMU answered a command with an error; the command had no effect unless QEMU says otherwise.

    :ivar error_class: QMP's class of error, such as ``GenericError`` or ``CommandNotFound``
    :ivar command: the command
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


@dataclass(frozen=True)
class Event:
    """An event of QEMU's, such as STOP.

    `wall_ns` is the time that QEMU itself wrote into it, to the microsecond; `monotonic_ns` is the same moment on
    this host's monotonic clock. `number` counts the events of a connection.
    """

    name: str
    data: Mapping[str, Any]
    wall_ns: int
    monotonic_ns: int
    number: int

    def moment(self, name: str) -> Moment:
        """This event as a piece of evidence called `name`."""
        return Moment(name, self.wall_ns, self.monotonic_ns, f"qemu:{self.name}")


class MonitorConnection(Protocol):
    """A process's connection to one QEMU, shared by the borrowers of its `Monitor`, whose docs say what each call is
    for. Any thread may call, several at once.

    :ivar path: what messages call it
    :ivar address: what another process borrows it by
    """

    path: str
    address: str

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version."""

    @property
    def peer_pid(self) -> int:
        """QEMU's process."""

    def give_back(self) -> None:
        """One borrower less; the last one disconnects."""

    def execute(
        self, command: str, arguments: Mapping[str, object] | None, descriptors: Sequence[int], timeout_seconds: float
    ) -> Any:
        """See `Monitor.execute`."""

    def execute_all(
        self,
        commands: Sequence[tuple[str, Mapping[str, object] | None]],
        descriptors: Sequence[int],
        timeout_seconds: float,
    ) -> list[Any]:
        """See `Monitor.execute_all`."""

    def mark(self) -> int:
        """See `Monitor.mark`."""

    def events_since(self, mark: int) -> list[Event]:
        """See `Monitor.events_since`."""

    def wait_for_event(
        self, names: set[str], since: int, timeout_seconds: float, match: Callable[[Event], bool] | None
    ) -> Event:
        """See `Monitor.wait_for_event`."""


def wall_ahead_ns() -> int:
    """How far the wall clock is ahead of the monotonic one. A process can lose the processor between two readings: of
    some the closest ones count.
    """
    closest = ahead = 0
    for number in range(_CLOCK_READINGS):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        if not number or after - before < closest:
            closest, ahead = after - before, wall - (before + after) // 2
        if closest <= _CLOSE_ENOUGH_NS:
            break
    return ahead
