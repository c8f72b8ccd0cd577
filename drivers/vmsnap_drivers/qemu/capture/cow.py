"""Copy on write: QEMU protects the guest's pages, lets it run, and writes each page out before it changes.

The capability ``background-snapshot`` (``bg_migration_thread`` in ``migration/migration.c``). QEMU 7.2 does
these steps: touch every page (so that each can be protected) · write the stream's header · stop the guest · device
state · protect the pages · let the guest run · pages. The first step is the long one, and it needs no
stopped guest; but a ``stop`` of ours before ``migrate`` would take it into the pause.

So the header is *held*: the stream's socket is full from the start, and QEMU's thread waits in its first write, without
QEMU's big lock, while the guest runs and the monitor answers. Then comes our ``stop``, the disks, and reading the
socket lets QEMU go on to protect the pages. Measured on 7.2: 3–9 ms instead of 31–129 ms (1–3 GiB of touched RAM).

Before all that the RAM is put together into huge pages (module `vmsnap_drivers.qemu.huge_pages`), because
protecting costs by the mapped page, and the last capture has left small ones.

QEMU 10.0 writes the header under the big lock, so holding it would hold everything, and leaves a guest stopped that was
stopped when ``migrate`` came.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError, PauseExceeded
from vmsnap.model import Json, Moment, VmState
from vmsnap_drivers.qemu.capture.drain import STREAM_URI
from vmsnap_drivers.qemu.capture.migration import FAILURES, is_status, start_migration
from vmsnap_drivers.qemu.capture.session import Capture, Session
from vmsnap_drivers.qemu.capture.settings import apply
from vmsnap_drivers.qemu.huge_pages import collapse, survey
from vmsnap_drivers.qemu.peer import thread_waiting_on
from vmsnap_drivers.qemu.status import vm_state

HOLDS_BELOW: Final = (8, 0, 0)
"""QEMU before this version can be held; seen with 7.2."""
LEAVES_STOPPED_FROM: Final = (9, 0, 0)
"""QEMU from this version leaves a guest stopped that was stopped before (``vm_resume(s->vm_old_state)``)."""

CAPABILITIES: Final = ("background-snapshot", "events")
_HOLD_WAIT_SECONDS: Final = 30.0
_LOOK_EACH_SECONDS: Final = 0.002
_COLLAPSE_MOST_SECONDS: Final = 60.0
_WORTH_COLLAPSING_BYTES: Final = 32 * 1024 * 1024
"""Less than this in small pages costs no tenth of a millisecond."""
_SLACK_SECONDS: Final = 10.0


class CowCapture(Capture):
    """Capture by background snapshot."""

    name = "cow"

    def __init__(self, session: Session, *, held: bool, executing: bool) -> None:
        """`executing`: what the guest did when the capture was begun, and has to do still when it is paused."""
        super().__init__(session)
        self._held = held
        self._executing = executing
        self._stops_first = session.monitor.version >= LEAVES_STOPPED_FROM

    def prepare(self) -> None:
        session = self.session
        self.details["huge_pages"] = _put_together(session.monitor.peer_pid)
        apply(session.monitor, session.before, CAPABILITIES, downtime_ms=300)
        session.drain.hand_over(session.monitor)
        if self._held:
            self._start_held()

    def pause(self) -> Moment:
        if (vm_state(self.session.monitor) is VmState.EXECUTING) is not self._executing:
            changed = "stopped" if self._executing else "resumed"
            raise HypervisorError(f"somebody {changed} the guest before its capture")
        return self.stop_now()

    def duplicate(self) -> Moment:
        session = self.session
        if session.stopped_at is not None:
            session.check_stood_still(["STOP"])
        if not self._held:
            self._start()
        session.drain.release()
        if self._stops_first:
            self._await_pages()
            session.check_stood_still(["STOP"] if self._executing else [])
            return Moment.now("duplicate")
        self.resumed = session.wait("RESUME").moment("resume")
        session.check_stood_still(["STOP", "RESUME"])
        return Moment("duplicate", self.resumed.wall_ns, self.resumed.monotonic_ns, self.resumed.source)

    def _start_held(self) -> None:
        """Start, and wait until QEMU's thread stands before its first write.

        :raises HypervisorError: it does not get there
        """
        session = self.session
        monitor = session.monitor
        inode = session.drain.inode
        self._start()
        deadline = time.monotonic() + _HOLD_WAIT_SECONDS
        while not thread_waiting_on(monitor.peer_pid, inode):
            if time.monotonic() > deadline:
                raise HypervisorError("QEMU did not begin its background snapshot in time")
            if any(is_status(event, FAILURES) for event in monitor.events_since(session.started)):
                raise HypervisorError(f"QEMU cannot make a background snapshot: {session.failure()}")
            time.sleep(_LOOK_EACH_SECONDS)

    def _start(self) -> None:
        session = self.session
        if self._held:
            session.mark = session.monitor.mark()
        session.started = start_migration(session.monitor, STREAM_URI)

    def _await_pages(self) -> None:
        """Wait until the pages are protected, which they are when the first ones come.

        ``ram.normal + ram.duplicate`` says so for sure; the status ``active`` comes before the protection.
        """
        session = self.session
        if not session.drain.pages_flow.wait(session.left_seconds()):
            raise PauseExceeded(f"the guest would have stood still longer than {session.max_pause_seconds:g} s")
        answer = session.monitor.execute("query-migrate")
        ram = answer.get("ram", {})
        if answer.get("status") in ("failed", "cancelled") or not ram.get("normal", 0) + ram.get("duplicate", 0):
            raise HypervisorError(f"QEMU could not capture the guest: {session.failure()}")


def prepare_seconds(collapsible_bytes: int) -> float:
    """What `CowCapture.prepare` takes at most."""
    return _collapse_seconds(collapsible_bytes) + _HOLD_WAIT_SECONDS + _SLACK_SECONDS


def _collapse_seconds(collapsible_bytes: int) -> float:
    """How long pages may be put together: three times what it takes."""
    return min(_COLLAPSE_MOST_SECONDS, 1.0 + collapsible_bytes / (1 << 30))


def _put_together(pid: int) -> Json:
    """Bring the guest's RAM back into huge pages, where that can be, so that protecting it is quick; tell what came of
    it.
    """
    before = survey(pid)
    if before.collapsible_bytes < _WORTH_COLLAPSING_BYTES:
        return {"small_bytes": before.small_bytes, "huge_bytes": before.huge_bytes, "why_not": before.why_not}
    done = collapse(pid, before, _collapse_seconds(before.collapsible_bytes))
    return {
        "small_bytes_before": before.small_bytes,
        "small_bytes": done.small_bytes,
        "huge_bytes": done.huge_bytes,
        "seconds": round(done.seconds, 3),
        "why_not": done.why_not,
    }


def can_hold(version: tuple[int, int, int], pid: int) -> bool:
    """Whether the header can be held: a QEMU that lets it, and threads that this user may look at."""
    return version < HOLDS_BELOW and may_trace(pid)


def may_trace(pid: int) -> bool:
    """Whether this user may look into the process as a debugger does."""
    try:
        Path("/proc", str(pid), "task", str(pid), "syscall").read_text()
    except OSError:
        return False
    return True
