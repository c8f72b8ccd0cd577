"""The guardian: a process outside the worker that sees to it that a paused guest runs again, whatever happens to us.

The worker starts it before the capture begins (a Python start is slow, so never inside the pause), arms it with a
deadline before the pause, disarms it after the resume, and dismisses it when the copy of the memory is complete:
until then a hypervisor may depend on the worker (QEMU 7.2 leaves the guest's pages write-protected when their
reader dies).

It acts when the worker is gone, or has let go of it, without having dismissed it, or when an armed deadline passes.
A monitor may serve one client only, so it first makes sure that a worker that hangs is gone (SIGKILL), and then has
a driver instance of its own resume the VM, again and again until it executes, and clean up after the capture.

It runs in a session of its own, so that neither a closed terminal nor a signal to the worker's process group
reaches it; and, where it may, outside of the worker's control group, as a service manager ends a service by killing all
that is in its group (systemd.kill(5), ``KillMode=control-group``), and out of reach of the kernel's out-of-memory
killer.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from vmsnap.errors import VmGone, VmsnapError
from vmsnap.locks import GUARDIAN, vm_lock
from vmsnap.model import VmState, from_json, to_json
from vmsnap.roles import DriverContext, Hypervisor

START_TIMEOUT_SECONDS = 20.0
RETRY_SECONDS = 0.2
AGAIN_SECONDS = 2.0
"""Between two tries of recovery, where the VM cannot be seen to."""
GIVE_UP_SECONDS = 3600.0
KILL_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Charge:
    """What a guardian is told of the VM it guards."""

    vm: str
    hypervisor: str
    options: Mapping[str, str]
    context: DriverContext
    worker_pid: int


class Guard(Protocol):
    """What the controller needs of a guardian."""

    def arm(self, seconds: float) -> None:
        """From now on the guest may stand still, for `seconds` at most."""

    def disarm(self) -> None:
        """The guest runs again."""

    def dismiss(self) -> None:
        """The capture is over, the guardian ends. Idempotent."""

    def hand_over(self) -> None:
        """The worker cannot set things right: the guardian is to do it, now, and on its own."""


class Guardian:
    """The worker's side: starts the guardian process and talks to it over a pipe."""

    def __init__(self, charge: Charge) -> None:
        """Start the process and wait until it is ready, some 0.2 s.

        :raises VmsnapError: it did not start; nothing may be paused without it
        """
        log = charge.context.state_dir / "guardian.log"
        with log.open("ab") as errors:
            log.chmod(0o600)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vmsnap.guardian"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                cwd="/",
                # It must import the drivers that this process can import.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._say(to_json(charge))
        ready, _, _ = select.select([self._output()], [], [], START_TIMEOUT_SECONDS)
        if not ready or self._output().readline() != b"ready\n":
            self._process.kill()
            self._process.wait()
            raise VmsnapError("the guardian process did not start, so nothing was paused", cure=f"see {log}")

    def arm(self, seconds: float) -> None:
        """From now on the guest may stand still, for `seconds` at most.

        :raises VmsnapError: the guardian is gone; do not pause
        """
        self._say(f"arm {time.monotonic() + seconds!r}")

    def disarm(self) -> None:
        """The guest runs again.

        :raises VmsnapError: the guardian is gone
        """
        self._say("disarm")

    def dismiss(self) -> None:
        """End the guardian and wait for it. Idempotent."""
        if self._process.poll() is None:
            with contextlib.suppress(VmsnapError):  # gone between the look and the word: what was wanted
                self._say("dismiss")
        self.hand_over()
        self._output().close()
        self._process.wait()

    def hand_over(self) -> None:
        """Let go of the guardian, which then resumes the VM; the caller has given its own connection back."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _say(self, line: str) -> None:
        stdin = self._process.stdin
        try:
            if stdin is None or stdin.closed:
                raise BrokenPipeError
            stdin.write(line.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise VmsnapError("the guardian process is gone", cure="try again; see guardian.log") from None

    def _output(self) -> IO[bytes]:
        if self._process.stdout is None:
            raise VmsnapError("the guardian process has no output")
        return self._process.stdout


class NoGuard:
    """Guards nothing: for VMs that do not execute, and for tests of what is not about the guardian."""

    def arm(self, seconds: float) -> None:
        """Do nothing."""

    def disarm(self) -> None:
        """Do nothing."""

    def dismiss(self) -> None:
        """Do nothing."""

    def hand_over(self) -> None:
        """Do nothing."""


def start_for(context: DriverContext, vm: str, hypervisor: str, options: Mapping[str, str]) -> Guard:
    """Start a guardian of one VM, that acts when the calling process dies.

    :raises VmsnapError: it did not start
    """
    return Guardian(Charge(vm, hypervisor, options, context, os.getpid()))


def main() -> None:
    """The guardian process: reads a `Charge` and then words, one a line, from standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _get_out_of_reach()
    words = _Words(sys.stdin.fileno())
    charge = from_json(words.next(None) or "", Charge)
    worker = os.pidfd_open(charge.worker_pid)
    from vmsnap import registry

    driver = registry.hypervisor(charge.hypervisor)
    hypervisor = driver(charge.vm, charge.context, charge.options)
    os.write(sys.stdout.fileno(), b"ready\n")
    deadline: float | None = None
    while True:
        word = words.next(deadline)
        if word == "disarm":
            deadline = None
        elif word == "dismiss":
            return
        elif word is not None and word.startswith("arm "):
            deadline = float(word.removeprefix("arm "))
        else:
            break
    if not words.ended:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile: what was wanted
            signal.pidfd_send_signal(worker, signal.SIGKILL)
        select.select([worker], [], [], KILL_TIMEOUT_SECONDS)
    why = "the worker was gone or had given up" if words.ended else "its pause passed the limit"
    _set_right(charge, hypervisor, why)


def _set_right(charge: Charge, hypervisor: Hypervisor, why: str) -> None:
    """Make the VM execute, trying again until it does or is gone; then, under the VM's lock, recover the rest.

    The guest comes before everything that could fail or hang: the log, the lock, the database. Where recovery cannot
    see to it that the VM executes, the guardian stays: what hangs may yet do what the worker asked of it, such as to
    stop the guest.
    """
    _until_done(charge, hypervisor, hypervisor.resume, f"made to execute: {why}")
    # Whoever holds the lock may need the monitor.
    hypervisor.close()
    give_up = time.monotonic() + GIVE_UP_SECONDS
    is_owed = True
    while is_owed and time.monotonic() < give_up:
        try:
            with vm_lock(charge.context.state_dir, charge.vm, GUARDIAN, patience_seconds=GIVE_UP_SECONDS):
                done, is_owed = _recover(charge, why)
        except (VmsnapError, OSError) as e:
            _log(f"{charge.vm}: {e}; vmsnap recover does the rest")
            return
        _log(f"{charge.vm}: recovered: {done}")
        if is_owed:
            time.sleep(AGAIN_SECONDS)


def _until_done(charge: Charge, hypervisor: Hypervisor, step: Callable[[], object], done: str) -> None:
    """Try `step` until it succeeds or the VM is gone, for an hour."""
    give_up = time.monotonic() + GIVE_UP_SECONDS
    while time.monotonic() < give_up:
        try:
            step()
        except VmGone as e:
            _log(f"{charge.vm}: {e.message}")
            return
        except Exception as e:  # noqa: BLE001 - whatever it is, the only right thing is to try again
            if _is_gone(hypervisor):
                _log(f"{charge.vm}: the VM is not there any more")
                return
            _log(f"{charge.vm}: {type(e).__name__}: {e}; trying again")
            hypervisor.close()
            time.sleep(RETRY_SECONDS)
        else:
            _log(f"{charge.vm}: {done}")
            return


def _is_gone(hypervisor: Hypervisor) -> bool:
    """Whether there is no VM any more; asked only when it could not be made to execute, as that comes first."""
    try:
        return hypervisor.state() in (VmState.ABSENT, VmState.ENDED)
    except Exception:  # noqa: BLE001 - it cannot be told, so that it is tried again
        return False


def _recover(charge: Charge, why: str) -> tuple[str, bool]:
    """Undo what the worker left, by the journal: the capture and the snapshots of its disks, since a guest must not go
    on writing to an overlay that nobody knows of. Enters that a guardian acted, and why. Returns what was done, one
    line, and whether it is still owed that the VM executes."""
    from vmsnap.controller.drivers import Drivers
    from vmsnap.controller.recovery import Recovery
    from vmsnap.database import Database
    from vmsnap.journal import Deed, Journal
    from vmsnap.vmtable import VmTable

    database = Database(charge.context.state_dir / "vmsnap.db")
    try:
        journal, table = Journal(database), VmTable(database)
        for row in journal.unfinished(charge.vm):
            if row.pid == charge.worker_pid:
                journal.open_operation(row.operation).did(Deed.now("guardian", f"made the VM execute: {why}"))
        done = Recovery(Drivers(charge.context), journal, table).run(charge.vm, locked=True)
        is_owed = any(row.executing and row.pid == charge.worker_pid for row in journal.unfinished(charge.vm))
    finally:
        database.close()
    return f"removed {list(done.removed)}, kept {list(done.kept)}", is_owed


def _get_out_of_reach() -> None:
    """Leave the control group of the worker for the topmost one, and be the last that the kernel kills when memory is
    short. Root may; whoever may not stays where he is.

    Of the hierarchies there are those count by which services are killed: that of version 2, and systemd's own of
    version 1 (cgroups(7)).
    """
    wanted = {Path("/proc/self/oom_score_adj"): "-1000"}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, kind = line.split()[4], line.partition(" - ")[2].split()
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and "name=systemd" in kind[2].split(",")):
            wanted[Path(place, "cgroup.procs")] = "0"
    for path, word in wanted.items():
        with contextlib.suppress(OSError):
            path.write_text(word)


def _log(line: str) -> None:
    text = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} guardian {os.getpid()}: {line}\n"
    with contextlib.suppress(OSError):  # a full disk must not keep the guest from running
        os.write(sys.stderr.fileno(), text.encode())


class _Words:
    """Lines from a pipe, waited for until a deadline."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pending = b""
        self.ended = False

    def next(self, deadline: float | None) -> str | None:
        """The next line; None when the pipe has ended (`ended` is set) or the deadline (CLOCK_MONOTONIC) has passed."""
        while b"\n" not in self._pending:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self._descriptor], [], [], wait)
            if not readable:
                return None
            data = os.read(self._descriptor, 65536)
            if not data:
                self.ended = True
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()


if __name__ == "__main__":
    main()
