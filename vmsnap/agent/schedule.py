"""A schedule: what is to be done, to which VMs, and when. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from vmsnap.agent.tags import PREFIX as TAG_PREFIX
from vmsnap.agent.windows import Window, parse_window
from vmsnap.errors import UsageError
from vmsnap.model import SCHEDULE_TAG, check_name

VERBS = ("backup", "verify")
ORDERS = ("fixed", "random", "least-recent")
MODES = ("live", "consistent")
KEEPS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
LONGEST_RETRY_SECONDS = 6 * 3600
"""However often a job has failed, it is tried again after so long at most."""

_LOCAL_ZONE = Path("/etc/localtime")
# How far back the latest slot is looked for, so that neither a slot a minute nor one in eight years takes long.
_LOOKS_BACK = tuple(timedelta(hours=hours) for hours in (2, 48, 24 * 40, 24 * 370, 24 * 366 * 9))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One schedule.

    `cron` has the five fields of crontab(5), read by the clock of `timezone` (empty: the host's) the way Debian's cron
    reads them when clocks go forward or back: what falls into the hour that is left out runs right after it, what falls
    into the hour that comes twice runs once, and what has a ``*`` in its hours or minutes just goes on.

    `vms` are names or patterns (``web*``) of registered VMs, or ``tag:`` and a tag (or a pattern of tags) that their
    hypervisor gives them, see `vmsnap.roles.Hypervisor.tags`. In one slot they come in this `order`: ``fixed`` (as
    the patterns stand, then by name), ``random``, or ``least-recent`` (whose last success is the oldest first), at most
    `at_once` of them together. Each waits a random time up to `jitter_seconds`. They start inside of one of the `only`
    windows, where there are any, and never inside of a `never` window; what is due then waits. Slots that were missed
    are caught up with one run, unless `catch_up` is off.

    `verb` is ``backup``, or ``verify`` for the newest backup of each VM; `boot` makes it bring that up too. A failure
    is tried again `retries` times, first after `retry_seconds`, then after twice as long each time.

    `keep` are rules of retention, such as ``{"daily": 7}``; they count for the backups of this schedule alone, which
    carry the tag ``schedule:NAME``. `repository` is its URL, empty for the configured one.
    """

    name: str
    cron: str
    vms: tuple[str, ...] = ("*",)
    verb: str = "backup"
    boot: bool = False
    timezone: str = ""
    order: str = "fixed"
    at_once: int = 1
    jitter_seconds: int = 0
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    catch_up: bool = True
    repository: str = ""
    mode: str = "live"
    max_pause_seconds: float = 5.0
    keep_duplicate: bool = False
    tags: tuple[str, ...] = ()
    keep: Mapping[str, int] = field(default_factory=dict)
    retries: int = 3
    retry_seconds: int = 60

    def __post_init__(self) -> None:
        """:raises UsageError: something is wrong; the message names it"""
        check_name(self.name, "schedule name")
        for what, value, known in (
            ("verb", self.verb, VERBS),
            ("order", self.order, ORDERS),
            ("mode", self.mode, MODES),
        ):
            if value not in known:
                raise self._wrong(f"{value!r} is no {what}", f"one of: {', '.join(known)}")
        if not self.vms:
            raise self._wrong("it names no VM", "name VMs or patterns such as 'web*'; '*' is all")
        for pattern in self.vms:
            _check_text(self.name, "VM pattern", pattern, 100)
        for tag in self.tags:
            _check_text(self.name, "tag", tag, 200)
        for key, count in self.keep.items():
            if key not in KEEPS or not 0 <= count <= 100_000:
                raise self._wrong(f"{key!r}: {count} is no rule of retention", f"keys: {', '.join(KEEPS)}")
        limits = (
            ("at_once", self.at_once, 1, 1000),
            ("jitter_seconds", self.jitter_seconds, 0, 7 * 86400),
            ("retries", self.retries, 0, 100),
            ("retry_seconds", self.retry_seconds, 1, 86400),
            ("max_pause_seconds", self.max_pause_seconds, 0.001, 3600),
        )
        for key, number, least, most in limits:
            if not least <= number <= most:
                raise self._wrong(f"{key} is {number}", f"it goes from {least} to {most}")
        _ = self.zone, self.only_windows, self.never_windows
        self._check_cron()

    def _check_cron(self) -> None:
        from cronsim import CronSimError

        if len(self.cron.split()) != 5 or len(self.cron) > 200:
            raise self._wrong(f"{self.cron!r} is no cron expression", "it has five fields, such as '30 2 * * *'")
        try:
            found = next_slot(self, datetime(2024, 1, 1, tzinfo=UTC))
        except CronSimError as e:
            raise self._wrong(f"{self.cron!r} is no cron expression: {e}", "such as '30 2 * * *'") from None
        if found is None:
            raise self._wrong(f"{self.cron!r} never comes", "there is no such day")

    def _wrong(self, what: str, cure: str) -> UsageError:
        return UsageError(f"schedule {self.name}: {what}", cure=cure)

    @property
    def zone(self) -> tzinfo:
        """Its time zone.

        :raises UsageError: the host does not know it
        """
        return zone_of(self.timezone)

    @property
    def only_windows(self) -> tuple[Window, ...]:
        """`only`, read."""
        return tuple(parse_window(text) for text in self.only)

    @property
    def never_windows(self) -> tuple[Window, ...]:
        """`never`, read."""
        return tuple(parse_window(text) for text in self.never)

    @property
    def tag(self) -> str:
        """The tag that its backups carry."""
        return SCHEDULE_TAG + self.name

    @property
    def names_tags(self) -> bool:
        """Whether it means VMs by their tags."""
        return any(pattern.startswith(TAG_PREFIX) for pattern in self.vms)

    def chosen(self, vms: Iterable[str], tags: Mapping[str, Collection[str]] | None = None) -> list[str]:
        """Those of the VMs that it means: in the order of its patterns, then by name; each once.

        :param tags: of the VMs that have any
        """
        found: dict[str, None] = {}
        names = sorted(vms)
        for pattern in self.vms:
            for vm in names:
                texts = (tags or {}).get(vm, ()) if pattern.startswith(TAG_PREFIX) else (vm,)
                if any(fnmatchcase(text, pattern.removeprefix(TAG_PREFIX)) for text in texts):
                    found[vm] = None
        return list(found)

    def retry_after(self, attempt: int) -> timedelta:
        """How long to wait after try number `attempt` (from 1) has failed."""
        return timedelta(seconds=min(self.retry_seconds * 2 ** min(attempt - 1, 20), LONGEST_RETRY_SECONDS))


def zone_of(name: str) -> tzinfo:
    """The time zone of that name; the host's where it is empty.

    :raises UsageError: there is none
    """
    if not name:
        if not _LOCAL_ZONE.exists():
            return UTC
        with _LOCAL_ZONE.open("rb") as file:
            return ZoneInfo.from_file(file, key="localtime")
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(
            f"{name[:80]!r} is no time zone", cure="such as Europe/Berlin; tzdata must be installed"
        ) from None


def slots_after(schedule: Schedule, after: datetime, until: datetime) -> list[datetime]:
    """Its slots behind `after` and up to `until`, in order, UTC."""
    found = []
    for slot in _slots(schedule, after):
        if slot > until:
            break
        found.append(slot)
    return found


def latest_slot(schedule: Schedule, after: datetime, until: datetime) -> datetime | None:
    """The last of its slots behind `after` and up to `until`, UTC; None where there is none. Does not look at all of
    them: they may be half a million.
    """
    for back in _LOOKS_BACK:
        begin = max(after, until - back)
        found = slots_after(schedule, begin, until)
        if found:
            return found[-1]
        if begin == after:
            return None
    return None


def next_slot(schedule: Schedule, after: datetime) -> datetime | None:
    """Its first slot behind `after`, UTC; None where none comes in the next fifty years."""
    return next(iter(_slots(schedule, after)), None)


def _slots(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    from cronsim import CronSim

    # Begun an hour or two early: in the hour that comes twice the clock on the wall does not say where one stands.
    for slot in CronSim(schedule.cron, (after - timedelta(hours=3)).astimezone(schedule.zone)):
        utc = slot.astimezone(UTC)
        if utc > after:
            yield utc


def schedule_from(values: Mapping[str, Any]) -> Schedule:
    """The schedule of those fields, read strictly: from TOML, JSON or a command line.

    :raises UsageError: an unknown field, or one with a wrong value
    """
    import msgspec

    known = {each.name for each in dataclasses.fields(Schedule)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"a schedule has no {unknown[0]!r}", cure=f"it has: {', '.join(sorted(known))}")
    try:
        return msgspec.convert(dict(values), Schedule)
    except msgspec.ValidationError as e:
        cause = e.__cause__
        if isinstance(cause, UsageError):
            raise cause from None
        raise UsageError(
            f"schedule {values.get('name', '')!r}: {e}", cure="see the documentation of schedules"
        ) from None


def fields_of(schedule: Schedule) -> dict[str, Any]:
    """Its fields as JSON has them."""
    import msgspec

    # Field by field: a default that was never set is no part of the object's own state, and would be left out.
    return {each.name: msgspec.to_builtins(getattr(schedule, each.name)) for each in dataclasses.fields(schedule)}


def _check_text(schedule: str, what: str, text: str, longest: int) -> None:
    if not text or len(text) > longest or not text.isprintable() or text.startswith("-"):
        raise UsageError(
            f"schedule {schedule}: {text[:80]!r} is no {what}", cure="printable characters, no dash in front"
        )
