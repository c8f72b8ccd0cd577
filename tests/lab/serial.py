"""What the guest says on its serial console: parsing a log, and timing the lines as they come."""

import itertools
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_COUNT = re.compile(r"^COUNT (\d+) ok\s*$", re.MULTILINE)
_CHECK = re.compile(r"^CHECK (\d+) ok\s*$", re.MULTILINE)
_BULK = re.compile(r"^BULK (\d+) ok\s*$", re.MULTILINE)
_FLUSHED = re.compile(r"^FLUSHED (\d+)\s*$", re.MULTILINE)
_PACKETS = re.compile(r"^PACKETS (\d+) (?:sent|refused)\s*$", re.MULTILINE)
_APPLICATION = re.compile(r"^APPLICATION (\d+) ok\s*$", re.MULTILINE)
_APPLICATION_FLUSHED = re.compile(r"^APPLICATION FLUSHED (\d+)\s*$", re.MULTILINE)
_STALL = re.compile(r"^STALL max_us=(-?\d+) stopped_us=(-?\d+)\s*\n", re.MULTILINE)
_FAULT = re.compile(r"^.*(?:FAULT: |Kernel panic|Oops|I/O error|segfault|INIT ).*$", re.MULTILINE)
_GOOD_END = "INIT workload ended with status 0"


@dataclass(frozen=True)
class Stall:
    """One second as the guest saw it."""

    longest_us: int
    """The longest time that a real-time thread had to wait, microseconds of guest time."""
    stopped_us: int
    """For how long the whole machine was stopped, microseconds; exact to about 1000, and negative by as much.

    A stop that spans a change of the second shows in two neighbours, which add up to it.
    """


def counts(text: str) -> list[int]:
    """All counts that the guest printed, in order."""
    return [int(number) for number in _COUNT.findall(text)]


def checks(text: str) -> list[int]:
    """The counts at which the guest found all of its disks and stamped RAM in agreement."""
    return [int(number) for number in _CHECK.findall(text)]


def bulk_checks(text: str) -> list[int]:
    """The counts at which the guest had verified all of its bulk RAM once more."""
    return [int(number) for number in _BULK.findall(text)]


def flushed(text: str) -> int | None:
    """The last count, which the guest flushed to disk on its way down; None when it did not."""
    found = _FLUSHED.findall(text)
    return int(found[-1]) if found else None


def packets(text: str) -> list[int]:
    """The numbers of packets that the guest said it tried to send, each tenth."""
    return [int(number) for number in _PACKETS.findall(text)]


def application_counts(text: str) -> list[int]:
    """How many entries the application said it had in its buffer and its transaction, each tenth."""
    return [int(number) for number in _APPLICATION.findall(text)]


def application_flushed(text: str) -> int | None:
    """How many entries the application brought to the disk on its way down; None when it did not."""
    found = _APPLICATION_FLUSHED.findall(text)
    return int(found[-1]) if found else None


def faults(text: str) -> list[str]:
    """All lines that tell of a disagreement between RAM and disks, or of a broken guest."""
    lines = (line.strip() for line in _FAULT.findall(text))
    return [line for line in lines if _GOOD_END not in line]


def stalls(text: str) -> list[Stall]:
    """The guest's own measurements, about one for each second."""
    return [Stall(int(longest), int(stopped)) for longest, stopped in _STALL.findall(text)]


def longest_stop_seconds(measured: Sequence[Stall]) -> float:
    """The longest stop as the guest saw it; two neighbours count together, for it may span both."""
    alone = [stall.stopped_us for stall in measured]
    together = [first + second for first, second in itertools.pairwise(alone)]
    return max([*alone, *together], default=0) / 1e6


@dataclass(frozen=True)
class TimedLine:
    """A line of the console and the host's monotonic clock when it came, in seconds."""

    at_seconds: float
    text: str


class SerialWatch:
    """Listens on the serial console's socket and notes when each line comes. Use with ``with``."""

    def __init__(self, path: Path) -> None:
        """Connect to the console socket at `path`; it takes one listener at a time.

        :raise OSError: when nobody listens there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines: list[TimedLine] = []
        self._thread = threading.Thread(target=self._listen, name="serial watch", daemon=True)

    def __enter__(self) -> "SerialWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def lines(self) -> list[TimedLine]:
        """The whole lines that came so far."""
        return list(self._lines)

    def _listen(self) -> None:
        rest = b""
        while data := self._socket.recv(4096):
            now = time.monotonic()
            *whole, rest = (rest + data).split(b"\n")
            self._lines += [TimedLine(now, line.decode(errors="replace").strip()) for line in whole]


def longest_gap_seconds(lines: Sequence[TimedLine]) -> float:
    """The longest time between two lines that followed each other, as the host saw it; 0 for fewer than two.

    The guest prints a line for each count with the setting ``count_every=1``.
    """
    return max(
        (after.at_seconds - before.at_seconds for before, after in itertools.pairwise(lines)),
        default=0.0,
    )
