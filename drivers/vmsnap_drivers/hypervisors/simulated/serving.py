"""The server's side of a VM's control socket: clients, their commands, and the faults that commands show."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vmsnap_drivers.hypervisors.simulated.control import MAX_LINE_BYTES, peer_pid
from vmsnap_drivers.hypervisors.simulated.injection import Effect, Fault, Injection

FORGETS_PENDING = frozenset({"resume", "abandon", "quit"})
"""Calls that end a capture: commands of others that still wait are dropped, or they would strike afterwards."""
_REPLY_SECONDS = 1.0

Perform = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Carries out a command with its arguments; returns the reply."""


@dataclass
class Client:
    """One connection to the control socket."""

    connection: socket.socket
    received: bytes = b""


@dataclass
class Pending:
    """A call that a fault delays."""

    due: float
    client: Client
    call: str
    arguments: dict[str, Any]


class ControlServer:
    """Everybody who is connected, and what still waits. It never blocks: the machine's loop asks it when to look."""

    def __init__(self, listener: socket.socket) -> None:
        """Serve those who connect to `listener`."""
        self.injection = Injection()
        self._listener = listener
        self._clients: dict[int, Client] = {}
        self._pending: list[Pending] = []

    def descriptors(self) -> list[int]:
        """What to wait for."""
        return [self._listener.fileno(), *self._clients]

    def due(self) -> list[float]:
        """When delayed commands are to be carried out."""
        return [pending.due for pending in self._pending]

    def serve(self, readable: Sequence[int], perform: Perform) -> None:
        """Accept, read and answer whatever is ready."""
        for descriptor in readable:
            if descriptor == self._listener.fileno():
                self._accept()
            elif descriptor in self._clients:
                self._hear(self._clients[descriptor], perform)

    def answer_delayed(self, perform: Perform) -> None:
        """Carry out the delayed commands whose time has come."""
        now = time.monotonic()
        for pending in [pending for pending in self._pending if pending.due <= now]:
            # an earlier one of them may have dropped it
            if pending in self._pending:
                self._pending.remove(pending)
                self._reply(pending.client, self._perform(perform, pending.call, pending.arguments))

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        try:
            peer_pid(connection)
        except PermissionError:
            connection.close()
            return
        self._clients[connection.fileno()] = Client(connection)

    def _drop(self, client: Client) -> None:
        self._clients.pop(client.connection.fileno(), None)
        self._pending = [pending for pending in self._pending if pending.client is not client]
        client.connection.close()

    def _hear(self, client: Client, perform: Perform) -> None:
        try:
            data = client.connection.recv(65536)
        except OSError:
            data = b""
        client.received += data
        if not data or len(client.received) > MAX_LINE_BYTES:
            self._drop(client)
            return
        while b"\n" in client.received:
            line, _, client.received = client.received.partition(b"\n")
            try:
                command = json.loads(line)
                call, arguments = str(command["command"]), dict(command["arguments"])
            except (ValueError, KeyError, TypeError):
                self._reply(client, {"error": "not a command"})
                continue
            self._strike(client, call, arguments, perform)

    def _reply(self, client: Client, reply: dict[str, Any]) -> None:
        try:
            client.connection.settimeout(_REPLY_SECONDS)
            client.connection.sendall(json.dumps(reply).encode() + b"\n")
        except OSError:
            self._drop(client)

    def _strike(self, client: Client, call: str, arguments: dict[str, Any], perform: Perform) -> None:
        fault = self.injection.take(call)
        if fault is None:
            self._reply(client, self._perform(perform, call, arguments))
        elif fault.effect is Effect.SLOW:
            self._pending.append(Pending(time.monotonic() + fault.seconds, client, call, arguments))
        elif fault.effect in (Effect.FAIL_AFTER, Effect.HANG_AFTER, Effect.DIE_AFTER):
            self._perform(perform, call, arguments)
            self._show(client, fault, "it was done")
        else:
            self._show(client, fault, "nothing was done")

    def _show(self, client: Client, fault: Fault, done: str) -> None:
        if fault.effect in (Effect.DIE, Effect.DIE_AFTER):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.effect in (Effect.FAIL, Effect.FAIL_AFTER):
            self._reply(client, {"error": f"injected fault, {done}"})
        if fault.effect is Effect.IGNORE:
            self._reply(client, {"ok": {}})

    def _perform(self, perform: Perform, call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if call in FORGETS_PENDING:
            self._pending = []
        return perform(call, arguments)
