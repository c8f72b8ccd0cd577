"""Pre-copy: RAM is copied while the guest runs, what it changed meanwhile is copied again, and the last rest is copied
while it stands still. The instant is at the end.

QEMU's ordinary live migration with ``pause-before-switchover``: at status ``pre-switchover`` the guest is stopped and
its disks are still QEMU's, which is where they are snapshotted; ``migrate-continue`` finishes. The pause does not
depend on the size of RAM, but a guest that writes faster than the stream runs never gets there.
"""

from __future__ import annotations

import time
from typing import Final

from vmsnap.errors import CannotCapture, DoesNotConverge, HypervisorError, PauseExceeded
from vmsnap.model import Moment, VmState
from vmsnap_drivers.qemu.capture.drain import STREAM_URI
from vmsnap_drivers.qemu.capture.migration import cancel_migration, start_migration
from vmsnap_drivers.qemu.capture.session import Capture
from vmsnap_drivers.qemu.capture.settings import UNLIMITED_BYTES_PER_SECOND, apply
from vmsnap_drivers.qemu.status import vm_state

CAPABILITIES: Final = ("pause-before-switchover", "events")
DOWNTIME_STEPS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_STEP_SECONDS: Final = 0.4
_WORTH_WAITING_MS: Final = 10
"""A pre-copy that comes to its end with this is not given up for another way, whatever that promises."""
_LOOK_EACH_SECONDS: Final = 0.005
_FIRST_PASS_SECONDS: Final = 10.0
_BYTES_PER_SECOND: Final = 200 * 1024 * 1024
"""The slowest copying that is waited for in the first pass."""
_TAIL_BYTES: Final = 48 * 1024 * 1024
"""What is left of the first pass when `prepare` returns."""
_TAIL_BYTES_PER_SECOND: Final = 16 * 1024 * 1024
"""How fast the tail is copied until `pause`: slowly enough that QEMU does not come to the end by itself."""


def prepare_seconds(memory_bytes: int) -> float:
    """What `PrecopyCapture.prepare` takes at most."""
    return _FIRST_PASS_SECONDS + memory_bytes / _BYTES_PER_SECOND + _STEP_SECONDS


def lead_seconds(max_pause_seconds: float) -> float:
    """What `PrecopyCapture.pause` takes at most with the guest running."""
    return len(_steps(max_pause_seconds)) * _STEP_SECONDS + _STEP_SECONDS


def _steps(max_pause_seconds: float, otherwise_seconds: float | None = None) -> list[int]:
    """The limits, in milliseconds, that QEMU is given one after the other: not above half of the pause, nor where
    another way of capture would be the shorter one.
    """
    most_ms = max(2.0, max_pause_seconds * 500)
    if otherwise_seconds is not None:
        most_ms = min(most_ms, max(_WORTH_WAITING_MS, otherwise_seconds * 1000))
    return [limit_ms for limit_ms in DOWNTIME_STEPS_MS if limit_ms <= most_ms]


class PrecopyCapture(Capture):
    """Capture of a guest that runs, by pre-copy."""

    name = "precopy"

    def prepare(self) -> None:
        """Copy nearly all of the first pass, and slow the copying down then, so that the end comes in `pause`.

        An idle guest with little memory can be at its end, and stopped, all the same.

        :raises HypervisorError: the memory could not be copied, or came too slowly
        """
        session = self.session
        # With a limit of 0 QEMU 10.0 ends with the first pass, and copies in the pause all that was written during it.
        apply(session.monitor, session.before, CAPABILITIES, downtime_ms=DOWNTIME_STEPS_MS[0])
        session.drain.hand_over(session.monitor)
        session.mark = session.monitor.mark()
        session.started = start_migration(session.monitor, STREAM_URI)
        session.drain.release()
        deadline = 0.0
        while not self._is_stopping():
            answer = session.monitor.execute("query-migrate")
            ram = answer.get("ram", {})
            if answer.get("status") in ("failed", "cancelled"):
                raise HypervisorError(f"QEMU could not copy the guest's memory: {session.failure()}")
            if not deadline and ram:
                deadline = time.monotonic() + _FIRST_PASS_SECONDS + ram["total"] / _BYTES_PER_SECOND
            if ram and (ram["remaining"] <= _TAIL_BYTES or ram.get("dirty-sync-count", 0) > 1):
                session.monitor.execute("migrate-set-parameters", {"max-bandwidth": _TAIL_BYTES_PER_SECOND})
                return
            if deadline and time.monotonic() > deadline:
                cancel_migration(session.monitor)
                raise self._too_fast("the guest's memory is copied too slowly")
            time.sleep(_LOOK_EACH_SECONDS)

    def pause(self) -> Moment:
        """Copy the rest at full speed, and let QEMU stop the guest as soon as what is left takes 1 ms to copy;
        allow more, step by step, where that does not come.
        """
        session = self.session
        for limit_ms in _steps(session.max_pause_seconds, session.plan.otherwise_seconds):
            session.monitor.execute(
                "migrate-set-parameters", {"max-bandwidth": UNLIMITED_BYTES_PER_SECOND, "downtime-limit": limit_ms}
            )
            try:
                session.wait("MIGRATION", status="pre-switchover", timeout_seconds=_STEP_SECONDS)
            except PauseExceeded:
                if vm_state(session.monitor) is VmState.EXECUTING:
                    continue
                session.wait("MIGRATION", status="pre-switchover")
            stopped = [e for e in session.monitor.events_since(session.mark) if e.name == "STOP"]
            session.check_stood_still(["STOP"])
            session.stopped_at = stopped[0]
            return stopped[0].moment("pause")
        cancel_migration(session.monitor)
        raise self._too_fast("the guest writes to its memory faster than it can be copied")

    def duplicate(self) -> Moment:
        session = self.session
        session.check_stood_still(["STOP"])
        session.left_seconds()
        session.monitor.execute("migrate-continue", {"state": "pre-switchover"})
        return session.wait("MIGRATION", status="completed").moment("duplicate")

    def _too_fast(self, message: str) -> CannotCapture:
        if self.session.plan.otherwise_seconds is not None:
            return DoesNotConverge(message, self.name)
        return CannotCapture(message, cure="use -o capture=cow")

    def _is_stopping(self) -> bool:
        """An idle guest can be at its end at once."""
        return any(e.name == "STOP" for e in self.session.monitor.events_since(self.session.mark))
