"""QEMU's block graph as this mechanism needs it: what stands on top of a disk, adding and removing nodes, exports and
jobs. Every call is one or a few QMP round trips and ends in time.

Sources: ``qapi/block-core.json``, ``qapi/block-export.json`` of QEMU 7.2 and 10.0; both were tried.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vmsnap.errors import HypervisorError, SnapshotError, VmGone
from vmsnap.model import Disk
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError

CALL_SECONDS: Final = 30.0
PAUSE_CALL_SECONDS: Final = 2.0
"""Time-out of a call made while the guest stands still."""
_SLICE_SECONDS: Final = 1.0
_QUEUED_COMMANDS: Final = 8
"""``QMP_REQ_QUEUE_LEN_MAX``, monitor/qmp.c: with more QEMU stops reading for a while."""


class BlockGraph:
    """The block graph of the QEMU behind `monitor`.

    What QEMU refuses is raised as `SnapshotError`; a QEMU that is gone as `VmGone`.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    @property
    def monitor(self) -> Monitor:
        """The connection."""
        return self._monitor

    def call(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_seconds: float = CALL_SECONDS
    ) -> Any:
        """Carry out a QMP command.

        :raises SnapshotError: QEMU refused, or did not answer in time
        :raises VmGone: it ended
        """
        try:
            return self._monitor.execute(command, arguments, timeout_seconds=timeout_seconds)
        except VmGone:
            raise
        except HypervisorError as e:
            raise SnapshotError(e.message, cure=e.cure) from e

    def node_names(self) -> set[str]:
        """The names of all nodes."""
        return {node["node-name"] for node in self.call("query-named-block-nodes", {"flat": True})}

    def node(self, name: str) -> Mapping[str, Any] | None:
        """What QEMU says of one node; None where there is none of that name."""
        for node in self.call("query-named-block-nodes", {"flat": True}):
            if node["node-name"] == name:
                found: Mapping[str, Any] = node
                return found
        return None

    def top_of(self, disk: Disk) -> str | None:
        """The node to which the guest's device is connected; None where the device or its medium is gone."""
        try:
            drive = self._monitor.execute(
                "qom-get", {"path": _qom_path(disk), "property": "drive"}, timeout_seconds=CALL_SECONDS
            )
        except MonitorError:
            return None
        for backend in self.call("query-block"):
            if backend["device"] and backend["device"] == drive:
                inserted = backend.get("inserted")
                return str(inserted["node-name"]) if inserted else None
        return str(drive) or None

    def connect(self, disk: Disk, node: str, *, timeout_seconds: float = CALL_SECONDS) -> None:
        """Connect the guest's device to another node, between two of its requests. QEMU 7.2 aborts if it is connected
        to that node already: ask `top_of` first.
        """
        arguments = {"path": _qom_path(disk), "property": "drive", "value": node}
        self.call("qom-set", arguments, timeout_seconds=timeout_seconds)

    def connect_all(self, connections: Sequence[tuple[Disk, str]]) -> bool:
        """Connect several devices as `connect` does, and say whether the guest executed then, in as few round trips as
        QEMU takes. What is not connected is found out by the error.

        :raises SnapshotError: QEMU refused one of them, or did not answer in time
        :raises VmGone: it ended
        """
        commands: list[tuple[str, Mapping[str, object] | None]] = [
            ("qom-set", {"path": _qom_path(disk), "property": "drive", "value": node}) for disk, node in connections
        ]
        commands.append(("query-status", None))
        answers: list[Any] = []
        try:
            for begin in range(0, len(commands), _QUEUED_COMMANDS):
                some = commands[begin : begin + _QUEUED_COMMANDS]
                answers = self._monitor.execute_all(some, timeout_seconds=PAUSE_CALL_SECONDS)
        except VmGone:
            raise
        except HypervisorError as e:
            raise SnapshotError(e.message, cure=e.cure) from e
        return bool(answers[-1]["running"])

    def add(self, options: Mapping[str, object]) -> None:
        """Add a node."""
        self.call("blockdev-add", options)

    def remove(self, name: str) -> None:
        """Remove a node that is there."""
        self.call("blockdev-del", {"node-name": name})

    def exports(self) -> set[str]:
        """The ids of all exports."""
        return {export["id"] for export in self.call("query-block-exports")}

    def add_export(self, name: str, node: str, *, bitmap: str | None = None) -> None:
        """Export a node read-only under `name` by the running NBD server, and one of its bitmaps with it."""
        bitmaps = {} if bitmap is None else {"bitmaps": [bitmap]}
        export = {"type": "nbd", "id": name, "node-name": node, "name": name, "writable": False, **bitmaps}
        self.call("block-export-add", export)

    def remove_export(self, name: str) -> None:
        """End an export that is there, with the connections to it, and wait until it is gone."""
        mark = self._monitor.mark()
        self.call("block-export-del", {"id": name, "mode": "hard"})
        if name in self.exports():
            self._wait("BLOCK_EXPORT_DELETED", mark, "id", name)

    def job(self, name: str) -> Mapping[str, Any] | None:
        """What QEMU says of one block job; None where there is none of that name."""
        for job in self.call("query-block-jobs"):
            if job["device"] == name:
                found: Mapping[str, Any] = job
                return found
        return None

    def await_job(self, name: str, mark: int, *, until_ready: bool) -> bool:
        """Wait a second at most until the job is ready (or has ended); say whether it is. `mark` is a point before.

        :raises SnapshotError: the job failed or was cancelled
        """
        wanted = {"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"} | ({"BLOCK_JOB_READY"} if until_ready else set())
        try:
            event = self._monitor.wait_for_event(
                wanted, since=mark, timeout_seconds=_SLICE_SECONDS, match=lambda event: event.data["device"] == name
            )
        except VmGone:
            raise
        except HypervisorError:
            return False
        if event.name == "BLOCK_JOB_CANCELLED" or "error" in event.data:
            raise SnapshotError(f"QEMU's job {name} ended early: {event.data.get('error', 'it was cancelled')}")
        return True

    def _wait(self, event: str, mark: int, field: str, value: str) -> None:
        try:
            self._monitor.wait_for_event(
                event, since=mark, timeout_seconds=CALL_SECONDS, match=lambda found: found.data[field] == value
            )
        except VmGone:
            raise
        except HypervisorError as e:
            raise SnapshotError(e.message, cure=e.cure) from e


class Deadline:
    """A point in time after which something counts as hung."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def check(self, what: str) -> None:
        """Return while there is time.

        :raises SnapshotError: there is none left; the message says that `what` hangs
        """
        if time.monotonic() > self._end:
            raise SnapshotError(f"{what} hangs")


def _qom_path(disk: Disk) -> str:
    device = disk.handle["qdev"]
    return device if device.startswith("/") else f"/machine/peripheral/{device}"
