"""The process of one job of the agent: ``python -m vmsnap.cli.jobprocess NUMBER``. It is a command line whose words
stand in the database, and it enters there itself how it ended: that is known even if the agent is gone by then.

Standard output and error are files of the agent; the environment says where the state and the secrets are.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from vmsnap.errors import Interrupted

_INTERVAL_SECONDS = 0.3


def main() -> int:
    """Carry the job out; the exit code is the command's."""
    from vmsnap.agent.jobs import CANCELLED, DONE, FAILED, Jobs
    from vmsnap.agent.processes import JobFiles
    from vmsnap.cli.session import Session
    from vmsnap.database import FILE_NAME, Database
    from vmsnap.secret import take_from_environment

    take_from_environment()
    signal.signal(signal.SIGTERM, _stop)
    number = int(sys.argv[1])
    state_dir = Session().folders().state_dir
    files = JobFiles.of(state_dir, number)
    database = Database(state_dir / FILE_NAME)
    jobs = Jobs(database)
    if not jobs.take_up(number, os.getpid()):
        return 0
    job = jobs.get(number)
    code = _run_unless_stopped(
        ("--repository", job.repository) if job.repository else (), job.arguments, files.progress
    )
    sys.stdout.flush()
    # It is over: who asks it to stop now comes too late, and must not keep that from being entered.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    state = DONE if code == 0 else CANCELLED if code == Interrupted.exit_code else FAILED
    message = "" if state == DONE else files.last_message().removeprefix("vmsnap: ")
    jobs.end(number, state, exit_code=code, message=message, result=_report(files.output))
    files.remove()
    database.close()
    return code


def _run_unless_stopped(repository: tuple[str, ...], arguments: tuple[str, ...], progress: Path) -> int:
    try:
        return _run(repository, arguments, progress)
    except Interrupted as e:
        # Between take-up and the command's own handling of signals.
        print(e, file=sys.stderr, flush=True)  # noqa: T201 - the messages of the job
        return Interrupted.exit_code


def _run(repository: tuple[str, ...], arguments: tuple[str, ...], progress: Path) -> int:
    from vmsnap.cli.main import vmsnap
    from vmsnap.cli.progress import report_to

    report_to(_ProgressFile(progress))
    try:
        vmsnap(["--json", *repository, *arguments])
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0


class _ProgressFile:
    """A callback that keeps how far the job has come in a file, a few times a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_suffix(".new")
        self._written = 0.0
        self._phase = ""

    def __call__(self, progress: object) -> None:
        from vmsnap.controller.progress import Progress

        now = time.monotonic()
        if not isinstance(progress, Progress):
            return
        if progress.phase == self._phase and now - self._written < _INTERVAL_SECONDS:
            return
        self._written, self._phase = now, progress.phase
        shown = {"phase": progress.phase, "done_bytes": progress.done_bytes, "total_bytes": progress.total_bytes}
        try:
            self._new.write_text(json.dumps(shown))
            self._new.replace(self._path)
        except OSError:
            # A full disk must not fail a backup that does not need it.
            self._written = now + 60.0


def _report(output: Path) -> str:
    try:
        text = output.read_text()
        json.loads(text)
    except (OSError, ValueError):
        return ""
    return text


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
