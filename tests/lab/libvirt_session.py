"""libvirtd of a user who is not root (``qemu:///session``), its folders below one of the test's own. Needs root, to
become that user.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import libvirt

from .libvirtd import USER

_START_SECONDS = 60.0
_LOOK_EACH_SECONDS = 0.02
_QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
"""
"""Without virtlogd, which the daemon of a user would start for itself."""
_READS_ANY = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""The tests' own Python and sources may lie where no other user gets; they are read all the same, nothing else."""


class SessionLibvirtd:
    """Use with ``with``: afterwards its domains and it are gone."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started; `folder` must be open to the user, and have a short name."""
        self.folder = folder
        self.uri = f"qemu:///session?socket={folder}/run/libvirt/libvirt-sock"
        self.environment: Mapping[str, str] = {
            "HOME": str(folder),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_STATE_HOME": str(folder / "state"),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SessionLibvirtd:
        for path in (self.folder, self.folder / "run", self.folder / "config", self.folder / "config" / "libvirt"):
            path.mkdir()
            os.chown(path, *_ids())
        (self.folder / "config" / "libvirt" / "qemu.conf").write_text(_QEMU_CONF)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*as_user(), "/usr/sbin/libvirtd"], env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                libvirt.open(self.uri).close()
            except libvirt.libvirtError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    said = (self.folder / "log").read_text(errors="replace")
                    self._end()
                    raise AssertionError(f"libvirtd does not come up: {said}") from None
                time.sleep(_LOOK_EACH_SECONDS)
            else:
                return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection = libvirt.open(self.uri)
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            domain.destroy()
        connection.close()
        self._end()

    def run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program as the user, to its end."""
        return subprocess.run(
            [*as_user(_READS_ANY), *argv], env={**self.environment, **environment}, cwd=self.folder,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_START_SECONDS)
            self._process = None


def as_user(more: Sequence[str] = ()) -> list[str]:
    """The beginning of a command that a user who is not root is to run."""
    user, group = _ids()
    return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *more]


def _ids() -> tuple[int, int]:
    import pwd

    entry = pwd.getpwnam(USER)
    return entry.pw_uid, entry.pw_gid
