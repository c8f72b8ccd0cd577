"""What a live backup is compared with, and who times both: a monitor of the benchmark's own, past the product.

Stop-and-copy is what can be done with any QEMU: stop the guest, migrate it into a file, let it go on. Here the file is
in memory, the bandwidth unlimited and no other capability in force, so this is the fastest that it can be. The other
is QEMU's own ``savevm``, which writes RAM into the disk's image.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.qmp import Oracle, OracleError, seconds_between

_UNLIMITED_BYTES_PER_SECOND = 1 << 40
_TIMEOUT_SECONDS = 120.0
_BETWEEN_TRIES_SECONDS = 0.0005
_DESCRIPTOR = "benchmark-copy"
_SAVED = "benchmark"
_CHANGED = ("max-bandwidth", "downtime-limit")

Event = Mapping[str, Any]


@dataclass(frozen=True)
class CopyPause:
    """One stop-and-copy."""

    seconds: float
    """STOP to RESUME by QEMU's own events."""
    stream_bytes: int


class Witness(Oracle):
    """Sees every STOP and RESUME of the guest, and can stop and copy it."""

    def __init__(self, path: Path) -> None:
        """Connect.

        :raises OSError: nobody listens there
        """
        super().__init__(path, _TIMEOUT_SECONDS)

    def seen(self) -> int:
        """How many events there were so far; a point from which `pause_since` looks."""
        return len(self.events())

    def pause_since(self, begun: int) -> float:
        """The time between the STOP and the RESUME since that point, in seconds, by QEMU's own clock.

        :raises OracleError: there was not exactly one of each, in that order
        """
        stopped, resumed = self._stop_and_resume(begun)
        return seconds_between(stopped, resumed)

    def steps_since(self, begun: int) -> tuple[tuple[str, float], ...]:
        """The steps of the migration that QEMU told from STOP to RESUME, with the seconds since STOP.

        :raises OracleError: there was not exactly one of each, in that order
        """
        stopped, resumed = self._stop_and_resume(begun)
        steps = []
        for event in self.events()[begun:]:
            at = seconds_between(stopped, event)
            if event["event"] == "MIGRATION" and 0 <= at <= seconds_between(stopped, resumed):
                steps.append((str(event["data"]["status"]), at))
        return tuple(steps)

    def _stop_and_resume(self, begun: int) -> list[dict[str, Any]]:
        events = [event for event in self.events()[begun:] if event["event"] in ("STOP", "RESUME")]
        if [event["event"] for event in events] != ["STOP", "RESUME"]:
            raise OracleError(f"one STOP and one RESUME were to be seen, but there were {events}")
        return events

    def stop_and_copy(self) -> CopyPause:
        """Do it. Whatever happens, the guest runs afterwards.

        :raises OracleError: QEMU could not
        """
        before = self.execute("query-migrate-parameters")
        capabilities = self.execute("query-migrate-capabilities")
        wanted = [{"capability": each["capability"], "state": each["capability"] == "events"} for each in capabilities]
        self.execute("migrate-set-capabilities", capabilities=_changes(capabilities, wanted))
        self.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED_BYTES_PER_SECOND)
        # A file that is in memory and has no name: it is gone with its last descriptor, whatever becomes of us.
        file = os.memfd_create("vmsnap-benchmark")
        try:
            self._send_descriptor(file)
            begun = self.seen()
            self.execute("stop")
            try:
                self.execute("migrate", uri=f"fd:{_DESCRIPTOR}")
                self._await_completed(begun)
            finally:
                self._go_on()
            stream_bytes = os.fstat(file).st_size
        finally:
            os.close(file)
            self.execute("migrate-set-capabilities", capabilities=_changes(wanted, capabilities))
            self.execute("migrate-set-parameters", **{name: before[name] for name in _CHANGED})
        return CopyPause(self.pause_since(begun), stream_bytes)

    def save_internally(self) -> float:
        """``savevm``: RAM and disk into the qcow2 image itself; returns STOP to RESUME in seconds. Blocks.

        :raises OracleError: QEMU could not
        """
        begun = self.seen()
        told = self.hmp(f"savevm {_SAVED}")
        if told.strip():
            raise OracleError(f"savevm: {told}")
        self.hmp(f"delvm {_SAVED}")
        return self.pause_since(begun)

    def _send_descriptor(self, descriptor: int) -> None:
        command = {"execute": "getfd", "arguments": {"fdname": _DESCRIPTOR}}
        socket.send_fds(self._socket, [json.dumps(command).encode()], [descriptor])
        self._answer()

    def _answer(self) -> None:
        """Take the answer to a command that was sent by hand."""
        while True:
            answer = self._message(time.monotonic() + _TIMEOUT_SECONDS)
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise OracleError(str(answer["error"]["desc"]))
            else:
                return

    def _await_completed(self, begun: int) -> None:
        looked_at = begun
        while True:
            for event in self._events[looked_at:]:
                looked_at += 1
                status = event["data"].get("status") if event["event"] == "MIGRATION" else None
                if status == "completed":
                    return
                if status in ("failed", "cancelled"):
                    raise OracleError(f"stop-and-copy {status}: {self.execute('query-migrate')}")
            self._events.append(self._message(time.monotonic() + _TIMEOUT_SECONDS))

    def _go_on(self) -> None:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                self.execute("cont")
            except OracleError:
                # QEMU 10.0 says "Migration is not finalized yet" for a moment after the end of a migration.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_BETWEEN_TRIES_SECONDS)
            else:
                return


def _changes(now: Sequence[Event], wanted: Sequence[Event]) -> list[Event]:
    states = {each["capability"]: each["state"] for each in now}
    return [each for each in wanted if states[each["capability"]] != each["state"]]
