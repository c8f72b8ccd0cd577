"""A small QMP client of the lab's own: what the product says is checked against what QEMU tells it."""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class OracleError(Exception):
    """QEMU answered a command with an error, or hung up."""


class Oracle:
    """One QMP monitor connection, synchronous. Not for use by several threads."""

    def __init__(self, path: Path, timeout_seconds: float = 30.0) -> None:
        """Connect to the monitor socket at `path` and negotiate.

        :raise OSError: when nobody listens there.
        :raise TimeoutError: when QEMU does not greet in time.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._timeout_seconds = timeout_seconds
        self._received = b""
        self._events: list[dict[str, Any]] = []
        try:
            self._socket.connect(str(path))
            deadline = time.monotonic() + timeout_seconds
            while "QMP" not in self._message(deadline):
                pass  # an event that came ahead of the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Hang up. Closing twice is fine."""
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its result; ``node_name=`` is sent as ``node-name``.

        :raise OracleError: when QEMU refuses the command or hangs up.
        :raise TimeoutError: when no answer comes in time.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            answer = self._message(deadline)
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise OracleError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def hmp(self, line: str) -> str:
        """Run a line of the human monitor and return what it prints, errors included."""
        return str(self.execute("human-monitor-command", command_line=line))

    def status(self) -> str:
        """The run state: ``running``, ``paused``, ``inmigrate``, …"""
        return str(self.execute("query-status")["status"])

    def events(self) -> list[dict[str, Any]]:
        """All events seen on this connection so far, oldest first, with QEMU's own time stamps."""
        try:
            while True:
                self._events.append(self._message(time.monotonic()))
        except (TimeoutError, OracleError):
            return list(self._events)

    def wait_event(self, name: str, timeout_seconds: float) -> dict[str, Any]:
        """The first event of that name, seen already or coming.

        :raise TimeoutError: when none comes in time.
        :raise OracleError: when QEMU hangs up first.
        """
        deadline = time.monotonic() + timeout_seconds
        seen = self._events
        while True:
            for event in seen:
                if event["event"] == name:
                    return event
            seen = [self._message(deadline)]
            self._events += seen

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.0001))
            data = self._socket.recv(65536)
            if not data:
                raise OracleError("QEMU closed the monitor")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def seconds_between(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """The time from one event to another by QEMU's own time stamps, exact to a microsecond."""
    stamps = [event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6 for event in (first, second)]
    return float(stamps[1] - stamps[0])
