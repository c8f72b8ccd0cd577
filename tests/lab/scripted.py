"""What takes scripts: a guest that a shell in it serves, whose names come by a line and whose ends go by one."""

import socket
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .machine import LabError

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """How a script in the guest ended, and what it printed."""

    status: int
    output: str


class ScriptedGuest(ABC):
    """One such guest. Use with ``with``; ``results`` is the folder that both sides see, ``/run/results`` in there."""

    def __init__(self, folder: Path) -> None:
        """Describe it; nothing is started."""
        self.folder = folder
        self.results = folder / "results"
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._heard = b""

    @abstractmethod
    def start(self) -> None:
        """Boot it and wait until it takes scripts; some seconds.

        :raise LabError: it does not come up.
        :raise LookupError: install.sh has not been run.
        """

    def begin(self, name: str, script: str) -> None:
        """Let a shell in the guest begin with `script`; `name` is that of its file. One at a time."""
        (self.results / name).write_text(script)
        self._send(name)

    def end(self, name: str, seconds: float) -> Ended:
        """Wait for the script's end.

        :raise LabError: it does not end in time, or the guest is gone.
        """
        answer = self._listen(seconds, name)
        return Ended(int(answer.split()[1]), self.output(name))

    def run(self, name: str, script: str, seconds: float = 120.0) -> Ended:
        """Run `script` in the guest to its end."""
        self.begin(name, script)
        return self.end(name, seconds)

    def output(self, name: str) -> str:
        """What the script has printed so far."""
        path = self.results / f"{name}.output"
        return path.read_text(errors="replace") if path.exists() else ""

    def ended(self, name: str) -> bool:
        """Whether the script has ended, or the guest has; then `end` does not wait."""
        if self._process is None or self._process.poll() is not None:
            return True
        self._hear(0.0)
        return any(line.split()[:1] == [name.encode()] for line in self._heard.split(b"\n")[:-1])

    def kill(self) -> None:
        """End the guest now. Killing twice is fine."""
        if self._port is not None:
            self._port.close()
            self._port = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def last_words(self) -> str:
        """The end of what QEMU and the guest's console said."""
        texts = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
        return " | ".join(texts)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

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
