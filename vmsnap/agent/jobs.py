"""Jobs: what the agent is to do, does and has done, in the host's database."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmsnap.database import Database
from vmsnap.errors import NotFound, UsageError
from vmsnap.host import boot_id, process_start

QUEUED = "queued"
STARTING = "starting"
RUNNING = "running"
DONE = "done"
FAILED = "failed"
CANCELLED = "cancelled"
BROKEN_OFF = "broken off"
STATES = (QUEUED, STARTING, RUNNING, DONE, FAILED, CANCELLED, BROKEN_OFF)
"""``starting``: a process is being made for it. ``broken off``: its process ended without a word."""
ENDED = (DONE, FAILED, CANCELLED, BROKEN_OFF)

KEPT_SECONDS = 90 * 86400
"""How long a job that has ended stays, as long as the journal keeps an operation."""

_LONGEST_RESULT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job that is to be entered.

    `arguments` are those of the command line behind ``vmsnap``, without repository and secrets. `vm` is the VM that
    it works on, empty for one of the whole host or repository. `not_before_ns` is when it may start (nanoseconds since
    1970); `attempt` counts from 1. `slot_ns` is the slot of `schedule`. `key` makes asking twice give one job.
    """

    verb: str
    arguments: tuple[str, ...]
    vm: str = ""
    repository: str = ""
    schedule: str = ""
    slot_ns: int | None = None
    attempt: int = 1
    not_before_ns: int = 0
    requester: str = ""
    key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """A job as it stands. `exit_code` is the command's, None where it has not ended or was broken off; `message` is one
    line: why it failed. Times are nanoseconds since 1970.
    """

    job: int
    state: str
    created_ns: int
    begun_ns: int | None = None
    ended_ns: int | None = None
    exit_code: int | None = None
    message: str = ""
    pid: int | None = None
    process_start: int | None = None
    boot_id: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDED

    def process_alive(self) -> bool:
        """Whether the process that took it up still runs."""
        return self.pid is not None and self.boot_id == boot_id() and process_start(self.pid) == self.process_start


_COLUMNS = (
    "job, verb, arguments, vm, repository, schedule, slot_ns, attempt, not_before_ns, requester, key, state,"
    " created_ns, begun_ns, ended_ns, exit_code, message, pid, process_start, boot_id"
)


class Jobs:
    """The jobs of this host. Each change is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # -- entering

    def add(self, new: NewJob) -> tuple[Job, bool]:
        """Enter a job; returns it, and whether it is new: one of the same `key` is given back as it is.

        :raises UsageError: the key was used for something else
        """
        with self._database.transaction() as db:
            if new.key is not None:
                found = db.execute(f"SELECT {_COLUMNS} FROM job WHERE key = ?", (new.key,)).fetchone()
                if found:
                    job = _job(found)
                    if (job.verb, job.arguments, job.repository) != (new.verb, new.arguments, new.repository):
                        raise UsageError("the idempotency key was used for another request", cure="choose a new one")
                    return job, False
            number = insert_job(db, new)
        return self.get(number), True

    # -- looking

    def get(self, job: int) -> Job:
        """One job.

        :raises NotFound: there is none of that number
        """
        found = self._select("WHERE job = ?", job)
        if not found:
            raise NotFound(f"there is no job {job}")
        return found[0]

    def page(
        self, *, before: int | None = None, limit: int = 100, vm: str = "", state: str = "", schedule: str = ""
    ) -> list[Job]:
        """At most `limit` jobs, the newest first, of those with a smaller number than `before`."""
        conditions, values = _conditions({"vm": vm, "state": state, "schedule": schedule})
        if before is not None:
            conditions.append("job < ?")
            values.append(before)
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        return self._select(f"{where} ORDER BY job DESC LIMIT ?", *values, limit)

    def open(self) -> list[Job]:
        """All jobs that have not ended, oldest first."""
        return self._select(f"WHERE state IN ('{QUEUED}', '{STARTING}', '{RUNNING}') ORDER BY job")

    def unsettled(self) -> list[Job]:
        """Those that ended and whose follow-ups have not been entered yet, oldest first; a thousand at most."""
        return self._select("WHERE ended_ns IS NOT NULL AND settled = 0 ORDER BY job LIMIT 1000")

    def result(self, job: int) -> Any:
        """What the command reported as JSON; None where it reported nothing."""
        rows = self._database.rows("SELECT result FROM job WHERE job = ?", job)
        return json.loads(rows[0]["result"]) if rows and rows[0]["result"] else None

    def last_done_ns(self, verb: str) -> Mapping[str, int]:
        """When each VM last had a job of that verb done."""
        rows = self._database.rows(
            "SELECT vm, max(ended_ns) AS ended_ns FROM job WHERE verb = ? AND state = 'done' GROUP BY vm", verb
        )
        return {row["vm"]: row["ended_ns"] for row in rows}

    # -- going on

    def starting(self, job: int) -> bool:
        """Enter that a process is about to be made for a queued job; False where it is queued no longer."""
        return self._change(job, QUEUED, f"state = '{STARTING}'")

    def take_up(self, job: int, pid: int) -> bool:
        """Enter that process `pid` carries it out; False where another one does, or it was taken back."""
        values = (pid, process_start(pid) or 0, boot_id(), time.time_ns())
        what = f"state = '{RUNNING}', pid = ?, process_start = ?, boot_id = ?, begun_ns = ?"
        return self._change(job, STARTING, what, *values)

    def put_back(self, job: int) -> bool:
        """Enter that no process was made for a starting job: it is queued as before."""
        return self._change(job, STARTING, f"state = '{QUEUED}'")

    def end(self, job: int, state: str, *, exit_code: int | None = None, message: str = "", result: str = "") -> bool:
        """Enter how a job ended; False where it had ended before."""
        if len(result) > _LONGEST_RESULT:
            result = ""
        with self._database.transaction() as db:
            return bool(
                db.execute(
                    "UPDATE job SET state = ?, ended_ns = ?, exit_code = ?, message = ?, result = ?"
                    " WHERE job = ? AND ended_ns IS NULL",
                    (state, time.time_ns(), exit_code, message[:2000], result, job),
                ).rowcount
            )

    def cancel_queued(self, job: int, why: str) -> bool:
        """Take a queued job back; False where it is queued no longer."""
        what = f"state = '{CANCELLED}', ended_ns = ?, message = ?"
        return self._change(job, QUEUED, what, time.time_ns(), why)

    def settle(self, job: int, follow_ups: Sequence[NewJob], notices: Sequence[tuple[str, str]]) -> list[int]:
        """Enter, in one transaction, what follows from a job that ended, so that it follows once: jobs, and notices as
        pairs of whom they go to and their JSON. Returns the new jobs' numbers.
        """
        with self._database.transaction() as db:
            if not db.execute("UPDATE job SET settled = 1 WHERE job = ? AND settled = 0", (job,)).rowcount:
                return []
            now = time.time_ns()
            db.executemany(
                "INSERT INTO notice (target, body, attempts, next_ns, created_ns) VALUES (?, ?, 0, ?, ?)",
                [(target, body, now, now) for target, body in notices],
            )
            db.execute("DELETE FROM job WHERE settled = 1 AND ended_ns < ?", (now - KEPT_SECONDS * 10**9,))
            return [insert_job(db, new) for new in follow_ups]

    def _change(self, job: int, state: str, what: str, *values: object) -> bool:
        with self._database.transaction() as db:
            done = db.execute(f"UPDATE job SET {what} WHERE job = ? AND state = ?", (*values, job, state))
            return done.rowcount == 1

    def _select(self, where: str, *values: object) -> list[Job]:
        return [_job(row) for row in self._database.rows(f"SELECT {_COLUMNS} FROM job {where}", *values)]


def insert_job(db: sqlite3.Connection, new: NewJob) -> int:
    """Enter a job inside a transaction; returns its number."""
    row = db.execute(
        "INSERT INTO job (verb, arguments, vm, repository, schedule, slot_ns, attempt, not_before_ns, requester, key,"
        " state, created_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'queued', ?) RETURNING job",
        (
            new.verb,
            json.dumps(list(new.arguments)),
            new.vm,
            new.repository,
            new.schedule,
            new.slot_ns,
            new.attempt,
            new.not_before_ns,
            new.requester,
            new.key,
            time.time_ns(),
        ),
    ).fetchone()
    return int(row[0])


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["arguments"] = tuple(json.loads(values["arguments"]))
    return Job(**values)


def _conditions(wanted: Mapping[str, str]) -> tuple[list[str], list[object]]:
    found = [(f"{column} = ?", value) for column, value in wanted.items() if value]
    return [condition for condition, _ in found], [value for _, value in found]
