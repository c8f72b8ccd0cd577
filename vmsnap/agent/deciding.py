"""What to do next, from the clock, the schedules and the jobs. Pure: a test travels through time by calling it.

Two questions, asked in turn: which schedules have a slot that is due (`due_run`), and which jobs come of it
(`jobs_of_run`); which of the queued jobs may start now, and when is it worth asking again (`startable`).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from vmsnap.agent.jobs import QUEUED, Job, NewJob
from vmsnap.agent.schedule import Schedule, latest_slot, next_slot
from vmsnap.agent.schedules import ScheduleRow
from vmsnap.agent.windows import may_start, next_opening

SET_BACK = timedelta(hours=1)
"""A clock that goes back by more than this was wrong before: slots count from the new time on, and some come a second
time. One that goes back by less makes no slot run twice.
"""
LATE = timedelta(minutes=10)
"""A slot that is found later than this was missed."""

RETRIED_EXIT_CODES = (1, 5)
"""A failed call, and something that was busy: see `vmsnap.errors`. The others stay as they are until somebody acts."""

_SCHEDULED = "schedule"


@dataclass(frozen=True)
class Limits:
    """How many jobs run at once on this host, for each repository, and on VMs with a disk in each storage pool."""

    at_once: int = 2
    per_repository: int = 2
    per_pool: int = 2


@dataclass(frozen=True)
class DueRun:
    """What comes of a look at one schedule: `decided` is up to when it has been looked at; `slot` is the slot that is
    due, None where none is. `missed` says that it was not found in time, and `passed_over` that it is not caught up.
    """

    schedule: Schedule
    decided: datetime
    slot: datetime | None = None
    missed: bool = False
    passed_over: bool = False


def moment(ns: int) -> datetime:
    """Nanoseconds since 1970 as a time, UTC."""
    return datetime.fromtimestamp(ns / 1e9, UTC)


def nanoseconds(at: datetime) -> int:
    """The reverse, to the microsecond."""
    return int((at - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)) * 1000


def due_run(row: ScheduleRow, now: datetime) -> DueRun:
    """Which slot of a schedule is due: the last one since it was looked at, however many there were."""
    decided = moment(row.decided_ns)
    if decided > now:
        # As it was: nothing comes twice, unless the clock was so wrong that nothing would come for long.
        return DueRun(row.schedule, now if decided - now > SET_BACK else decided)
    if row.paused:
        return DueRun(row.schedule, now)
    slot = latest_slot(row.schedule, decided, now)
    if slot is None:
        return DueRun(row.schedule, now)
    missed = now - slot > LATE
    return DueRun(row.schedule, now, slot, missed, missed and not row.schedule.catch_up)


def jobs_of_run(
    schedule: Schedule,
    slot: datetime,
    now: datetime,
    vms: Collection[str],
    last_done_ns: Mapping[str, int],
    open_jobs: Sequence[Job],
    *,
    newest_backup: Mapping[str, str] | None = None,
    tags: Mapping[str, Collection[str]] | None = None,
    default_repository: str = "",
    requester: str = _SCHEDULED,
) -> list[NewJob]:
    """The jobs of one run of a schedule, one a VM, in the order in which they are to start.

    A VM for which the schedule has a job still open gets no second one, and one without a backup is not verified. The
    same slot gives the same order and jitter, whoever asks when.

    :param last_done_ns: when each VM last had such a job done
    :param newest_backup: for ``verify``: of each VM
    :param tags: of the VMs that have any
    """
    busy = {job.vm for job in open_jobs if job.schedule == schedule.name and job.verb == schedule.verb}
    chosen = schedule.chosen(vms, tags)
    if schedule.order == "random":
        _dice(schedule, slot, "order").shuffle(chosen)
    elif schedule.order == "least-recent":
        chosen.sort(key=lambda vm: last_done_ns.get(vm, 0))
    found = []
    for vm in chosen:
        backup = (newest_backup or {}).get(vm, "")
        if vm in busy or (schedule.verb == "verify" and not backup):
            continue
        jitter = timedelta(seconds=_dice(schedule, slot, vm).uniform(0, schedule.jitter_seconds))
        found.append(
            NewJob(
                verb=schedule.verb,
                arguments=arguments_of(schedule, vm, backup),
                vm=vm,
                repository=schedule.repository or default_repository,
                schedule=schedule.name,
                slot_ns=nanoseconds(slot),
                not_before_ns=nanoseconds(max(slot, now - LATE) + jitter),
                requester=requester,
            )
        )
    return found


def arguments_of(schedule: Schedule, vm: str, backup: str = "") -> tuple[str, ...]:
    """What the command line is given for one VM of a schedule, without the repository."""
    if schedule.verb == "verify":
        return ("verify", *(("--boot",) if schedule.boot else ()), "--", backup)
    tags = [word for tag in (schedule.tag, *schedule.tags) for word in ("--tag", tag)]
    held = ("--keep-duplicate",) if schedule.keep_duplicate else ()
    pause = ("--max-pause", repr(schedule.max_pause_seconds))
    return ("backup", "--mode", schedule.mode, *pause, *tags, *held, "--", vm)


def startable(
    now: datetime,
    jobs: Sequence[Job],
    limits: Limits,
    schedules: Mapping[str, Schedule],
    paused: Collection[str] = (),
    pools: Mapping[str, Collection[str]] | None = None,
) -> tuple[list[Job], datetime | None]:
    """The queued jobs that may start now, in order, and when the next one may that waits for a time alone; None where
    each waits for another to end.

    One VM has one job at a time. What somebody asked for comes before what a schedule did, and asks no window. Until
    a recovery of the whole host has ended nothing else starts.

    :param jobs: all that have not ended
    :param paused: the schedules that rest; their jobs do so too
    :param pools: the storage pools of each VM
    """
    running = [job for job in jobs if job.state != QUEUED]
    recoveries = [job for job in jobs if job.verb == "recover" and not job.vm]
    if recoveries:
        if any(job.state != QUEUED for job in recoveries):
            return [], None
        return recoveries[:1], None
    vms = {job.vm for job in running if job.vm}
    repositories = Counter(job.repository for job in running)
    pools_of = pools or {}
    in_pool = Counter(pool for job in running for pool in pools_of.get(job.vm, ()))
    of_schedule = Counter(job.schedule for job in running if job.schedule)
    room = limits.at_once - len(running)
    chosen: list[Job] = []
    wake: list[datetime] = []
    queued = sorted((job for job in jobs if job.state == QUEUED), key=lambda job: (bool(job.slot_ns), job.job))
    for job in queued:
        if job.schedule in paused and job.slot_ns is not None:
            continue
        schedule = schedules.get(job.schedule)
        opening = _opening(job, schedule, now)
        if opening is None or opening > now:
            wake += [opening] if opening is not None else []
            continue
        at_once = schedule.at_once if schedule else limits.at_once
        if (
            len(chosen) >= room
            or (job.vm and job.vm in vms)
            or repositories[job.repository] >= limits.per_repository
            or any(in_pool[pool] >= limits.per_pool for pool in pools_of.get(job.vm, ()))
            or (job.schedule and of_schedule[job.schedule] >= at_once)
        ):
            continue
        chosen.append(job)
        vms.add(job.vm)
        repositories[job.repository] += 1
        in_pool.update(pools_of.get(job.vm, ()))
        of_schedule[job.schedule] += 1
    return chosen, min(wake, default=None)


def next_wake(now: datetime, rows: Sequence[ScheduleRow]) -> datetime | None:
    """When the first slot of a schedule that does not rest comes; None where none does."""
    slots = [
        next_slot(row.schedule, max(now, moment(row.decided_ns) if moment(row.decided_ns) - now <= SET_BACK else now))
        for row in rows
        if not row.paused
    ]
    return min((slot for slot in slots if slot is not None), default=None)


def retry_of(job: Job, schedule: Schedule | None, now: datetime) -> NewJob | None:
    """The job that tries again what failed or was broken off; None where nobody is to."""
    broken_off = job.exit_code is None and job.state == "broken off"
    if schedule is None or job.state not in ("failed", "broken off") or job.attempt > schedule.retries:
        return None
    if not broken_off and job.exit_code not in RETRIED_EXIT_CODES:
        return None
    return NewJob(
        verb=job.verb,
        arguments=job.arguments,
        vm=job.vm,
        repository=job.repository,
        schedule=job.schedule,
        slot_ns=job.slot_ns,
        attempt=job.attempt + 1,
        not_before_ns=nanoseconds(now + schedule.retry_after(job.attempt)),
        requester=job.requester,
    )


def prune_after(job: Job, schedule: Schedule | None) -> NewJob | None:
    """The job that applies a schedule's rules of retention after one of its backups; None where it has none."""
    if schedule is None or job.verb != "backup" or job.state != "done" or not schedule.keep:
        return None
    rules = [word for key, count in schedule.keep.items() for word in (f"--keep-{key}", str(count))]
    return NewJob(
        verb="prune",
        arguments=("prune", *rules, "--tag", schedule.tag, "--vm", job.vm),
        vm=job.vm,
        repository=job.repository,
        schedule=job.schedule,
        slot_ns=job.slot_ns,
        requester=job.requester,
    )


def _opening(job: Job, schedule: Schedule | None, now: datetime) -> datetime | None:
    earliest = max(now, moment(job.not_before_ns))
    if schedule is None or job.slot_ns is None:
        return earliest
    only, never = schedule.only_windows, schedule.never_windows
    if earliest == now and may_start(now, schedule.zone, only, never):
        return now
    return next_opening(earliest, schedule.zone, only, never)


def _dice(schedule: Schedule, slot: datetime, what: str) -> random.Random:
    seed = hashlib.blake2b(f"{schedule.name}\0{slot.isoformat()}\0{what}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(seed))
