"""A real tgtd on loopback, with a port of its own: the iSCSI target that install.sh unpacked. Needs root."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

from .machine import LabError
from .ports import ADDRESS, free_port
from .qemus import unpacked
from .started import Started

_START_SECONDS = 30.0
_POLL_SECONDS = 0.02
_SOCKETS = Path("/var/run/tgtd")


def programs() -> Path:
    """The folder that has ``tgtd`` and ``tgtadm``.

    :raise LookupError: when install.sh has not been run.
    """
    return unpacked("tgt", "tgt") / "bin"


class TargetServer(Started):
    """One such server, for a ``with``. Several can run beside each other.

    :param everywhere: an address for all networks, such as ``[::]``, at which it listens in a network namespace of its
        own: nobody reaches it, but by ``tgtadm``
    """

    def __init__(self, folder: Path, everywhere: str = "") -> None:
        self.folder = folder
        self.everywhere = everywhere
        self.port = free_port()
        self.control_port = self.port  # such as it takes, which are no TCP ports: 32767 at most
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = 0
        self._users: set[str] = set()
        self.this_host = ADDRESS

    @property
    def options(self) -> dict[str, str]:
        """Of the mechanism ``iscsi``, for this server."""
        return {"control_port": str(self.control_port)}

    @property
    def portal(self) -> str:
        """Where it listens."""
        return f"{self.everywhere or ADDRESS}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process.

        :raise LabError: when it does not run.
        """
        if self._process is None:
            raise LabError("tgtd was not started")
        return self._process.pid

    def address(self, target: str) -> str:
        """The address of a target's first disk."""
        return f"iscsi://{self.portal}/{target}/1"

    def start(self) -> None:
        """Start it, and return when it answers.

        :raise LabError: when it does not.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        apart = ["unshare", "--net"] if self.everywhere else []
        with (self.folder / "tgtd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*apart, str(programs() / "tgtd"), "-f", "--iscsi", f"portal={self.portal}",
                 "-C", str(self.control_port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while self._ask("--mode", "target", "--op", "show").returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "tgtd.log").read_text(errors="replace")
                self.kill()
                raise LabError(f"tgtd does not come up: {said}")
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End it now; all its targets are forgotten. Killing twice is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._users.clear()
        for left in _SOCKETS.glob(f"socket.{self.control_port}*"):
            left.unlink()

    def tell(self, *words: str) -> str:
        """Give ``tgtadm`` a command.

        :raise LabError: when it fails.
        """
        done = self._ask(*words)
        if done.returncode:
            raise LabError(f"tgtadm {' '.join(words)}: {done.stderr}")
        return done.stdout

    def add(
        self,
        target: str,
        path: Path | None,
        *,
        user: str = "",
        password: str = "",
        shown: tuple[str, str] = ("", ""),
    ) -> int:
        """Make a target whose disk is that file (None: a target without one), for this host; returns its number.

        :param shown: the account by which the target shows who it is, and its secret
        """
        self._numbers += 1
        number = 100 + self._numbers
        tid = ("--tid", str(number))
        self.tell("--mode", "target", "--op", "new", *tid, "--targetname", target)
        if path is not None:
            self.tell("--mode", "logicalunit", "--op", "new", *tid, "--lun", "1", "--backing-store", str(path))
        for name, secret, way in ((user, password, ()), (*shown, ("--outgoing",))):
            if name and name not in self._users:
                self.tell("--mode", "account", "--op", "new", "--user", name, "--password", secret)
                self._users.add(name)
            if name:
                self.tell("--mode", "account", "--op", "bind", *tid, "--user", name, *way)
        self.tell("--mode", "target", "--op", "bind", *tid, "--initiator-address", ADDRESS)
        return number

    def remove(self, target: str) -> None:
        """Remove a target, whoever uses it."""
        (number,) = (tid for tid, name, _ in self._shown() if name == target)
        self.tell("--mode", "target", "--op", "delete", "--tid", number, "--force")

    def targets(self) -> dict[str, list[str]]:
        """All targets, each with its backing stores."""
        return {name: re.findall(r"Backing store path: (/\S+)", text) for _, name, text in self._shown()}

    def about(self, target: str) -> str:
        """All that is shown of one target."""
        (text,) = (text for _, name, text in self._shown() if name == target)
        return text

    def access(self, target: str) -> list[str]:
        """Whom a target admits."""
        return self.about(target).split("ACL information:")[1].split()

    def read_only(self, target: str) -> bool:
        """Whether whoever is admitted may only read."""
        return "Readonly: Yes" in self.about(target)

    def _shown(self) -> list[tuple[str, str, str]]:
        text = self.tell("--mode", "target", "--op", "show")
        parts = re.split(r"^Target (\d+): (\S+)$", text, flags=re.MULTILINE)[1:]
        return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))

    def _ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(programs() / "tgtadm"), "--control-port", str(self.control_port), "--lld", "iscsi", *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
