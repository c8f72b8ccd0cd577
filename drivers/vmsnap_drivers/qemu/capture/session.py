"""One capture while it goes on: what its steps share, and the evidence that the guest stood still."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError, PauseExceeded, VmGone
from vmsnap.model import CapturePlan, Json, Moment, VmState
from vmsnap_drivers.qemu.capture.drain import Drain
from vmsnap_drivers.qemu.capture.migration import FAILURES, is_status
from vmsnap_drivers.qemu.capture.settings import Settings
from vmsnap_drivers.qemu.monitor import Event, Monitor, MonitorError
from vmsnap_drivers.qemu.status import vm_state
from vmsnap_drivers.qemu.stream_format import CapturedMemory

STALL_TIMEOUT_SECONDS: Final = 60.0
_RESUME_SECONDS: Final = 5.0
_PROGRESS_SECONDS: Final = 0.1
_BETWEEN_TRIES_SECONDS: Final = 0.0005


@dataclass
class Session:
    """What a capture works with.

    :ivar stopped_at: when the guest was stopped, None where it stood still before
    :ivar mark: the point in QEMU's events from which the guest may only stop once and go on once
    :ivar started: the point from which MIGRATION tells of this capture
    """

    monitor: Monitor
    folder: Path
    max_pause_seconds: float
    before: Settings
    drain: Drain
    plan: CapturePlan
    stopped_at: Event | None = None
    mark: int = 0
    started: int = 0

    def left_seconds(self) -> float:
        """What is left of the pause that is allowed; all of it before the guest has stopped.

        :raises PauseExceeded: nothing is left
        """
        if self.stopped_at is None:
            return self.max_pause_seconds
        left = self.max_pause_seconds - (time.monotonic_ns() - self.stopped_at.monotonic_ns) / 1e9
        if left <= 0:
            raise PauseExceeded(f"the guest would have stood still longer than {self.max_pause_seconds:g} s")
        return left

    def wait(self, name: str, *, status: str = "", timeout_seconds: float | None = None) -> Event:
        """Wait for an event of this capture (``MIGRATION``: with that status), within the pause that is allowed.

        :raises HypervisorError: the migration failed instead
        :raises PauseExceeded: it did not come in time
        """

        def fits(event: Event) -> bool:
            if event.name != "MIGRATION":
                return True
            return event.number > self.started and is_status(event, (*FAILURES, status))

        allowed = self.left_seconds() if timeout_seconds is None else timeout_seconds
        try:
            event = self.monitor.wait_for_event(
                {name, "MIGRATION"}, since=self.mark, timeout_seconds=allowed, match=fits
            )
        except VmGone:
            raise
        except HypervisorError as e:
            raise PauseExceeded(f"the guest would have stood still longer than {self.max_pause_seconds:g} s") from e
        if is_status(event, FAILURES):
            raise HypervisorError(f"QEMU could not capture the guest: {self.failure()}")
        return event

    def failure(self) -> str:
        """Why QEMU's migration ended without success."""
        answer = self.monitor.execute("query-migrate")
        return str(answer.get("error-desc") or f"its migration {answer.get('status')}")

    def check_stood_still(self, expected: Sequence[str]) -> None:
        """See that the guest was stopped and resumed as we did it, and not by anybody else.

        :raises VmGone: QEMU ended
        :raises HypervisorError: it was not
        """
        seen = [e.name for e in self.monitor.events_since(self.mark) if e.name in ("STOP", "RESUME")]
        if seen != list(expected):
            # A QEMU that is gone has sent no event either.
            self.monitor.execute("query-status")
            raise HypervisorError(
                f"somebody else stopped or resumed the guest during its capture ({', '.join(seen) or 'no event'})"
            )


class Capture(ABC):
    """A way to capture RAM: the steps of `Hypervisor`, in their order."""

    name: str
    is_fixed: bool
    """Memory and devices are fixed, so that the guest may go on without harm to the duplicate."""
    details: dict[str, Json]
    """What the manifest is to tell of it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.resumed: Moment | None = None
        self.is_fixed = False
        self.details: dict[str, Json] = {}

    @abstractmethod
    def prepare(self) -> None:
        """What is slow; the guest runs."""

    @abstractmethod
    def pause(self) -> Moment:
        """Stop the guest, if it runs."""

    @abstractmethod
    def duplicate(self) -> Moment:
        """Fix memory and devices; return the instant."""

    def collect(self, progress: Callable[[int], None]) -> CapturedMemory:
        """Wait until the images are complete; `progress` is called with the bytes read so far. By default the stream
        that the drain takes.

        :raises HypervisorError: the stream was damaged, cut off or could not be kept
        """
        session, drain = self.session, self.session.drain
        while (captured := drain.finish(_PROGRESS_SECONDS)) is None:
            progress(drain.read_bytes)
        progress(drain.read_bytes)
        session.wait("MIGRATION", status="completed", timeout_seconds=STALL_TIMEOUT_SECONDS)
        drain.stop()
        return captured

    def give_up(self) -> None:
        """Let go of everything of this process. Idempotent."""
        self.session.drain.stop()

    def resume(self) -> Moment:
        """Let the guest go on, or see that it does, and see that it stood still until then.

        :raises HypervisorError: somebody else has stopped or resumed it meanwhile
        """
        session = self.session
        if self.resumed is None:
            self._go_on()
            self.resumed = session.wait("RESUME", timeout_seconds=_RESUME_SECONDS).moment("resume")
        session.check_stood_still(["STOP", "RESUME"])
        if vm_state(session.monitor) is not VmState.EXECUTING:
            raise HypervisorError("somebody else stopped the guest again after its capture")
        return self.resumed

    def pause_seconds(self) -> float | None:
        """How long the guest stood still, by QEMU's own events; None where it was stopped anyway."""
        stopped = self.session.stopped_at
        if stopped is None or self.resumed is None:
            return None
        return (self.resumed.wall_ns - stopped.wall_ns) / 1e9

    def _go_on(self) -> None:
        deadline = time.monotonic() + _RESUME_SECONDS
        while True:
            try:
                self.session.monitor.execute("cont")
            except MonitorError:
                # QEMU 10.0 says "Migration is not finalized yet" for a moment after the end of a migration.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_BETWEEN_TRIES_SECONDS)
            else:
                return

    def stop_now(self) -> Moment:
        """Stop a guest that runs by ``stop``, which drains and flushes its disks (``do_vm_stop``, system/cpus.c)."""
        session = self.session
        session.mark = session.monitor.mark()
        session.monitor.execute("stop", timeout_seconds=session.max_pause_seconds)
        stopped = [e for e in session.monitor.events_since(session.mark) if e.name == "STOP"]
        if not stopped:
            return Moment.now("pause")
        session.stopped_at = stopped[0]
        return stopped[0].moment("pause")
