"""Linux' own initiator, by open-iscsi, in a guest whose kernel has it. Needs root and ``install.sh``.

``iscsiadm`` lies where programs are found, as if it had been installed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path
from types import TracebackType

from .machine import LabError
from .qemus import unpacked

NAME = "iqn.1993-08.org.debian:01:lab"
"""As whom it comes."""
_CONFIGURATION = Path("/etc/iscsi")
_PROGRAM = Path("/usr/local/sbin/iscsiadm")
_SECONDS = 60.0
_POLL_SECONDS = 0.05


class KernelInitiator:
    """Its daemon, for a ``with``; what was logged in to is let go of at the end."""

    def __init__(self) -> None:
        self._root = unpacked("open-iscsi", "open-iscsi")
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> KernelInitiator:
        for module in ("sd_mod", "iscsi_tcp"):
            subprocess.run(["modprobe", module], check=True)
        for folder in (_CONFIGURATION, Path("/run/lock"), _PROGRAM.parent):
            folder.mkdir(parents=True, exist_ok=True)
        variable, program = f"LD_LIBRARY_PATH={self._libraries()}", shlex.quote(str(self._root / "sbin/iscsiadm"))
        _PROGRAM.write_text(f'#!/bin/sh\nexec env {shlex.quote(variable)} {program} "$@"\n')
        _PROGRAM.chmod(0o755)
        (_CONFIGURATION / "initiatorname.iscsi").write_text(f"InitiatorName={NAME}\n")
        (_CONFIGURATION / "iscsid.conf").write_text("node.startup = manual\n")
        # When it ends it ends its whole process group.
        self._daemon = subprocess.Popen(
            [str(self._root / "sbin/iscsid"), "-f"], start_new_session=True,
            env={**os.environ, "LD_LIBRARY_PATH": self._libraries()},
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if list(Path("/sys/class/iscsi_session").glob("session*")):
            self._iscsiadm("-m", "node", "--logoutall=all")
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait()
        _PROGRAM.unlink()

    def log_in(
        self, target: str, portal: str, user: str = "", password: str = "", shown: tuple[str, str] = ("", "")
    ) -> Path:
        """The device of the one disk of a target, which is reached by that account of CHAP.

        :param shown: the account by which the target has to show who it is, and its secret

        :raise LabError: it does not come
        """
        node = ("-m", "node", "-T", target, "-p", portal)
        self._iscsiadm(*node, "-o", "new")
        account = {"authmethod": "CHAP", "username": user, "password": password} if user else {}
        account |= {"username_in": shown[0], "password_in": shown[1]} if shown[0] else {}
        for name, value in account.items():
            self._iscsiadm(*node, "-o", "update", "-n", f"node.session.auth.{name}", "-v", value)
        self._iscsiadm(*node, "--login")
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            for session in Path("/sys/class/iscsi_session").glob("session*"):
                for found in session.glob("device/target*/*/block/sd*"):
                    if (session / "targetname").read_text().strip() == target and Path("/dev", found.name).exists():
                        return Path("/dev", found.name)
            time.sleep(_POLL_SECONDS)
        raise LabError(f"no disk of {target} has come")

    def log_out(self, target: str, portal: str) -> None:
        """Let it go."""
        self._iscsiadm("-m", "node", "-T", target, "-p", portal, "--logout")

    def _iscsiadm(self, *words: str) -> None:
        argv = [str(_PROGRAM), *words]
        deadline = time.monotonic() + _SECONDS
        while True:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode == 0:
                return
            if self._daemon is None or self._daemon.poll() is not None:
                raise LabError("iscsid has ended")
            if "iscsid is not running" not in done.stderr or time.monotonic() > deadline:
                raise LabError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
            time.sleep(_POLL_SECONDS)

    def _libraries(self) -> str:
        return ":".join(str(self._root / folder) for folder in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))
