"""The schedules of this host: those that were added, in the host's database, and those of the configuration file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmsnap.agent.jobs import NewJob, insert_job
from vmsnap.agent.schedule import Schedule, fields_of, schedule_from
from vmsnap.database import Database
from vmsnap.errors import AlreadyExists, NotFound, UsageError


@dataclass(frozen=True)
class ScheduleRow:
    """A schedule as it stands. Its slots up to `decided_ns` (nanoseconds since 1970) have been looked at. `configured`:
    it stands in the configuration file, and can only be changed there.
    """

    schedule: Schedule
    decided_ns: int
    paused: bool = False
    configured: bool = False


def configured_schedules(tables: Mapping[str, Mapping[str, Any]]) -> tuple[Schedule, ...]:
    """The schedules of the configuration file's ``[schedule.NAME]`` tables.

    :raises UsageError: one is wrong
    """
    for name, table in tables.items():
        if "name" in table:
            raise UsageError(f"[schedule.{name}] has a name already", cure="leave 'name' out")
    return tuple(schedule_from({"name": name, **table}) for name, table in tables.items())


class Schedules:
    """All schedules. Each change is one durable transaction."""

    def __init__(self, database: Database, configured: Sequence[Schedule] = ()) -> None:
        self._database = database
        self._configured = {schedule.name: schedule for schedule in configured}
        self.unusable: dict[str, str] = {}
        """Those that `rows` left out when it was last asked, and why: the host may have lost a time zone."""

    def add(self, schedule: Schedule) -> None:
        """Enter a schedule; its first slot is the first from now on.

        :raises AlreadyExists: there is one of that name
        """
        cure = "choose another name, or: vmsnap schedule remove"
        if schedule.name in self._configured:
            raise AlreadyExists(f"the configuration file has a schedule {schedule.name!r}", cure=cure)
        with self._database.transaction() as db:
            if db.execute("SELECT 1 FROM schedule WHERE schedule = ?", (schedule.name,)).fetchone():
                raise AlreadyExists(f"there is a schedule {schedule.name!r}", cure=cure)
            db.execute("INSERT INTO schedule VALUES (?, ?)", (schedule.name, json.dumps(fields_of(schedule))))
            db.execute("INSERT OR REPLACE INTO schedule_state VALUES (?, ?, 0)", (schedule.name, time.time_ns()))

    def remove(self, name: str) -> None:
        """Strike a schedule out, one that is not usable too; its queued jobs are cancelled, those that run go on.

        :raises NotFound: there is none of that name
        :raises UsageError: it stands in the configuration file
        """
        rows = {row.schedule.name: row for row in self.rows()}
        if name not in rows and name not in self.unusable:
            raise _unknown(name)
        if name in self._configured:
            raise UsageError(f"schedule {name!r} stands in the configuration file", cure="remove it there, or pause it")
        with self._database.transaction() as db:
            db.execute("DELETE FROM schedule WHERE schedule = ?", (name,))
            db.execute("DELETE FROM schedule_state WHERE schedule = ?", (name,))
            db.execute(
                "UPDATE job SET state = 'cancelled', ended_ns = ?, message = 'its schedule was removed', settled = 1"
                " WHERE schedule = ? AND state = 'queued'",
                (time.time_ns(), name),
            )

    def pause(self, name: str, paused: bool) -> ScheduleRow:
        """Let a schedule rest, or go on: what fell into the rest is not caught up. Idempotent.

        :raises NotFound: there is none of that name
        """
        found = self.get(name)
        if found.paused != paused:
            decided_ns = found.decided_ns if paused else time.time_ns()
            with self._database.transaction() as db:
                db.execute("INSERT OR REPLACE INTO schedule_state VALUES (?, ?, ?)", (name, decided_ns, int(paused)))
        return self.get(name)

    def enter_run(self, name: str, decided_ns: int, before_ns: int, new: Sequence[NewJob]) -> list[int]:
        """Enter, in one transaction, that its slots up to `decided_ns` have been looked at, and the jobs that come of
        it; returns their numbers. Nothing, where somebody else has looked since `before_ns`.
        """
        with self._database.transaction() as db:
            known = db.execute(
                "UPDATE schedule_state SET decided_ns = ? WHERE schedule = ? AND decided_ns = ?",
                (decided_ns, name, before_ns),
            )
            return [insert_job(db, each) for each in new] if known.rowcount else []

    def get(self, name: str) -> ScheduleRow:
        """One schedule.

        :raises NotFound: there is none of that name
        """
        for row in self.rows():
            if row.schedule.name == name:
                return row
        raise _unknown(name)

    def rows(self) -> list[ScheduleRow]:
        """All of them that can be used, by name. One that is new in the configuration file begins now."""
        states = {row["schedule"]: row for row in self._database.rows("SELECT * FROM schedule_state")}
        found, unusable = dict(self._configured), {}
        for row in self._database.rows("SELECT * FROM schedule"):
            # One that is in the file too is the file's.
            try:
                found.setdefault(row["schedule"], schedule_from(json.loads(row["data"])))
            except UsageError as e:
                unusable[row["schedule"]] = str(e)
        self.unusable = unusable
        now = time.time_ns()
        new = [name for name in found if name not in states]
        if new:
            with self._database.transaction() as db:
                db.executemany("INSERT OR IGNORE INTO schedule_state VALUES (?, ?, 0)", [(name, now) for name in new])
        return [
            ScheduleRow(
                schedule,
                states[name]["decided_ns"] if name in states else now,
                bool(states[name]["paused"]) if name in states else False,
                name in self._configured,
            )
            for name, schedule in sorted(found.items())
        ]


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no schedule {name!r}", cure="see: vmsnap schedule list")
