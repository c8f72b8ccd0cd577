"""QEMU's human monitor, spoken to as a person would, one connection a command."""

from __future__ import annotations

import re
import socket
import struct
import time
from pathlib import Path

from vmsnap.errors import HypervisorError, UnknownVm, VmGone
from vmsnap.model import VmState

_PROMPT = b"(qemu) "
_STATUS = re.compile(r"VM status: (\w+)(?: \(([\w-]+)\))?")
_EACH_SECONDS = 0.002
MAX_SOCKET_PATH = 107
"""sockaddr_un, unix(7)."""


class NoAnswer(HypervisorError):
    """The monitor was reached and did not answer in time: it is not known whether the command was carried out."""


class Monitor:
    """The monitor at a UNIX socket. It serves one client at a time, so no connection is kept: another process, such as
    the guardian, gets its turn at once.
    """

    def __init__(self, vm: str, path: Path) -> None:
        """No I/O."""
        self.vm = vm
        self.path = path

    def connect(self, timeout_seconds: float) -> socket.socket:
        """A connection.

        :raises UnknownVm: there is no socket
        :raises VmGone: nobody listens on it any more
        :raises NoAnswer: others wait for it already, and it takes none of them
        :raises HypervisorError: it cannot be reached
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_seconds)
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                try:
                    connection.connect(str(self.path))
                    return connection
                except BlockingIOError:  # the queue is full (connect(2), EAGAIN)
                    if time.monotonic() > deadline:
                        raise NoAnswer(f"VM {self.vm!r}: {self.path} takes no connection") from None
                    time.sleep(_EACH_SECONDS)
        except FileNotFoundError:
            connection.close()
            raise UnknownVm(f"no VM {self.vm!r} is at {self.path}", cure="see its option -monitor") from None
        except ConnectionRefusedError:
            connection.close()
            raise VmGone(f"VM {self.vm!r} is gone: nobody listens on {self.path}") from None
        except OSError as e:
            connection.close()
            raise HypervisorError(f"VM {self.vm!r}: the monitor {self.path} cannot be reached: {e}") from e
        except NoAnswer:
            connection.close()
            raise

    def process(self) -> int:
        """The process that listens there (SO_PEERCRED, unix(7)); it need not answer."""
        with self.connect(1.0) as connection:
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", raw)[0]
        return pid

    def ask(self, command: str, timeout_seconds: float) -> str:
        """Give a command, and return what it prints.

        :raises NoAnswer: nothing came in time
        :raises VmGone: it ended meanwhile, or before
        """
        deadline = time.monotonic() + timeout_seconds
        with self.connect(timeout_seconds) as connection:
            try:
                self._read_prompt(connection, deadline)
                connection.sendall(command.encode() + b"\n")
                answer = self._read_prompt(connection, deadline)
            except TimeoutError:
                raise NoAnswer(f"VM {self.vm!r}: no answer to {command!r} within {timeout_seconds:g} s") from None
            except OSError as e:
                raise VmGone(f"VM {self.vm!r} ended at {command!r}: {e}") from e
        # The line editor repeats the command, letter by letter; the answer begins on the next line.
        return answer.partition(b"\r\n")[2].removesuffix(_PROMPT).decode(errors="replace").replace("\r\n", "\n").strip()

    def _read_prompt(self, connection: socket.socket, deadline: float) -> bytes:
        found = b""
        while not (found.endswith(b"\n" + _PROMPT) or found == _PROMPT):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            more = connection.recv(65536)
            if not more:
                raise ConnectionResetError("it closed its monitor")
            found += more
        return found

    def tell(self, command: str, timeout_seconds: float) -> None:
        """Give a command that prints nothing.

        :raises HypervisorError: it printed something: what is wrong
        """
        answer = self.ask(command, timeout_seconds)
        if answer:
            raise HypervisorError(f"VM {self.vm!r}: {command!r}: {' '.join(answer.split())}")

    def tell_until_taken(self, command: str, timeout_seconds: float) -> None:
        """The same, for a command that QEMU refuses for a moment only.

        :raises HypervisorError: it refuses it still
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                return self.tell(command, timeout_seconds)
            except (NoAnswer, UnknownVm, VmGone):
                raise
            except HypervisorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_EACH_SECONDS)

    def status(self, timeout_seconds: float) -> tuple[VmState, str]:
        """What the VM does, and QEMU's own word for it.

        :raises HypervisorError: the answer is none
        """
        found = _STATUS.match(self.ask("info status", timeout_seconds))
        if found is None:
            raise HypervisorError(f"VM {self.vm!r} does not say what it does")
        if found[1] == "running":
            return VmState.EXECUTING, "running"
        word = found[2] or found[1]
        return (VmState.ENDED if word in ("shutdown", "guest-panicked", "internal-error") else VmState.STOPPED), word

    def await_status(self, wanted: tuple[str, ...], timeout_seconds: float) -> None:
        """Wait until QEMU's word for what the VM does is one of these.

        :raises HypervisorError: it is not in time
        """
        deadline = time.monotonic() + timeout_seconds
        while (word := self.status(timeout_seconds)[1]) not in wanted:
            if time.monotonic() > deadline:
                raise HypervisorError(f"VM {self.vm!r} is {word} and not {' or '.join(wanted)}")
            time.sleep(_EACH_SECONDS)
