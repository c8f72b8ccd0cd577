"""Watches a resumed guest for signs of life.

The best sign is one that the guest gives: what it writes to its serial line, where QEMU keeps that in a file of the
VM's own, or the answer of its agent (``guest-sync``, ``qga/qapi-schema.json``). Without either, executing for a while
without a fault must do. Faults are told by QEMU's events, 7.2 and 10.0 alike.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError, VmGone
from vmsnap.model import VmState
from vmsnap_drivers.qemu.commandline import parse
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import look_at
from vmsnap_drivers.qemu.status import vm_state
from vmsnap_drivers.qemu.unix_socket import connect_unix

_FAULTS: Final = frozenset(["GUEST_PANICKED", "GUEST_CRASHLOADED", "SHUTDOWN", "RESET", "STOP", "MEMORY_FAILURE"])
_PANIC: Final = re.compile(rb"Kernel panic|Oops: |BUG: unable")
_BEATS: Final = 2
_LOOK_EACH_SECONDS: Final = 0.05
_AGENT: Final = "org.qemu.guest_agent.0"
_AGENT_SECONDS: Final = 0.5
_MOST_AGENT_SECONDS: Final = 4.0
_MOST_ANSWER_BYTES: Final = 64 * 1024


def await_life(vm: str, monitor: Monitor, logs: Sequence[Path], agent: Path | None, seconds: float) -> str:
    """See `Hypervisor.await_life`. `logs` are the files that QEMU writes the guest's serial lines to, `agent` the
    socket on which its agent is reached.

    :raises HypervisorError: it died, faulted, or does not execute
    """
    begun, mark = time.monotonic(), monitor.mark()
    beats = {log: _Beats(log) for log in logs}
    # A guest on a busy host may need longer for an answer; but while one is awaited, no fault is seen.
    agent_seconds = _AGENT_SECONDS
    while True:
        _check_faultless(vm, monitor, mark)
        passed = time.monotonic() - begun
        for log, found in beats.items():
            if found.look(vm) >= _BEATS:
                return f"it wrote to its serial line ({log.name}) within {passed:.1f} s"
        if agent is not None and answers(agent, min(agent_seconds, max(seconds - passed, _AGENT_SECONDS))):
            return f"its guest agent answered within {time.monotonic() - begun:.1f} s"
        agent_seconds = min(2 * agent_seconds, _MOST_AGENT_SECONDS)
        if passed >= seconds:
            return f"it executed for {seconds:g} s without a fault"
        time.sleep(min(_LOOK_EACH_SECONDS, seconds - passed))


def signs(monitor: Monitor, folder: Path) -> tuple[list[Path], Path | None]:
    """Where the guest can give signs: the files that its character devices are written to, and its agent's socket, if
    that lies in the VM's own `folder`, so that nobody else talks to it.

    :raises VmGone: QEMU ended
    """
    peer = look_at(monitor.peer_pid)
    arguments = parse(peer.argv)
    devices = {a.properties.get("id"): a.properties for a in arguments if a.name == "chardev"}
    logs = [
        Path(peer.cwd) / name
        for properties in devices.values()
        for name in (properties.get("logfile"), properties.get("path") if properties.get("backend") == "file" else "")
        if name
    ]
    for argument in arguments:
        if argument.name == "serial" and (argument.value or "").startswith("file:"):
            logs.append(Path(peer.cwd) / str(argument.value).removeprefix("file:"))
    ports = (a.properties for a in arguments if a.name == "device" and a.properties.get("name") == _AGENT)
    agents = [Path(devices[p.get("chardev")].get("path")) for p in ports if p.get("chardev") in devices]
    return logs, next((agent for agent in agents if agent.parent == folder), None)


class _Beats:
    """Counts the times at which a log grew by whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0
        self._read = path.stat().st_size if path.exists() else 0

    def look(self, vm: str) -> int:
        """The count so far.

        :raises HypervisorError: the guest's kernel says that it broke down
        """
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        if panic := _PANIC.search(new):
            line = new[panic.start() :].split(b"\n")[0].decode(errors="replace").strip()
            raise HypervisorError(f"the guest of VM {vm!r} broke down: {line}")
        if b"\n" in new:
            self._count += 1
        return self._count


def _check_faultless(vm: str, monitor: Monitor, mark: int) -> None:
    try:
        events, state = monitor.events_since(mark), vm_state(monitor)
    except VmGone as e:
        raise VmGone(f"VM {vm!r} ended while a sign of life was awaited") from e
    for event in events:
        if event.name in _FAULTS or (event.name == "BLOCK_IO_ERROR" and event.data.get("action") != "ignore"):
            reason = event.data.get("reason") or event.data.get("action") or ""
            raise HypervisorError(f"VM {vm!r} does not live: {event.name}{f' ({reason})' if reason else ''}")
    if state is not VmState.EXECUTING:
        raise HypervisorError(f"VM {vm!r} is {state.value} instead of executing")


def answers(path: Path, seconds: float = _AGENT_SECONDS) -> bool:
    """Whether an agent answers, with `seconds` for each piece of it.

    Where nobody does, the question stays in the port's buffer, which does no harm.
    """
    token = int.from_bytes(os.urandom(4), "big")
    question = json.dumps({"execute": "guest-sync", "arguments": {"id": token}}).encode() + b"\n"
    with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(seconds)
        connect_unix(client, path)
        client.sendall(question)
        answer = b""
        while str(token).encode() not in answer and len(answer) < _MOST_ANSWER_BYTES:
            received = client.recv(4096)
            if not received:
                return False
            answer += received
        return f'"return": {token}'.encode() in answer
    return False
