"""Runs the commands of snapshot mechanisms on another machine, over SSH.

The machine's host key must be known; nothing is asked, and nothing but OpenSSH's own files is believed. A command line
is quoted word by word (`shlex.join`) for the shell that sshd runs it with. Whoever is not root there needs sudo without
a password: it is told the command itself, so that its rules can name that, arguments and all.
"""

from __future__ import annotations

import logging
import re
import shlex
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Timer
from typing import IO, TYPE_CHECKING, Final, cast

from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError, VmsnapError
from vmsnap_drivers.runner import LATE_SECONDS, Output, Runner, one_line, still_going

if TYPE_CHECKING:
    from paramiko import Channel, SSHClient

_URL: Final = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z_][A-Za-z0-9_.-]{0,31})@)?(?P<host>[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::(?P<port>\d{1,5}))?/?"
)
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEM_KNOWN_HOSTS: Final = Path("/etc/ssh/ssh_known_hosts")
_CONNECT_SECONDS: Final = 20.0
_KEEPALIVE_SECONDS: Final = 10
_LOG: Final = "vmsnap.ssh"
_NOT_FOUND: Final = 127
"""The status of ``env`` for a program that there is not."""
_FOR_EVERYBODY: Final = frozenset(["which"])
"""What is not given to sudo."""
_SUDO_FAILED: Final = 1
_SUDO_HAS_NONE: Final = re.compile(r"^sudo: .*: command not found$", re.MULTILINE)
# As sudo 1.8 and 1.9 say it (check.c, logging.c, sudo.c); warnings, after which it goes on, begin with its name too.
_SUDO_REFUSES: Final = re.compile(
    r"^sudo: .*\b(?:password|authentication|askpass|tty|terminal|account|new privileges|setuid|sudoers sources)\b"
    r"|^sorry, user \S+ (?:is not allowed|may not)|is not in the sudoers file|is not allowed to run sudo",
    re.MULTILINE | re.IGNORECASE,
)
_LONGEST_SHOWN: Final = 200


@dataclass(frozen=True)
class SshSettings:
    """How hosts are reached: files instead of the user's own, where they are given."""

    known_hosts: str = ""
    key: str = ""


class _Prompt(socket.socket):
    """A connection on which neither side waits for 40 ms until the other acknowledges the small message before: ours is
    sent at once (tcp(7), TCP_NODELAY), and what comes is acknowledged at once (TCP_QUICKACK, which does not last).
    """

    @classmethod
    def to(cls, host: str, port: int) -> _Prompt:
        """See `socket.create_connection`."""
        made = cls(fileno=socket.create_connection((host, port), _CONNECT_SECONDS).detach())
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        received = super().recv(size, flags)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return received


class SshRunner(Runner):
    """Commands of the machine at an address such as ``ssh://root@san.example:22``."""

    def __init__(self, url: str, settings: SshSettings) -> None:
        """Remember it; no I/O.

        :raises UsageError: it is no such address
        """
        found = _URL.fullmatch(url)
        if found is None:
            raise UsageError(f"{url!r} is no address of a machine", cure="write it as ssh://USER@HOST:PORT")
        self.url = url
        self._host, self._user = found["host"].strip("[]"), found["user"] or "root"
        self._port = int(found["port"] or 22)
        self._settings = settings
        self._client: SSHClient | None = None
        self._late: list[tuple[str, Channel]] = []
        self._lock = Lock()

    def find(self, program: str) -> str | None:
        """See `Runner.find`."""
        done = self.run(["which", program], _CONNECT_SECONDS)
        return done.stdout.strip() or None

    def may_use(self, device: Path) -> bool:
        """See `Runner.may_use`."""
        return self.run(["test", "-r", str(device), "-a", "-w", str(device)], _CONNECT_SECONDS).status == 0

    def run(self, argv: Sequence[str], seconds: float, *, changes: bool = False) -> Output:
        """See `Runner.run`. What has begun there goes on when we die or are cut off, and ends by itself.

        :raises SnapshotError: the machine cannot be reached, is not the one that it was, or does not let us in
        """
        channel = self._begin(argv)
        late = False
        deadline = time.monotonic() + seconds
        said: dict[bool, bytearray] = {True: bytearray(), False: bytearray()}
        try:
            while not _is_whole(channel, deadline):
                if channel.recv_ready():
                    said[True] += channel.recv(1 << 16)
                elif channel.recv_stderr_ready():
                    said[False] += channel.recv_stderr(1 << 16)
                elif not self._is_connected():
                    raise SnapshotError(f"the connection to {self.url} was lost during {argv[0]}, which may go on")
                elif time.monotonic() > deadline and not channel.exit_status_ready():
                    late = True
                    self._late.append((argv[0], channel))
                    raise SnapshotError(f"{argv[0]} on {self.url} did not end within {seconds:g} s, and may go on")
                else:
                    channel.status_event.wait(0.005)
            status = channel.recv_exit_status()
        finally:
            if not late:
                channel.close()
        if status < 0:
            raise SnapshotError(f"the connection to {self.url} was lost during {argv[0]}, which may go on")
        output = Output(status, said[True].decode(errors="replace"), said[False].decode(errors="replace"))
        if (refusal := self._refusal(argv, output)) is not None:
            raise refusal
        return output

    @contextmanager
    def stream(self, argv: Sequence[str], seconds: float) -> Iterator[IO[bytes]]:
        """See `Runner.stream`."""
        channel = self._begin(argv)
        try:
            with channel.makefile("rb") as pipe:
                yield cast("IO[bytes]", pipe)  # it has the methods
            said = bytearray()
            deadline = time.monotonic() + seconds
            while not _is_whole(channel, deadline):
                if channel.recv_stderr_ready():
                    said += channel.recv_stderr(1 << 16)
                elif not self._is_connected() or time.monotonic() > deadline:
                    raise SnapshotError(f"{argv[0]} on {self.url} does not end, or the connection was lost")
                else:
                    channel.status_event.wait(0.005)
            if status := channel.recv_exit_status():
                output = Output(status, "", said.decode(errors="replace"))
                failed = SnapshotError(f"{argv[0]} on {self.url} failed: {one_line(output.stderr)}")
                raise self._refusal(argv, output) or failed
        finally:
            channel.close()

    def lines(self, argv: Sequence[str], seconds: float) -> Iterator[str]:
        """See `Runner.lines`."""
        done = self.run(argv, seconds)
        if done.status:
            raise SnapshotError(f"{argv[0]} on {self.url} failed: {one_line(done.stderr)}")
        yield from done.stdout.splitlines(keepends=True)

    def await_late(self) -> None:
        """See `Runner.await_late`. Of a command whose connection was lost nobody can tell."""
        deadline = time.monotonic() + LATE_SECONDS
        for late in list(self._late):
            name, channel = late
            while not (channel.exit_status_ready() or channel.closed):
                if time.monotonic() > deadline:
                    raise still_going(name, f"on {self.url}")
                channel.status_event.wait(0.05)
            channel.close()
            self._late.remove(late)

    def close(self) -> None:
        """See `Runner.close`."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _refusal(self, argv: Sequence[str], output: Output) -> VmsnapError | None:
        """What is wrong where a command did not run at all; None where it did."""
        asked_sudo = self._user != "root" and argv[0] not in _FOR_EVERYBODY
        if output.status == _NOT_FOUND:
            missing = "sudo" if asked_sudo and "sudo" in output.stderr else argv[0]
            return DriverUnavailable(f"the program {missing} is not installed on {self.url}")
        if not asked_sudo or output.status != _SUDO_FAILED:
            return None
        refused = _SUDO_REFUSES.search(output.stderr) is not None
        # What its rules do not name it refuses, whether it is there or not.
        if _SUDO_HAS_NONE.search(output.stderr) or (refused and self.find(argv[0]) is None):
            return DriverUnavailable(f"the program {argv[0]} is not installed on {self.url}")
        if not refused:
            return None
        shown = " ".join(shlex.join(argv).split())
        return SnapshotError(
            f"sudo on {self.url} does not let {self._user} run this without a password:"
            f" {shown if len(shown) <= _LONGEST_SHOWN else argv[0]}",
            cure="allow it there (NOPASSWD): the lines for sudoers are in the docs: iscsi",
        )

    def _begin(self, argv: Sequence[str]) -> Channel:
        as_root = ["sudo", "-n", "--"] if self._user != "root" and argv[0] not in _FOR_EVERYBODY else []
        # Around sudo, which hands LC_ALL on (its env_keep), and before which env works in any shell.
        words = ["env", "LC_ALL=C", f"PATH={_PATH}", *as_root, *argv]
        from paramiko import SSHException

        try:
            transport = self._connected().get_transport()
            if transport is None:
                raise SnapshotError(f"the connection to {self.url} was lost")
            channel = transport.open_session(timeout=_CONNECT_SECONDS)
            # paramiko waits for the answer as long as it takes.
            silent = Timer(_CONNECT_SECONDS, channel.close)
            silent.daemon = True
            silent.start()
            try:
                channel.exec_command(shlex.join(words))
            finally:
                silent.cancel()
        except (SSHException, EOFError, OSError) as e:
            self.close()
            raise SnapshotError(f"{self.url} cannot be told to run {argv[0]}: {e or 'it does not answer'}") from e
        return channel

    def _is_connected(self) -> bool:
        client = self._client
        transport = client.get_transport() if client is not None else None
        return transport is not None and transport.is_active()

    def _connected(self) -> SSHClient:
        with self._lock:
            if not self._is_connected():
                if self._client is not None:
                    self._client.close()
                self._client = self._connect()
            client = self._client
        if client is None:
            raise SnapshotError(f"the connection to {self.url} was lost")
        return client

    def _connect(self) -> SSHClient:
        try:
            from paramiko import (
                AuthenticationException,
                BadHostKeyException,
                RejectPolicy,
                SSHClient,
                SSHException,
            )
            from paramiko.hostkeys import InvalidHostKey
        except ImportError as e:
            raise DriverUnavailable(
                "commands on other machines need paramiko, which is not installed", cure="pip install 'vmsnap[ssh]'"
            ) from e
        client = SSHClient()
        client.set_missing_host_key_policy(RejectPolicy())
        # Where nobody takes its messages, Python would print those of lost connections, tracebacks included.
        logging.getLogger(_LOG).addHandler(logging.NullHandler())
        client.set_log_channel(_LOG)
        known_hosts = self._settings.known_hosts
        try:
            if known_hosts:
                client.load_host_keys(known_hosts)
            else:
                client.load_system_host_keys()
                with suppress(FileNotFoundError):
                    client.load_system_host_keys(str(_SYSTEM_KNOWN_HOSTS))
            client.connect(
                self._host, self._port, self._user, sock=_Prompt.to(self._host, self._port),
                key_filename=self._settings.key or None,
                timeout=_CONNECT_SECONDS, banner_timeout=_CONNECT_SECONDS, auth_timeout=_CONNECT_SECONDS,
                look_for_keys=not self._settings.key, allow_agent=not self._settings.key,
            )  # fmt: skip
        except (InvalidHostKey, UnicodeDecodeError) as e:
            client.close()
            raise SnapshotError(
                f"{known_hosts or 'a file of known host keys'} has a line that is none: {e}",
                cure="mend it, or remove it",
            ) from e
        except BadHostKeyException as e:
            client.close()
            raise SnapshotError(
                f"THE HOST KEY OF {self._host} HAS CHANGED: somebody may be between you and it",
                cure="ask who runs it; only if the key was changed on purpose: ssh-keygen -R",
            ) from e
        except AuthenticationException as e:
            client.close()
            raise SnapshotError(
                f"{self.url} does not let {self._user} in", cure="put this host's public key into its authorized_keys"
            ) from e
        except (SSHException, EOFError, OSError) as e:
            client.close()
            raise _unreachable(self.url, e) from e
        transport = client.get_transport()
        if transport is not None:
            transport.set_keepalive(_KEEPALIVE_SECONDS)
        return client


def _is_whole(channel: Channel, deadline: float) -> bool:
    """Whether the status is there and nothing more will be said.

    A server may tell the status before the rest of the words (RFC 4254, 6.10: they are only in order with themselves),
    and the words end when nobody is left who could say any. Past the deadline the status alone is enough: what was left
    behind there, such as a daemon, may keep its ends open for good.
    """
    is_ended = channel.eof_received or channel.closed or time.monotonic() > deadline
    return bool(
        is_ended and channel.exit_status_ready() and not channel.recv_ready() and not channel.recv_stderr_ready()
    )


def _unreachable(url: str, error: Exception) -> SnapshotError:
    said = getattr(error, "strerror", None) or str(error) or "it does not answer"
    if said.startswith("Error reading SSH protocol banner"):
        said = "nobody answers there as SSH does, or the connection was lost at once"
    if "not found in known_hosts" in said:
        return SnapshotError(
            f"the host key of {url} is not known",
            cure="compare it with the machine's own, then: ssh-keyscan >> known_hosts",
        )
    return SnapshotError(f"{url} cannot be reached: {said}", cure="see that it runs, and that its SSH answers")
