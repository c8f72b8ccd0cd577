"""The guest agent (``qemu-ga``) at the socket of its channel, for those moments in which nobody else has it.

QEMU lets one in at a time; a second one is let in when the first has gone. Requests and answers are JSON, one a line
(``docs/interop/qemu-ga.rst``, ``qga/qapi-schema.json``, QEMU 7.2).
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap.model import Json
from vmsnap_drivers.qemu.unix_socket import connect_unix

_SENTINEL: Final = b"\xff"
"""Before a request it lets the agent forget a half one, before an answer it is the end of all older ones."""
_MOST_BYTES: Final = 1 << 20


def ask_at(path: Path, command: str, seconds: float) -> Json:
    """What the agent returns for a command without arguments. Blocks for `seconds` at most.

    :raises HypervisorError: it cannot be reached, does not answer, or refuses
    """
    deadline = time.monotonic() + seconds
    number = secrets.randbelow(1 << 31)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(seconds)
            connect_unix(client, path)
            lines = _Lines(client, deadline)
            lines.send(_SENTINEL + _request("guest-sync-delimited", {"id": number}))
            lines.skip_to(_SENTINEL)
            while lines.next().get("return") != number:
                continue  # of somebody who asked before, and did not wait
            lines.send(_request(command))
            answer = lines.next()
    except (OSError, ValueError) as e:
        raise HypervisorError(f"the guest agent at {path} did not answer {command}: {e}") from e
    if "return" not in answer:
        raise HypervisorError(f"the guest agent at {path} refused {command}: {str(answer.get('error'))[:200]}")
    return answer["return"]


def _request(command: str, arguments: dict[str, int] | None = None) -> bytes:
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message).encode() + b"\n"


class _Lines:
    """The agent's answers, one a line, until a deadline."""

    def __init__(self, client: socket.socket, deadline: float) -> None:
        self._client = client
        self._deadline = deadline
        self._pending = b""

    def send(self, data: bytes) -> None:
        self._client.settimeout(self._left())
        self._client.sendall(data)

    def skip_to(self, mark: bytes) -> None:
        self._until(mark)

    def next(self) -> dict[str, Json]:
        answer = json.loads(self._until(b"\n"))
        return answer if isinstance(answer, dict) else {"error": f"{answer!r} is no answer"}

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._pending:
            if len(self._pending) > _MOST_BYTES:
                raise ValueError("its answer does not end")
            self._client.settimeout(self._left())
            data = self._client.recv(65536)
            if not data:
                raise ConnectionResetError("it hung up")
            self._pending += data
        found, _, self._pending = self._pending.partition(mark)
        return found

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("not in time")
        return left
