"""Starts the processes of a server and sees them answer; ends them whatever happens."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_READY_SECONDS = 60.0


class Processes:
    """The processes of one server. A context manager: afterwards none of them is left."""

    def __init__(self, folder: Path) -> None:
        """:param folder: where their output goes, a file each"""
        self.folder = folder
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        running = [process for _, process in self._running]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start one. It ends when this process does, however that ends (prctl(2), PR_SET_PDEATHSIG)."""
        command = ["setpriv", "--pdeathsig", "TERM", *command]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self._running.append((name, process))

    def wait_for(self, port: int) -> None:
        """Return when somebody listens on `port`; fail with the output of a process that has ended instead."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                pass
            for name, process in self._running:
                if process.poll() is not None:
                    log = (self.folder / f"{name}.log").read_text(errors="replace")
                    raise RuntimeError(f"{name} ended with {process.returncode}: {log[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody listens on port {port}")
            time.sleep(0.05)

    def stop_for_a_while(self, stopped: bool) -> None:
        """Freeze all of them, or let them go on."""
        for _, process in self._running:
            process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
