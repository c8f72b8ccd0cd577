"""Runs the commands of snapshot mechanisms: argument lists without a shell, each with a time-out.

Commands that change storage are never killed: LVM suspends the devices of running guests while it works, and would
leave them so. One that takes too long, or whose vmsnap has died, is asked to stop by SIGTERM, which LVM obeys where it
can (``lib/misc/lvm-signal.c`` of LVM 2.03.16), and is left to itself if it cannot.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from vmsnap.errors import DriverUnavailable, SnapshotError

_STOPPING_SECONDS: Final = 5.0
LATE_SECONDS: Final = 60.0
"""How long commands are waited for that should have ended."""
_LOOK_EACH_SECONDS: Final = 0.05
_MORE_FOLDERS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True)
class Output:
    """What a command that ended has said."""

    status: int
    stdout: str
    stderr: str


class Runner(ABC):
    """A place where commands run."""

    @abstractmethod
    def find(self, program: str) -> str | None:
        """The path of the program; None where it is not installed."""

    @abstractmethod
    def may_use(self, device: Path) -> bool:
        """Whether there is such a device, and commands may read and write it."""

    @abstractmethod
    def run(self, argv: Sequence[str], seconds: float, *, changes: bool = False) -> Output:
        """Run a command to its end, whatever its status. Blocks.

        :param changes: it changes something, and must not go on when we have died
        :raises DriverUnavailable: the program is not installed
        :raises SnapshotError: it did not end within `seconds`, and was asked to stop; it may go on
        """

    @abstractmethod
    def stream(self, argv: Sequence[str], seconds: float) -> AbstractContextManager[IO[bytes]]:
        """Run a command that only reads, and give what it prints, as bytes, while it runs: for a ``with``, in which all
        is read to the end. It is ended when an error ends that.

        :raises DriverUnavailable: the program is not installed
        :raises SnapshotError: it failed, which is told when all is read
        """

    @abstractmethod
    def lines(self, argv: Sequence[str], seconds: float) -> Iterator[str]:
        """Run a command that only reads, and yield what it prints, line by line. It is ended when the iterator is.

        :raises DriverUnavailable: the program is not installed
        :raises SnapshotError: it failed, which may be told after some lines
        """

    @abstractmethod
    def await_late(self) -> None:
        """Wait until all commands have ended that were not when their time was over: what they make would come into
        being after it was removed. Blocks for a minute at most.

        :raises SnapshotError: one has not
        """

    def await_others(self, *words: str) -> None:
        """Wait until no command is left that has these words: those of a vmsnap which died were asked to stop, and may
        go on all the same. Does nothing where nobody can tell. Blocks for a minute at most.

        :raises SnapshotError: one is left
        """

    def close(self) -> None:
        """Let go of connections; idempotent."""


class LocalRunner(Runner):
    """Commands of this host. They see no descriptors of ours, no terminal, and English messages."""

    def __init__(self) -> None:
        self._late: list[tuple[str, subprocess.Popen[bytes]]] = []

    def find(self, program: str) -> str | None:
        """See `Runner.find`. Folders of the administrator's programs are searched too."""
        return shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_MORE_FOLDERS)))

    def may_use(self, device: Path) -> bool:
        """See `Runner.may_use`."""
        return os.access(device, os.R_OK | os.W_OK)

    def run(self, argv: Sequence[str], seconds: float, *, changes: bool = False) -> Output:
        """See `Runner.run`."""
        # Into files: a command that is left to itself must not be ended by a pipe that nobody reads any more.
        with _memory_file() as stdout, _memory_file() as stderr:
            process = self._start(argv, stdout, stderr, tied=changes)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired as e:
                if _ends(process):
                    raise SnapshotError(f"{_name(argv)} did not end within {seconds:g} s and was stopped") from e
                self._late.append((_name(argv), process))
                raise SnapshotError(
                    f"{_name(argv)} did not end within {seconds:g} s, and does not stop (process {process.pid})",
                    cure="see what it waits for; it is not killed, since a guest's disk may depend on it",
                ) from e
            except BaseException:
                process.terminate()
                self._late.append((_name(argv), process))
                raise
            return Output(status, _text(stdout), _text(stderr))

    @contextmanager
    def stream(self, argv: Sequence[str], seconds: float) -> Iterator[IO[bytes]]:
        """See `Runner.stream`; `seconds` is how long it may take to end when all is read."""
        with _memory_file() as stderr:
            process = self._start(argv, subprocess.PIPE, stderr)
            pipe = process.stdout
            if pipe is None:
                raise SnapshotError(f"{argv[0]} was started without a pipe")
            try:
                yield pipe
                status = process.wait(seconds)
            except subprocess.TimeoutExpired as e:
                raise SnapshotError(f"{_name(argv)} does not end") from e
            finally:
                pipe.close()
                if process.poll() is None:
                    _ends(process)
            if status:
                raise SnapshotError(f"{_name(argv)} failed: {one_line(_text(stderr))}")

    def lines(self, argv: Sequence[str], seconds: float) -> Iterator[str]:
        """See `Runner.lines`; `seconds` as in `stream`."""
        with self.stream(argv, seconds) as pipe:
            for line in pipe:
                yield line.decode(errors="replace")

    def await_late(self) -> None:
        """See `Runner.await_late`."""
        deadline = time.monotonic() + LATE_SECONDS
        for late in list(self._late):
            name, process = late
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as e:
                raise still_going(name, f"process {process.pid}") from e
            self._late.remove(late)

    def await_others(self, *words: str) -> None:
        """See `Runner.await_others`: those of this host that we may look at."""
        deadline = time.monotonic() + LATE_SECONDS
        while found := next(commands_with(*words), None):
            if time.monotonic() > deadline:
                raise still_going(*found)
            time.sleep(_LOOK_EACH_SECONDS)

    def _start(
        self, argv: Sequence[str], stdout: int | IO[bytes], stderr: IO[bytes], *, tied: bool = False
    ) -> subprocess.Popen[bytes]:
        program = self.find(argv[0])
        if program is None:
            raise DriverUnavailable(f"the program {argv[0]} is not installed")
        tie = self._tie() if tied else []
        try:
            return subprocess.Popen(
                [*tie, program, *argv[1:]], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                env={**os.environ, "LC_ALL": "C"}, cwd=Path("/"), start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            raise SnapshotError(f"{argv[0]} could not be run: {e.strerror}") from e

    def _tie(self) -> list[str]:
        """Have the kernel send SIGTERM when we die: what we have begun must not come into being after the recovery."""
        setpriv = self.find("setpriv")
        return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def commands_with(*words: str) -> Iterator[tuple[str, str]]:
    """The names of processes in whose command line these words stand, and which they are; what has ended has none.

    Words end at ``=`` and ``@`` too: ``zfs`` cuts its arguments there, in the memory that the kernel shows.
    """
    wanted = {os.fsencode(word) for word in words}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if wanted <= set(re.split(rb"[\0=@]", line)):
            yield _name([os.fsdecode(word) for word in line.split(b"\0")]), f"process {process.name}"


def still_going(name: str, which: str) -> SnapshotError:
    """What `Runner.await_late` raises."""
    return SnapshotError(
        f"{name} ({which}) has still not ended, and what it makes could not be removed yet",
        cure="see what it waits for, then: vmsnap recover",
    )


def one_line(text: str) -> str:
    """The lines of a command's complaint as one, without the warnings where there is more."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    serious = [line for line in lines if not line.startswith("WARNING:")]
    return "; ".join(serious or lines)


def _ends(process: subprocess.Popen[bytes]) -> bool:
    process.terminate()
    try:
        process.wait(_STOPPING_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _name(argv: Sequence[str]) -> str:
    return " ".join(argv[:2])


def _memory_file() -> IO[bytes]:
    return os.fdopen(os.memfd_create("said", os.MFD_CLOEXEC), "w+b", buffering=0)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
