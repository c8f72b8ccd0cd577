"""Linux' own initiator, by open-iscsi, in a guest whose kernel has it. Needs root and ``install.sh``."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import TracebackType

from .machine import LabError
from .qemus import unpacked

NAME = "iqn.1993-08.org.debian:01:lab"
"""As whom it comes."""
_CONFIGURATION = Path("/etc/iscsi")
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
        for folder in (_CONFIGURATION, Path("/run/lock")):
            folder.mkdir(parents=True, exist_ok=True)
        (_CONFIGURATION / "initiatorname.iscsi").write_text(f"InitiatorName={NAME}\n")
        (_CONFIGURATION / "iscsid.conf").write_text("node.startup = manual\n")
        # When it ends it ends its whole process group.
        self._daemon = subprocess.Popen(
            [str(self._root / "sbin/iscsid"), "-f"], env=self._environment(), start_new_session=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if list(Path("/sys/class/iscsi_session").glob("session*")):
            self._iscsiadm("-m", "node", "--logoutall=all")
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait()

    def log_in(self, target: str, portal: str) -> Path:
        """The device of the one disk of a target.

        :raise LabError: it does not come
        """
        self._iscsiadm("-m", "node", "-o", "new", "-T", target, "-p", portal)
        self._iscsiadm("-m", "node", "-T", target, "-p", portal, "--login")
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
        argv = [str(self._root / "sbin/iscsiadm"), *words]
        deadline = time.monotonic() + _SECONDS
        while True:
            done = subprocess.run(argv, env=self._environment(), capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode == 0:
                return
            if self._daemon is None or self._daemon.poll() is not None:
                raise LabError("iscsid has ended")
            if "iscsid is not running" not in done.stderr or time.monotonic() > deadline:
                raise LabError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
            time.sleep(_POLL_SECONDS)

    def _environment(self) -> dict[str, str]:
        libraries = [str(self._root / folder) for folder in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)}
