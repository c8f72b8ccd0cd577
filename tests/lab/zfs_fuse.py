"""A real zfs-fuse on this host: ZFS 0.7 of 2011 in user space, file systems alone. Needs root and /dev/fuse.

It has one socket, of a fixed name, so that one runs on a host at a time: the others wait. What it mounts is seen by the
thread alone that started it, and by what that starts.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from .machine import LabError
from .mounts import own_mounts
from .qemus import unpacked
from .started import Started

_SOCKET = Path("/var/run/zfs/zfs_socket")
_LOCK = Path("/run/lock/vmsnap-lab-zfs-fuse")
_START_SECONDS = 60.0
_COMMAND_SECONDS = 120.0
_BUSY_SECONDS = 10.0
_POOL_BYTES = 256 << 20
_POLL_SECONDS = 0.05


def programs() -> Path:
    """The folder that has ``zfs``, ``zpool`` and ``zfs-fuse``.

    :raise LookupError: when install.sh has not been run.
    """
    return unpacked("zfs-fuse", "zfs-fuse") / "bin"


class ZfsFuse(Started):
    """The daemon with one empty pool, for a ``with``, in a folder of its own. `pool` is the pool's name, and `mounted`
    where its file systems are.
    """

    def __init__(self, folder: Path, pool: str = "", mounted: Path | None = None, *, shared: bool = False) -> None:
        """Nothing is started.

        :param shared: see `own_mounts`
        """
        self.folder = folder
        self._shared = shared
        self.pool = pool or f"lab{os.getpid()}"
        self.mounted = mounted or folder / "mounted"
        # On a disk, every change would wait for it to sync.
        self._disk = Path(f"/dev/shm/vmsnap-lab-{self.pool}.img")
        self._mounts: AbstractContextManager[None] | None = None
        self._lock: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The daemon's."""
        if self._process is None:
            raise LabError("zfs-fuse was not started")
        return self._process.pid

    def start(self) -> None:
        """Wait for whoever else has one, start it, and make the pool.

        :raise LabError: when it does not come up.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _LOCK.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._mounts = own_mounts(shared=self._shared)
        self._mounts.__enter__()
        _SOCKET.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder / "zfs-fuse.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(programs() / "zfs-fuse"), "--no-daemon"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while self._ask("zpool", "list").returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise LabError(f"zfs-fuse does not come up: {(self.folder / 'zfs-fuse.log').read_text()[-2000:]}")
            time.sleep(_POLL_SECONDS)
        with self._disk.open("wb") as file:
            file.truncate(_POOL_BYTES)
        self.run("zpool", "create", "-o", "cachefile=none", "-m", str(self.mounted), self.pool, str(self._disk))

    def run(self, *argv: str) -> str:
        """Give it one of its commands, past the mechanism; again while something is busy, as the daemon learns of the
        end of a mount some time after it.

        :raise LabError: when it fails.
        """
        deadline = time.monotonic() + _BUSY_SECONDS
        while (done := self._ask(*argv)).returncode:
            if "busy" not in done.stderr or time.monotonic() > deadline:
                raise LabError(f"{argv}: {done.stdout}{done.stderr}")
            time.sleep(_POLL_SECONDS)
        return done.stdout

    def _ask(self, *argv: str) -> subprocess.CompletedProcess[str]:
        program = str(programs() / argv[0])
        return subprocess.run(
            [program, *argv[1:]], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )

    def kill(self) -> None:
        """Destroy the pool and end the daemon. Twice is fine."""
        if self._process is not None:
            if self._process.poll() is None:
                self._ask("zpool", "destroy", "-f", self.pool)
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            self._disk.unlink(missing_ok=True)
        if self._mounts is not None:
            self._mounts.__exit__(None, None, None)
            self._mounts = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
