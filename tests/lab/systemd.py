"""Debian's systemd as the first process of namespaces of its own, beside whatever this machine runs. Needs root.

It has process ids, mounts, network, IPC and control groups of its own: a hierarchy of version 2 (cgroups(7)) whose top
is a group that is made for it. Its root is this machine's, with RAM above it: programs, the checkout and its virtual
environment are there as they are here, and what it writes is gone with it. It is told that it is in a container
(systemd.io/CONTAINER_INTERFACE).
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from .machine import LabError
from .scripted import Ended, Scripted

_CHECKOUT = Path(__file__).resolve().parent.parent.parent
_START_SECONDS = 120.0
_POLL_SECONDS = 0.05
_TARGET = "vmsnap-lab.target"
_ENTER = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
# $1 an empty folder, $2 the folder that both sides see, $3 the checkout, $4 the unit to start
_FIRST = """set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
root=$1/root
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in full null random tty urandom zero; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
touch "$root/dev/console"
mount --bind /dev/null "$root/dev/console"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for number in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${number%:*}" "$root/dev/${number#*:}"; done
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir -p "$root$3" "$root/run/results"
mount --rbind "$3" "$root$3"
mount --bind "$2" "$root/run/results"
printf '[Unit]\\nRequires=basic.target\\nAfter=basic.target\\n' >"$root/etc/systemd/system/$4"
mkdir -p "$root/mnt/old"
cd "$root"
pivot_root . mnt/old
cd /
umount --lazy /mnt/old
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=vmsnap-lab /lib/systemd/systemd --unit="$4" </dev/null
"""


class SystemdMachine(Scripted):
    """One such systemd."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started."""
        super().__init__(folder)
        self._group = _cgroups() / f"vmsnap-lab-{os.getpid()}-{folder.name}"
        self._holder: subprocess.Popen[bytes] | None = None
        self._first = 0
        self._script: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it has started its basic units; some seconds.

        :raise LabError: it does not come up.
        """
        self.results.mkdir(parents=True)
        self._group.mkdir()
        above = Path(tempfile.mkdtemp(prefix="above-", dir=self.folder))
        enter = 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"'
        unshare = ["unshare", *_ENTER, "--fork", "--kill-child", "sh", "-c", _FIRST, "sh"]
        argv = ["sh", "-c", enter, "sh", str(self._group), *unshare, str(above), str(self.results), str(_CHECKOUT)]
        with (self.folder / "systemd.log").open("wb") as log:
            self._holder = subprocess.Popen(
                [*argv, _TARGET], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_up():
            if self._holder.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise LabError(f"systemd does not come up: {self.last_words()}")
            time.sleep(_POLL_SECONDS)

    def begin(self, name: str, script: str) -> None:
        """See `Scripted.begin`."""
        (self.results / name).write_text(script)
        with (self.results / f"{name}.output").open("wb") as output:
            self._script = subprocess.Popen(
                self._inside("sh", f"/run/results/{name}"), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def end(self, name: str, seconds: float) -> Ended:
        """See `Scripted.end`."""
        if self._script is None:
            raise LabError("no script was begun")
        try:
            return Ended(self._script.wait(seconds), self.output(name))
        except subprocess.TimeoutExpired as e:
            raise LabError(f"{name} does not end within {seconds:g} s: {self.output(name)}") from e

    def ended(self, name: str) -> bool:
        """See `Scripted.ended`."""
        return self._script is None or self._script.poll() is not None

    def kill(self) -> None:
        """End it now, with all that runs in its namespaces. Killing twice is fine."""
        if self._holder is not None:
            if self._first:
                os.kill(self._first, signal.SIGKILL)  # the kernel ends the rest of its namespace with it
            self._holder.kill()
            self._holder.wait()
            self._holder = None
        if self._script is not None:
            self._script.kill()
            self._script.wait()
            self._script = None
        deadline = time.monotonic() + _START_SECONDS
        while self._group.exists():
            groups = sorted((path.parent for path in self._group.rglob("cgroup.procs")), reverse=True)
            try:
                for group in [*groups, self._group]:
                    if group.exists():
                        group.rmdir()
            except OSError as e:  # its last processes are still ending
                if time.monotonic() > deadline:
                    raise LabError(f"{self._group} cannot be removed: {e}") from e
                time.sleep(_POLL_SECONDS)

    def _inside(self, *argv: str) -> list[str]:
        return ["nsenter", f"--target={self._first}", *_ENTER, "--", *argv]

    def _is_up(self) -> bool:
        if self._holder is None:
            raise LabError("systemd was not started")
        if not self._first:
            children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
            if not children:
                return False
            self._first = int(children[0])
        # Until it is systemd, and answers, this fails.
        asked = self._inside("systemctl", "is-active", _TARGET)
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == "active"


def _cgroups() -> Path:
    """Where this machine has its hierarchy of version 2.

    :raise LookupError: nowhere.
    """
    for line in Path("/proc/mounts").read_text().splitlines():
        words = line.split()
        if words[2] == "cgroup2":
            return Path(words[1])
    raise LookupError("this machine has no control groups of version 2")
