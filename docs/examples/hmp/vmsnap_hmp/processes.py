"""Processes of QEMU: which one it is, whether it lives, and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import HypervisorError

_KEPT = ("LD_LIBRARY_PATH", "QEMU_MODULE_DIR")
"""The variables that decide which QEMU it is; no others are kept, since they could hold secrets."""


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one of the same number (proc(5): starttime; boot_id)."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this number now; None where there is none, or one that has ended."""
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        if words[0] in "ZX":
            return None
        return cls(pid, int(words[19]), Path("/proc/sys/kernel/random/boot_id").read_text().strip())

    def lives(self) -> bool:
        """Whether it has not ended."""
        return Process.of(self.pid) == self

    def argv(self) -> list[str]:
        """Its command line."""
        return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode().split("\0")[:-1]

    def program(self) -> str:
        """The path of what it executes."""
        return str(Path(f"/proc/{self.pid}/exe").readlink())

    def variables(self) -> Mapping[str, str]:
        """What another process needs of its environment to be the same."""
        text = Path(f"/proc/{self.pid}/environ").read_bytes().decode(errors="replace")
        found = dict(entry.partition("=")[::2] for entry in text.split("\0") if entry)
        return {name: found[name] for name in _KEPT if name in found}

    def maps(self, file: Path) -> bool:
        """Whether it has this very file in its memory, shared (proc(5): maps)."""
        status = file.stat()
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            words = line.split()
            if words[3] == device and int(words[4]) == status.st_ino:
                return words[1].endswith("s")
        return False

    def kill(self, timeout_seconds: float) -> None:
        """Kill it, and wait until it is gone; idempotent.

        :raises HypervisorError: it is no QEMU, or does not end
        """
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # The descriptor was got first: what is looked at now is what will be killed.
            if not self.lives():
                return
            try:
                program = self.program()
            except (FileNotFoundError, ProcessLookupError):  # it is ending
                program = "qemu"
            if "qemu" not in Path(program).name:
                raise HypervisorError(f"process {self.pid} is {program} and no QEMU: it is not killed")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if not select.select([descriptor], [], [], timeout_seconds)[0]:
                raise HypervisorError(f"process {self.pid} was killed and has not ended", cure="see what it waits for")
        finally:
            os.close(descriptor)
