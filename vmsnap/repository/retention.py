"""Which backups are kept: a policy, and what it says of each backup. Pure: no clock, no storage.

Each VM is looked at by itself. A rule such as ``daily 7`` keeps the newest backup of each of the newest seven days
that have one; days, ISO weeks, months and years are those of UTC. A backup is kept when any rule keeps it. The newest
backup of a VM is kept whatever the rules say: a VM whose backups have failed for long must not lose its last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Protocol

from vmsnap.errors import UsageError

_UNITS = (("y", 365 * 86400), ("w", 7 * 86400), ("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


class Dated(Protocol):
    """What retention has to know of a backup; a `Manifest` has it. `time` is RFC 3339."""

    @property
    def backup(self) -> str:
        """Its id."""

    @property
    def vm(self) -> str:
        """The VM that it is of."""

    @property
    def time(self) -> str:
        """When it was made."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags."""


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """What is kept of each VM. The numbers count backups (`last`) or the newest hours, days, ISO weeks, months and
    years that have a backup; `within_seconds` keeps all that are no older; `tags` keeps what has one of them.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within_seconds: int | None = None
    tags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """:raises UsageError: a number is negative, or the policy says of nothing that it is to be kept"""
        for name in _COUNTED:
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} is no number of backups to keep")
        if self.within_seconds is not None and self.within_seconds <= 0:
            raise UsageError("a duration of nothing keeps nothing", cure="give one such as 30d")
        if not any(getattr(self, field.name) for field in fields(self)):
            raise UsageError(
                "the policy keeps nothing", cure="say what to keep, for example --keep-last 3 --keep-daily 7"
            )


@dataclass(frozen=True)
class Verdict:
    """What a policy says of one backup. `reasons` are why it is kept, for people: ``last 1 of 3``, ``daily 2 of 7``,
    ``within 30 d``, ``tag release``, ``the newest``; without any it is to be removed.
    """

    backup: str
    vm: str
    time: str
    reasons: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the backup stays."""
        return bool(self.reasons)


def apply(policy: RetentionPolicy, backups: Iterable[Dated], now: datetime) -> tuple[Verdict, ...]:
    """What `policy` says of each backup, by VM, the oldest first. The order of `backups` does not matter.

    Adding to a policy never removes more, and what it has kept it keeps when it is applied again. A backup whose time
    cannot be read is kept.

    :param now: with its time zone; what `within_seconds` counts from
    """
    by_vm: dict[str, list[Dated]] = {}
    for backup in backups:
        by_vm.setdefault(backup.vm, []).append(backup)
    return tuple(verdict for vm in sorted(by_vm) for verdict in _of_one_vm(policy, by_vm[vm], now))


def duration_text(seconds: int) -> str:
    """A duration for people, in the largest unit that it is whole in: ``30 d``, ``2 w``, ``36 h``."""
    unit, length = next((unit, length) for unit, length in _UNITS if seconds % length == 0)
    return f"{seconds // length} {unit}"


# What makes two backups count as one: the hour, the day, … by UTC.
_BUCKETS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda time: (time.date(), time.hour),
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}
_COUNTED = ("last", *_BUCKETS)


def _of_one_vm(policy: RetentionPolicy, backups: Sequence[Dated], now: datetime) -> Iterator[Verdict]:
    times = {backup.backup: _time_of(backup) for backup in backups}
    reasons: dict[str, list[str]] = {backup.backup: [] for backup in backups}
    newest_first = sorted(
        ((time, backup) for backup, time in times.items() if time is not None), key=lambda found: found, reverse=True
    )
    for number, (_, backup) in enumerate(newest_first[: policy.last], 1):
        reasons[backup].append(f"last {number} of {policy.last}")
    for name, bucket_of in _BUCKETS.items():
        for number, backup in enumerate(_newest_of_each(newest_first, bucket_of, getattr(policy, name)), 1):
            reasons[backup].append(f"{name} {number} of {getattr(policy, name)}")
    if policy.within_seconds is not None:
        for time, backup in newest_first:
            if (now - time).total_seconds() <= policy.within_seconds:
                reasons[backup].append(f"within {duration_text(policy.within_seconds)}")
    for found in backups:
        reasons[found.backup] += [f"tag {tag}" for tag in sorted(policy.tags.intersection(found.tags))]
        if times[found.backup] is None:
            reasons[found.backup].append("its time cannot be read")
    if newest_first and not reasons[newest_first[0][1]]:
        reasons[newest_first[0][1]].append("the newest")
    for found in sorted(backups, key=lambda found: (found.time, found.backup)):
        yield Verdict(found.backup, found.vm, found.time, tuple(reasons[found.backup]))


def _newest_of_each(
    newest_first: Sequence[tuple[datetime, str]], bucket_of: Callable[[datetime], object], buckets: int
) -> list[str]:
    found: dict[object, str] = {}
    for time, backup in newest_first:
        if len(found) >= buckets:
            break
        found.setdefault(bucket_of(time), backup)
    return list(found.values())


def _time_of(backup: Dated) -> datetime | None:
    try:
        time = datetime.fromisoformat(backup.time)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
