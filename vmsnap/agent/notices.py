"""Completion notices: who is told of a job that ended, tried again until it is delivered or given up."""

from __future__ import annotations

import hashlib
import hmac
import json
import shlex
import smtplib
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import EmailMessage
from typing import Any

from vmsnap.agent.jobs import DONE, Job
from vmsnap.agent.settings import NoticeTarget, host_and_port
from vmsnap.database import Database
from vmsnap.errors import VmsnapError
from vmsnap.secret import from_file

ATTEMPTS = 10
"""Over about a day and a half; then a notice is given up, and the log says so."""
_FIRST_WAIT_SECONDS = 30
_LONGEST_WAIT_SECONDS = 6 * 3600
_TIMEOUT_SECONDS = 20.0
_AT_ONCE = 20


def notices_of(job: Job, targets: Mapping[str, NoticeTarget], result: Any) -> list[tuple[str, str]]:
    """Who is to be told of a job that ended, each with what; see `Jobs.settle`."""
    body = json.dumps({"event": "job", **job_document(job), "result": result}, sort_keys=True)
    return [(name, body) for name, target in targets.items() if target.on == "all" or job.state != DONE]


def job_document(job: Job) -> dict[str, Any]:
    """A job as JSON shows it."""
    from vmsnap.agent.times import utc_time

    return {
        "job": job.job,
        "verb": job.verb,
        "vm": job.vm,
        "repository": job.repository,
        "arguments": list(job.arguments),
        "schedule": job.schedule,
        "slot": utc_time(job.slot_ns),
        "attempt": job.attempt,
        "requester": job.requester,
        "state": job.state,
        "created": utc_time(job.created_ns),
        "not_before": utc_time(job.not_before_ns or None),
        "begun": utc_time(job.begun_ns),
        "ended": utc_time(job.ended_ns),
        "exit_code": job.exit_code,
        "message": job.message,
    }


class Notices:
    """The notices that are to be delivered, in the host's database."""

    def __init__(self, database: Database, targets: Mapping[str, NoticeTarget], say: Callable[[str], None]) -> None:
        self._database = database
        self._targets = targets
        self._say = say

    def deliver(self) -> float | None:
        """Deliver what is due, each with a time limit; returns in how many seconds the next is, None: none is left.

        Blocks. One that was delivered just before a crash is delivered again.
        """
        now = time.time_ns()
        for row in self._database.rows(
            "SELECT * FROM notice WHERE next_ns <= ? ORDER BY notice LIMIT ?", now, _AT_ONCE
        ):
            target = self._targets.get(row["target"])
            failure = "nobody of that name is configured any more" if target is None else self._try(target, row["body"])
            if not failure or target is None or row["attempts"] + 1 >= ATTEMPTS:
                if failure:
                    self._say(f"notice to {row['target']} is given up: {failure}")
                with self._database.transaction() as db:
                    db.execute("DELETE FROM notice WHERE notice = ?", (row["notice"],))
                continue
            wait = min(_FIRST_WAIT_SECONDS * 2 ** row["attempts"], _LONGEST_WAIT_SECONDS)
            self._say(f"notice to {row['target']} failed, next try in {wait} s: {failure}")
            with self._database.transaction() as db:
                db.execute(
                    "UPDATE notice SET attempts = attempts + 1, next_ns = ? WHERE notice = ?",
                    (time.time_ns() + wait * 10**9, row["notice"]),
                )
        left = self._database.rows("SELECT min(next_ns) AS next_ns FROM notice")[0]["next_ns"]
        return None if left is None else max(0.0, (left - time.time_ns()) / 1e9)

    def waiting(self) -> int:
        """How many are not delivered."""
        return int(self._database.rows("SELECT count(*) AS number FROM notice")[0]["number"])

    def _try(self, target: NoticeTarget, body: str) -> str:
        """Deliver one; returns why it failed, empty where it did not."""
        try:
            if target.webhook:
                _post(target, body.encode())
            elif target.command:
                _run(target.command, body)
            else:
                _mail(target, json.loads(body))
        except (VmsnapError, OSError, subprocess.SubprocessError, smtplib.SMTPException, ValueError) as e:
            return f"{type(e).__name__}: {e}"
        return ""


def _post(target: NoticeTarget, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "vmsnap"}
    if target.secret_file:
        key = from_file(target.secret_file, "webhook secret").encode()
        headers["X-Vmsnap-Signature"] = f"sha256={hmac.new(key, body, hashlib.sha256).hexdigest()}"
    request = urllib.request.Request(target.webhook, data=body, headers=headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_SECONDS):
            return
    except urllib.error.HTTPError as e:
        with e:
            raise ValueError(f"the webhook answered {e.code}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What a job did goes where the configuration says, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """None: not followed."""
        return


def _run(command: str, body: str) -> None:
    done = subprocess.run(
        shlex.split(command),
        input=body,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"the command ended with status {done.returncode}")


def _mail(target: NoticeTarget, job: Mapping[str, Any]) -> None:
    message = EmailMessage()
    message["From"], message["To"] = target.sender, target.email
    about = job["vm"] or job["repository"] or "this host"
    message["Subject"] = f"vmsnap: {job['verb']} of {about}: {job['state']}"
    message.set_content("\n".join(f"{key}: {value}" for key, value in job.items() if value not in ("", None)))
    host, port = host_and_port(target.smtp, "smtp")
    with smtplib.SMTP(host, port, timeout=_TIMEOUT_SECONDS) as server:
        server.send_message(message)
