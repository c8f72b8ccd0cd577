"""The agent's loop: sees how jobs ended, enters what follows, asks what is due, starts what may start, and sleeps until
something happens or is due. Everything that it knows stands in the database, so that it can die anywhere.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from vmsnap.agent.deciding import (
    Limits,
    due_run,
    nanoseconds,
    next_wake,
    prune_after,
    retry_of,
    startable,
)
from vmsnap.agent.house import Blueprint, House
from vmsnap.agent.jobs import BROKEN_OFF, DONE, Job, NewJob
from vmsnap.agent.notices import notices_of
from vmsnap.agent.processes import JobProcesses
from vmsnap.agent.schedule import Schedule
from vmsnap.agent.schedules import ScheduleRow
from vmsnap.errors import VmsnapError

LONGEST_SLEEP_SECONDS = 5.0
"""The clock may be set, another process may queue a job, and systemd wants to hear of us."""
REFRESH_SECONDS = 3600
"""How often the catalogue is brought up to date, for backups that others make in the same repository."""
TAGS_SECONDS = 900
"""How often hypervisors are asked for the tags of VMs, where schedules name tags."""

_CHANGES_BACKUPS = ("backup", "prune", "forget", "consolidate", "copy", "repair")


class Loop:
    """One for each host. `say` takes a line for the log."""

    def __init__(
        self,
        blueprint: Blueprint,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._house = House(blueprint)
        self._say = say
        self._clock = clock
        self._processes = JobProcesses(blueprint.state_dir, self._house.jobs, environment)
        self._refreshed: datetime | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        self._told_unusable: frozenset[str] = frozenset()
        self._tags_asked: datetime | None = None
        self._tags_job = 0
        self._tags_known = False

    # -- the whole

    def run(self, alive: Callable[[], None]) -> None:
        """Go on until `stop`; `alive` is called each time round. Jobs that run then go on without us."""
        self.begin()
        while not self._stopping:
            try:
                due = self.turn()
            except VmsnapError as e:
                # A full disk or a locked database passes, and jobs that run do not need us.
                self._say(f"trying again in a moment: {e}")
                due = None
            alive()
            self._sleep(due)

    def begin(self) -> None:
        """Take over from an agent before us, and recover the host before anything else starts."""
        self._processes.take_over()
        self._processes.collect()
        if not any(job.verb == "recover" and not job.vm for job in self._house.jobs.open()):
            self._house.jobs.add(NewJob(verb="recover", arguments=("recover",), requester="agent"))

    def turn(self) -> datetime | None:
        """Go round once; returns when to do so again at the latest, None: when something happens."""
        now = self._clock()
        self._processes.collect()
        rows = self._house.schedules.rows()
        self._tell_unusable(self._house.schedules.unusable)
        schedules = {row.schedule.name: row.schedule for row in rows}
        for job in self._house.jobs.unsettled():
            self._settle(job, schedules, now)
        tags_are_known = self._ask_for_tags(rows, now)
        for row in rows:
            if tags_are_known or not row.schedule.names_tags:
                self._look_at(row, now)
        self._refresh(now)
        wake = self._start(now, rows, schedules)
        slot = next_wake(now, rows)
        return min((each for each in (wake, slot) if each is not None), default=None)

    def wake(self) -> None:
        """Make a sleeping loop go round, from any thread or signal handler."""
        try:
            os.write(self._wake_write, b"w")
        except BlockingIOError:
            return  # so many have asked already

    def stop(self) -> None:
        """Make `run` return, from any thread or signal handler."""
        self._stopping = True
        self.wake()

    def cancel(self, job: Job) -> None:
        """Ask a running job to stop; it cleans up first."""
        self._processes.cancel(job)

    def close(self) -> None:
        """Close what is open; idempotent."""
        self._house.close()
        for fd in (self._wake_read, self._wake_write):
            if fd >= 0:
                os.close(fd)
        self._wake_read = self._wake_write = -1

    # -- its parts

    def _tell_unusable(self, unusable: dict[str, str]) -> None:
        for name in unusable.keys() - self._told_unusable:
            self._say(f"schedule {name} cannot be used: {unusable[name]}")
        self._told_unusable = frozenset(unusable)

    def _settle(self, job: Job, schedules: Mapping[str, Schedule], now: datetime) -> None:
        schedule = schedules.get(job.schedule)
        follow_ups = [each for each in (retry_of(job, schedule, now), prune_after(job, schedule)) if each]
        if job.state == BROKEN_OFF:
            recoveries = [open_job for open_job in self._house.jobs.open() if open_job.verb == "recover"]
            if not any(recovery.state == "queued" for recovery in recoveries):
                follow_ups.insert(0, NewJob(verb="recover", arguments=("recover",), requester="agent"))
        if job.verb in _CHANGES_BACKUPS and job.state == DONE and job.repository:
            targets = [word.removeprefix("--to=") for word in job.arguments if word.startswith("--to=")]
            follow_ups += self._house.refreshes([job.repository, *targets], everything=job.verb == "repair")
        # The agent's own housekeeping is told of when it fails, and not else.
        quiet = job.requester == "agent" and job.state == DONE
        told = {} if quiet else self._house.blueprint.settings.notify
        self._house.jobs.settle(job.job, follow_ups, notices_of(job, told, self._house.jobs.result(job.job)))
        about = f" of {job.vm}" if job.vm else ""
        self._say(f"job {job.job}, {job.verb}{about}: {job.state}{f': {job.message}' if job.message else ''}")

    def _look_at(self, row: ScheduleRow, now: datetime) -> None:
        due = due_run(row, now)
        decided_ns = nanoseconds(due.decided)
        if due.slot is None and abs(decided_ns - row.decided_ns) < 3600 * 10**9:
            return  # nothing is lost if that is not remembered, and the disk rests
        new: list[NewJob] = []
        if due.slot is not None and not due.passed_over:
            new = self._house.run_of(due.schedule, due.slot, now, "schedule")
            late = f", missed at {due.slot:%Y-%m-%d %H:%M} UTC and caught up" if due.missed else ""
            self._say(f"schedule {due.schedule.name}: {len(new)} jobs{late}")
        self._house.schedules.enter_run(due.schedule.name, decided_ns, row.decided_ns, new)

    def _refresh(self, now: datetime) -> None:
        if self._refreshed is not None and timedelta(0) <= now - self._refreshed < timedelta(seconds=REFRESH_SECONDS):
            return
        self._refreshed = now
        for new in self._house.refreshes(self._house.repositories()):
            self._house.jobs.add(new)

    def _ask_for_tags(self, rows: list[ScheduleRow], now: datetime) -> bool:
        """See to it that hypervisors are asked for the tags of VMs from time to time, where a schedule names any, by a
        job: they may hang. Returns whether they have been asked since we began; until then such schedules wait.
        """
        if not any(row.schedule.names_tags for row in rows):
            return True
        asked = self._tags_asked
        if asked is None or not timedelta(0) <= now - asked < timedelta(seconds=TAGS_SECONDS):
            self._tags_asked = now
            new = NewJob(verb="tags", arguments=("agent", "tags"), requester="agent")
            self._tags_job = self._house.jobs.add(new)[0].job
        if not self._tags_known:
            self._tags_known = self._house.jobs.get(self._tags_job).ended
        return self._tags_known

    def _start(self, now: datetime, rows: list[ScheduleRow], schedules: Mapping[str, Schedule]) -> datetime | None:
        settings = self._house.blueprint.settings
        limits = Limits(settings.jobs_at_once, settings.jobs_per_repository, settings.jobs_per_pool)
        paused = {row.schedule.name for row in rows if row.paused}
        jobs = self._house.jobs.open()
        pools = self._house.pools([job.vm for job in jobs])
        chosen, wake = startable(now, jobs, limits, schedules, paused, pools)
        for job in chosen:
            self._processes.start(job)
        return wake

    def _sleep(self, due: datetime | None) -> None:
        seconds = LONGEST_SLEEP_SECONDS
        if due is not None:
            seconds = min(seconds, max(0.0, (due - self._clock()).total_seconds()))
        watched = self._processes.watched()
        try:
            poll = select.poll()
            for fd in (self._wake_read, *watched):
                poll.register(fd, select.POLLIN)
            poll.poll(int(seconds * 1000) + 1)
        finally:
            for fd in watched:
                os.close(fd)
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return  # it was something else
