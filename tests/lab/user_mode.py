"""A guest for what the kernel of this host cannot do, without an emulated processor: Debian's user-mode Linux, a kernel
that is a process. It has device mapper, LIO, Linux' own initiator and XFS, and runs programs several times faster than
QEMU does where there is no KVM; it has no network.

Its root is the host's own, read-only, with the packages of install.sh laid over it and RAM over both, as in
`StorageGuest`. Nothing that it does reaches the host but through the folder of results.
"""

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from .machine import LabError
from .qemus import unpacked
from .scripted import ScriptedGuest

_INIT = Path(__file__).parent / "storage_guest/user-mode-init"
_CHECKOUT = Path(__file__).resolve().parent.parent.parent
_MEMORY_MIB = 1024
_BOOT_SECONDS = 180.0


class UserModeGuest(ScriptedGuest):
    """One such guest."""

    def start(self) -> None:
        """See `ScriptedGuest.start`."""
        self.results.mkdir(parents=True)
        root = unpacked("user-mode-linux", "user-mode Linux")
        (modules,) = (root / "usr/lib/uml/modules").iterdir()
        self._port, theirs = socket.socketpair()
        with theirs, (self.folder / "serial.log").open("wb") as log:
            # What the kernel does not know itself is a variable of init's.
            argv = [
                str(root / "usr/bin/linux.uml"), f"mem={_MEMORY_MIB}M", "rootfstype=hostfs", "rootflags=/", "ro",
                f"init={_INIT}", f"uml_dir={self.folder}", "umid=guest", "quiet", "panic=-1",
                "con=null", "con0=null,fd:1", f"con1=fd:{theirs.fileno()}",
                f"CHECKOUT={_CHECKOUT}", f"RESULTS={self.results}", f"MODULES={modules}",
                f"PACKAGES={unpacked('storage', 'device mapper') / 'root'}",
            ]  # fmt: skip
            self._process = subprocess.Popen(
                argv, env={**os.environ, "TMPDIR": str(self.folder)}, start_new_session=True,
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._listen(_BOOT_SECONDS, "ready")
        except (OSError, LabError) as e:
            self.kill()
            raise LabError(f"the storage guest does not come up: {e}: {self.last_words()}") from e

    def kill(self) -> None:
        """End the guest now, with the host's processes that are its. Killing twice is fine."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        super().kill()
