"""Times of the day, on some days of the week, at which jobs may or may not start. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo

from vmsnap.errors import UsageError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_TEXT = re.compile(
    r"(?:(?P<days>[a-z]{3}(?:-[a-z]{3})?(?:,[a-z]{3}(?:-[a-z]{3})?)*)\s+)?"
    r"(?P<begin>\d{1,2}:\d{2})-(?P<end>\d{1,2}:\d{2})",
    re.IGNORECASE,
)
_LONGEST_WAIT_DAYS = 8


@dataclass(frozen=True)
class Window:
    """From `begin` to `end` by the clock on the wall, on the `days` (0: Monday) on which it begins. One that ends at or
    before it begins goes on into the next day.
    """

    begin: time
    end: time
    days: frozenset[int] = frozenset(range(7))

    def holds(self, local: datetime) -> bool:
        """Whether that time, as the clock on the wall shows it, lies in it."""
        at = local.time()
        if self.begin < self.end:
            return self.begin <= at < self.end and local.weekday() in self.days
        if at >= self.begin:
            return local.weekday() in self.days
        return at < self.end and (local.weekday() - 1) % 7 in self.days


def parse_window(text: str) -> Window:
    """The window that a text such as ``22:00-06:00`` or ``mon-fri 08:00-18:00`` or ``sat,sun 0:00-24:00`` names.

    :raises UsageError: it is none
    """
    found = _TEXT.fullmatch(text.strip())
    if not found:
        raise _wrong(text)
    days = _days(found["days"].lower(), text) if found["days"] else frozenset(range(7))
    return Window(_time(found["begin"], text), _time(found["end"], text), days)


def may_start(now: datetime, zone: tzinfo, only: Sequence[Window], never: Sequence[Window]) -> bool:
    """Whether a job may start at `now`: inside of one of `only`, where there are any, and of none of `never`."""
    local = now.astimezone(zone)
    return (not only or any(window.holds(local) for window in only)) and not any(w.holds(local) for w in never)


def next_opening(now: datetime, zone: tzinfo, only: Sequence[Window], never: Sequence[Window]) -> datetime | None:
    """The first minute from `now` on at which a job may start, UTC; None where there is none in the next eight days."""
    if may_start(now, zone, only, never):
        return now
    # Only edges of windows can be it; between them nothing changes but by the clocks going forward or back.
    edges = {edge for window in (*only, *never) for edge in (window.begin, window.end)}
    local = now.astimezone(zone)
    candidates = []
    for day in range(_LONGEST_WAIT_DAYS):
        date = (local + timedelta(days=day)).date()
        for edge in edges:
            for fold in (0, 1):
                at = datetime.combine(date, edge, zone).replace(fold=fold).astimezone(UTC)
                # A time that the clocks leave out: the first one behind the gap.
                candidates += [at, at + timedelta(hours=1), at - timedelta(hours=1)]
    for at in sorted(candidates):
        if at > now and may_start(at, zone, only, never):
            return at
    return None


def _time(text: str, whole: str) -> time:
    hour, minute = (int(part) for part in text.split(":"))
    if (hour, minute) == (24, 0):
        hour = 0
    if hour > 23 or minute > 59:
        raise _wrong(whole)
    return time(hour, minute)


def _days(text: str, whole: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in _DAYS or (last and last not in _DAYS):
            raise _wrong(whole)
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        found |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(found)


def _wrong(text: str) -> UsageError:
    return UsageError(f"{text!r} is no window of time", cure="write it as 22:00-06:00, or as mon-fri 08:00-18:00")
