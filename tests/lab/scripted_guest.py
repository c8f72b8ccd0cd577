"""A guest for what this host's kernel cannot do, whichever way it runs: a shell in it runs the scripts whose names come
by a line, and says by one how each has ended.

Its root is the host's own, read-only, with the packages of install.sh laid over it and RAM over both: programs, the
checkout and its virtual environment are there as they are here, and nothing that it does reaches the host but through
the folder of results. It has no udev.
"""

import os
import signal
import socket
import subprocess
import time
from abc import abstractmethod
from contextlib import suppress
from pathlib import Path

from .machine import LabError
from .scripted import Ended, Scripted

CHECKOUT = Path(__file__).resolve().parent.parent.parent
INIT = Path(__file__).parent / "storage_guest"
"""The folder of what is PID 1 of each."""
MEMORY_MIB = 1024
_BOOT_SECONDS = 180.0
_POLL_SECONDS = 0.05


class ScriptedGuest(Scripted):
    """One such guest."""

    def __init__(self, folder: Path) -> None:
        """Describe it; nothing is started."""
        super().__init__(folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._heard = b""

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """What to start; `port` is the file descriptor of the lines.

        :raise LookupError: install.sh has not been run.
        """

    def start(self) -> None:
        """Boot it and wait until it takes scripts; some seconds.

        :raise LabError: it does not come up.
        :raise LookupError: install.sh has not been run.
        """
        self.results.mkdir(parents=True)
        self._port, theirs = socket.socketpair()
        with theirs, (self.folder / "guest.log").open("wb") as log:
            self._process = subprocess.Popen(
                # User-mode Linux has its memory there, in a file without a name: on a disk it would be written back.
                self._command(theirs.fileno()), env={**os.environ, "TMPDIR": "/dev/shm"},
                pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._listen(_BOOT_SECONDS, "ready")
        except (OSError, LabError) as e:
            self.kill()
            raise LabError(f"the storage guest does not come up: {e}: {self.last_words()}") from e

    def begin(self, name: str, script: str) -> None:
        """See `Scripted.begin`."""
        (self.results / name).write_text(script)
        self._send(name)

    def end(self, name: str, seconds: float) -> Ended:
        """See `Scripted.end`."""
        answer = self._listen(seconds, name)
        return Ended(int(answer.split()[1]), self.output(name))

    def ended(self, name: str) -> bool:
        """See `Scripted.ended`."""
        if self._process is None or self._process.poll() is not None:
            return True
        self._hear(0.0)
        return any(line.split()[:1] == [name.encode()] for line in self._heard.split(b"\n")[:-1])

    def kill(self) -> None:
        """See `Started.kill`. User-mode Linux is several processes."""
        if self._port is not None:
            self._port.close()
            self._port = None
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _send(self, line: str) -> None:
        if self._port is None:
            raise LabError("the guest was not started")
        self._port.sendall(line.encode() + b"\n")

    def _listen(self, seconds: float, word: str) -> str:
        """The next line, which begins with `word`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._heard:
            if self._process is None or self._process.poll() is not None:
                raise LabError(f"the guest has ended: {self.last_words()}")
            if time.monotonic() > deadline:
                raise LabError(f"the guest does not say {word!r} within {seconds:g} s: {self.last_words()}")
            self._hear(_POLL_SECONDS)
        line, _, self._heard = self._heard.partition(b"\n")
        text = line.decode(errors="replace").strip()
        if text.split()[:1] != [word]:
            raise LabError(f"the guest says {text!r} instead of {word!r}")
        return text

    def _hear(self, seconds: float) -> None:
        if self._port is None:
            raise LabError("the guest was not started")
        self._port.settimeout(seconds or 1e-6)
        try:
            self._heard += self._port.recv(4096)
        except TimeoutError:
            return
