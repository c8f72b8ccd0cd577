"""A second way into a QEMU whose monitor is somebody else's: the stub that QEMU has for debuggers.

libvirtd holds the monitor of a domain, and while it hangs nobody can tell QEMU anything by it: a guest that stands
still would stand still as long. So, for the time of a capture, QEMU listens for a debugger as well (HMP ``gdbserver``),
on a socket in a folder of ours, 0700, which it is handed by descriptor. Who connects may send HMP commands (``qRcmd``),
which a monitor carries out that QEMU keeps for that (``gdb_handle_query_rcmd`` in ``gdbstub``; tried with 7.2 and
10.0). That monitor, behind which there is nothing then, is what a QEMU has once more afterwards.

To connect stops a guest that runs, and so does each byte that is sent while it runs (``gdb_chr_event``,
``gdb_read_byte``): this is for a guest that stands still, and ``cont`` is the last word.
"""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError, VmGone
from vmsnap.model import Moment
from vmsnap_drivers.qemu.capture.migration import MIGRATION_RUNS
from vmsnap_drivers.qemu.capture.revive import ENDED
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError
from vmsnap_drivers.qemu.peer import look_at
from vmsnap_drivers.qemu.unix_socket import bind_unix, connect_unix

NAME: Final = "vmsnap-monitor"
"""The character device, and the descriptor that is handed over."""
_DEBUGGERS_NAME: Final = "gdb"
"""What QEMU itself calls the character device of a stub that somebody asked for."""
_LISTENS: Final = "Waiting for gdb connection"
_TIMEOUT_SECONDS: Final = 3.0
_BETWEEN_TRIES_SECONDS: Final = 0.002
_PACKET: Final = re.compile(rb"\$([^#]*)#[0-9a-fA-F]{2}")


class SecondMonitor:
    """That of one VM; its socket is at `path`, where nothing is unless QEMU may listen there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_there(self) -> bool:
        """Whether QEMU may listen."""
        return self._path.exists()

    def open(self, monitor: Monitor) -> str:
        """Let QEMU listen, over its first monitor; returns why it does not, empty where it does. Takes some
        milliseconds, the guest running.

        :raises HypervisorError: the socket cannot be made, or QEMU does not answer
        """
        self.close(monitor)
        if _is_debugged(monitor):
            return "QEMU listens for a debugger of somebody else's"
        with socket.socket(socket.AF_UNIX) as listening:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                bind_unix(listening, self._path)
                listening.listen(1)
            except OSError as e:
                raise HypervisorError(f"{self._path} cannot be listened on: {e.strerror}") from e
            monitor.send_descriptor(NAME, listening.fileno())
        try:
            address = {"type": "fd", "data": {"str": NAME}}
            data = {"addr": address, "server": True, "wait": False}
            monitor.execute("chardev-add", {"id": NAME, "backend": {"type": "socket", "data": data}})
            said = _hmp(monitor, f"gdbserver chardev:{NAME}")
        except MonitorError as e:
            said = e.description
        if _LISTENS not in said:
            self.close(monitor)
            return f"QEMU does not listen for debuggers: {' '.join(said.split())}"
        return ""

    def close(self, monitor: Monitor) -> None:
        """Let QEMU listen no more; idempotent.

        :raises HypervisorError: QEMU does not answer
        """
        if NAME in _labels(monitor):
            # The stub takes its character device with it, if it came to have it.
            _hmp(monitor, "gdbserver none")
            if NAME in _labels(monitor):
                monitor.execute("chardev-remove", {"id": NAME})
        self.forget()

    def forget(self) -> None:
        """What `close` does when the QEMU has ended."""
        self._path.unlink(missing_ok=True)

    def make_run(self) -> Moment | None:
        """Make the guest execute, a migration that goes on cancelled before; return the moment. None where nobody
        listens: QEMU has ended, or never came to it. Blocks for 3 s at most; idempotent.

        :raises VmGone: the guest has ended
        :raises HypervisorError: QEMU does not answer, or refuses
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_TIMEOUT_SECONDS)
            try:
                connect_unix(client, self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            except OSError as e:
                raise HypervisorError(f"{self._path} cannot be reached: {e}") from e
            stub = _Stub(client, self._path, deadline)
            while True:
                status = stub.command("info status")
                if (why := re.search(r"\((\S+?)\)", status)) and why[1] in ENDED:
                    raise VmGone(f"the guest behind {self._path} has ended ({why[1]})")
                migration = re.search(r"\bstatus:\s*([\w-]+)", stub.command("info migrate"), re.IGNORECASE)
                if migration and migration[1] in MIGRATION_RUNS:
                    stub.command("migrate_cancel")
                    refused = f"its migration is {migration[1]}"
                else:
                    refused = stub.command("cont")
                    if not refused:
                        return Moment.now("resume")
                if time.monotonic() > deadline:
                    raise HypervisorError(f"the VM behind {self._path} cannot be made to run: {refused}")
                time.sleep(_BETWEEN_TRIES_SECONDS)


class _Stub:
    """The debugger's side of a connection (the remote protocol of gdb)."""

    def __init__(self, client: socket.socket, path: Path, deadline: float) -> None:
        self._client = client
        self._path = path
        self._deadline = deadline
        self._pending = b""

    def command(self, line: str) -> str:
        """What the monitor says to an HMP command, in one line.

        :raises HypervisorError: QEMU hung up, or does not answer
        """
        packet = b"qRcmd," + line.encode().hex().encode()
        said = b""
        try:
            # The first acknowledges what was answered last, the second would stop the guest in place of what follows.
            self._client.sendall(b"++$%b#%02x" % (packet, sum(packet) % 256))
            while (answer := self._next()) != b"OK":
                if answer.startswith(b"E"):
                    raise HypervisorError(f"the QEMU behind {self._path} refuses {line!r}: {answer.decode()}")
                if answer.startswith(b"O"):
                    said += bytes.fromhex(answer[1:].decode())
        except (OSError, ValueError) as e:
            raise HypervisorError(f"the QEMU behind {self._path} did not answer {line!r}: {e}") from e
        return " ".join(said.decode(errors="replace").split())

    def _next(self) -> bytes:
        while not (found := _PACKET.search(self._pending)):
            self._client.settimeout(max(0.01, self._deadline - time.monotonic()))
            data = self._client.recv(65536)
            if not data:
                raise ConnectionResetError("it hung up")
            self._pending += data
        self._pending = self._pending[found.end() :]
        return found[1]


def _hmp(monitor: Monitor, line: str) -> str:
    return str(monitor.execute("human-monitor-command", {"command-line": line}))


def _labels(monitor: Monitor) -> set[str]:
    return {str(entry["label"]) for entry in monitor.execute("query-chardev")}


def _is_debugged(monitor: Monitor) -> bool:
    """Whether somebody else has asked QEMU to listen for a debugger; there is one stub only."""
    words = look_at(monitor.peer_pid).argv
    return _DEBUGGERS_NAME in _labels(monitor) or any(word in ("-s", "-gdb", "--gdb") for word in words)
