"""The processes of jobs: one each, in a session of its own, so that it lives on when the agent does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsnap.agent.jobs import BROKEN_OFF, FAILED, RUNNING, STARTING, Job, Jobs
from vmsnap.durable import make_folder
from vmsnap.errors import NotFound

JOB_MODULE = "vmsnap.cli.jobprocess"
"""What such a process runs: a command line, with the job as its words."""


@dataclass(frozen=True)
class JobFiles:
    """Where the process of a job writes, beside its row: `progress` while it runs, and what it has said to people and
    to programs, for as long as it does.
    """

    progress: Path
    output: Path
    messages: Path

    @classmethod
    def of(cls, state_dir: Path, job: int) -> JobFiles:
        """The files of one job; nothing is made."""
        folder = state_dir / "agent"
        return cls(*(folder / f"{job}.{suffix}" for suffix in ("progress", "output", "messages")))

    def remove(self) -> None:
        """Remove them; idempotent."""
        for path in (self.progress, self.progress.with_suffix(".new"), self.output, self.messages):
            path.unlink(missing_ok=True)

    def read_progress(self) -> dict[str, Any] | None:
        """How far the job has come, as its process last said; None where it has said nothing."""
        try:
            found = json.loads(self.progress.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def last_message(self) -> str:
        """The last line that the process wrote for people."""
        try:
            with self.messages.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
                lines = file.read().decode("utf-8", "replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class JobProcesses:
    """Starts them, finds those of an agent that is gone, and sees how they end. Used by one thread."""

    def __init__(self, state_dir: Path, jobs: Jobs, environment: Mapping[str, str]) -> None:
        self._state_dir = state_dir
        self._jobs = jobs
        self._environment = dict(environment)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        make_folder(state_dir / "agent")

    def take_over(self) -> None:
        """Begin: what an agent before us was about to start is queued again."""
        for job in self._jobs.open():
            if job.state == STARTING:
                self._jobs.put_back(job.job)

    def start(self, job: Job) -> None:
        """Start the process of a queued job; one that cannot be started ends as failed."""
        if not self._jobs.starting(job.job):
            return
        files = JobFiles.of(self._state_dir, job.job)
        try:
            with _private(files.output) as output, _private(files.messages) as messages:
                self._children[job.job] = subprocess.Popen(
                    [sys.executable, "-m", JOB_MODULE, str(job.job)],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=messages,
                    start_new_session=True,
                    cwd="/",
                )
        except OSError as e:
            files.remove()
            self._jobs.end(job.job, FAILED, message=f"its process could not be started: {e.strerror}")

    def collect(self) -> None:
        """Enter those that ended without a word of their own."""
        for number, child in list(self._children.items()):
            code = child.poll()
            if code is None:
                continue
            del self._children[number]
            self._ended(number, f"its process ended with {_ending(code)}")
        for job in self._jobs.open():
            if job.state == RUNNING and job.job not in self._children and not job.process_alive():
                self._ended(job.job, "its process is gone")

    def cancel(self, job: Job) -> None:
        """Ask a running job to stop, as Ctrl-C does; it cleans up first. Idempotent."""
        if job.state == RUNNING and job.pid and job.process_alive():
            with suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGTERM)

    def watched(self) -> list[int]:
        """Descriptors, one for each process of a job, that are readable when it ends (pidfd_open(2)). The caller closes
        them.
        """
        pids = [child.pid for child in self._children.values()]
        pids += [job.pid for job in self._jobs.open() if job.state == RUNNING and job.pid and job.pid not in pids]
        found = []
        for pid in pids:
            with suppress(OSError):
                found.append(os.pidfd_open(pid))
        return found

    def _ended(self, number: int, how: str) -> None:
        files = JobFiles.of(self._state_dir, number)
        with suppress(NotFound):
            job = self._jobs.get(number)
            if not job.ended:
                said = files.last_message()
                message = f"{how}: {said}" if said else how
                # One that never took the job up has done nothing.
                state = BROKEN_OFF if job.state == RUNNING else FAILED
                self._jobs.end(number, state, message=message)
        files.remove()


def _private(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")


def _ending(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
