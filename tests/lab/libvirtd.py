"""libvirtd and virtlogd of this test alone, in a mount namespace in which their folders are the test's own.

A system libvirtd knows its folders from when it was built (/etc/libvirt, /run/libvirt, …). So it has a namespace of its
own (unshare(1)) in which folders of the test are mounted there: several can run at once, the machine's own is left
alone, and the socket is reached by its path outside (``qemu:///system?socket=…``).
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import libvirt

from .certificates import Authority
from .ports import ADDRESS, free_port
from .qemus import cache_folder

libvirt.registerErrorHandler(lambda *_: None, None)  # it prints each error besides raising it

USER = "libvirt-qemu"
"""Whom Debian's libvirt lets QEMU run as."""
_FOLDERS = {"etc": "/etc/libvirt", "lib": "/var/lib/libvirt", "run": "/run/libvirt", "cache": "/var/cache/libvirt",
            "log": "/var/log/libvirt", "swtpm": "/var/log/swtpm"}  # fmt: skip
_QEMU_MODULES = "/usr/lib/x86_64-linux-gnu/qemu"
_USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")
_START_SECONDS = 60.0
_LOOK_EACH_SECONDS = 0.02
_REAPER = Path(__file__).with_name("reaper.py")
_QEMU_CONF = f"""\
user = "{USER}"
group = "{USER}"
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
"""
_LIBVIRTD_CONF = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
_TLS_CONF = """\
listen_tls = 1
listen_addr = "{address}"
tls_port = "{port}"
auth_tls = "none"
ca_file = "{folder}/cacert.pem"
cert_file = "{folder}/servercert.pem"
key_file = "{folder}/serverkey.pem"
"""


class Libvirtd:
    """Use with ``with``: afterwards its domains, daemons and namespace are gone. Needs root."""

    def __init__(
        self,
        folder: Path,
        *,
        usb_bus: bool = False,
        host_uuid: str = "",
        authority: Authority | None = None,
        any_qemu: bool = False,
    ) -> None:
        """Nothing is started; `folder` must be open to all users, and have a short name.

        :param usb_bus: in the namespace the host has a USB bus, with nothing plugged in, as this machine has none
        :param host_uuid: it says that its host is another one, so that domains are migrated to it
        :param any_qemu: it runs the unpacked QEMU, not the installed one, whose modules are hidden in the namespace:
            the other one would load those that it lacks, and abort when it is asked for its types (``util/module.c``)
        :param authority: it listens for TLS too, as ``localhost``, and admits whom this one vouches for
        """
        self.folder = folder
        self.tls_port = free_port() if authority else 0
        self._authority = authority
        self._host_uuid = host_uuid
        self._usb_bus = usb_bus
        self._any_qemu = any_qemu
        self.socket = folder / "run" / "libvirt-sock"
        self.uri = f"qemu:///system?socket={self.socket}"
        self._holder: subprocess.Popen[bytes] | None = None
        self._reapers: list[subprocess.Popen[bytes]] = []
        self._pids: list[int] = []

    def __enter__(self) -> "Libvirtd":
        for name in _FOLDERS:
            (self.folder / name).mkdir(parents=True)
        (self.folder / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        own = f'host_uuid = "{self._host_uuid}"\n' if self._host_uuid else ""
        own += self._tls()
        (self.folder / "etc" / "libvirtd.conf").write_text(_LIBVIRTD_CONF + own)
        try:
            self._hold_namespace()
            self._run("/usr/sbin/virtlogd", "--pid-file", "/run/libvirt/virtlogd.pid")
            self._await_file(self.folder / "run" / "virtlogd-sock")
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """libvirtd's process."""
        return self._pids[-1]

    def start(self) -> None:
        """Start libvirtd and wait until it answers."""
        files = ("--config", "/etc/libvirt/libvirtd.conf", "--pid-file", "/run/libvirt/libvirtd.pid")
        self._run("/usr/sbin/libvirtd", *files, *(["--listen"] if self._authority else []))
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                libvirt.open(self.uri).close()
            except libvirt.libvirtError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_EACH_SECONDS)
            else:
                return

    def kill(self) -> None:
        """End libvirtd by kill -9. The domains run on."""
        pid = self._pids.pop()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _START_SECONDS
        while Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                raise AssertionError(f"libvirtd, process {pid}, does not end")
            time.sleep(_LOOK_EACH_SECONDS)

    def restart(self) -> None:
        """Kill it, and start it again."""
        self.kill()
        self.start()

    def keep_secret(self, usage: str, word: str) -> None:
        """Give it a secret of a LUN's accounts to keep."""
        connection = libvirt.open(self.uri)
        try:
            xml = f"<secret ephemeral='yes' private='yes'><usage type='iscsi'><target>{usage}</target></usage></secret>"
            connection.secretDefineXML(xml).setValue(word.encode())
        finally:
            connection.close()

    def virsh(self, *words: str) -> str:
        """What virsh says.

        :raise subprocess.CalledProcessError: it fails.
        """
        argv = ["virsh", "-q", "-c", self.uri, *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout

    def qemus(self) -> set[int]:
        """The processes of its domains."""
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                inside = (process / "ns" / "mnt").readlink() == self._namespace()
                if inside and (process / "exe").readlink().name.startswith("qemu-system"):
                    found.add(int(process.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        """End all; idempotent."""
        if self._holder is not None:
            for pid in self.qemus():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while self._pids:
                self.kill()
            for reaper in self._reapers:
                reaper.wait(_START_SECONDS)
            self._holder.kill()
            self._holder.wait()
        self._holder = None

    def _tls(self) -> str:
        """What its configuration has to say of that."""
        if self._authority is None:
            return ""
        folder = self.folder / "tls"
        self._authority.issue(folder, "server", "localhost")
        return _TLS_CONF.format(address=ADDRESS, port=self.tls_port, folder=folder)

    def _hold_namespace(self) -> None:
        for outside in _FOLDERS.values():
            Path(outside).mkdir(parents=True, exist_ok=True)
        ready = self.folder / "ready"
        mounts = [f"mount --bind {self.folder}/{name} {place}" for name, place in _FOLDERS.items()]
        if self._usb_bus:
            mounts += ["mount -t tmpfs none /sys/bus", "mkdir -p /sys/bus/usb/devices"]
        if self._any_qemu:
            mounts.append(f"mount -t tmpfs none {_QEMU_MODULES}")
        script = " && ".join([*mounts, f"touch {ready}", "exec sleep infinity"])
        self._holder = subprocess.Popen(["unshare", "--mount", "--propagation", "slave", "sh", "-c", script])
        self._await_file(ready)

    def _run(self, *argv: str) -> None:
        if self._holder is None:
            raise AssertionError("there is no namespace")
        words = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", sys.executable, str(_REAPER), *argv]
        with (self.folder / "daemons.log").open("ab") as log:
            reaper = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self._reapers.append(reaper)
        if reaper.stdout is None:
            raise AssertionError("the reaper has no output")
        self._pids.append(int(reaper.stdout.readline()))

    def _namespace(self) -> Path:
        if self._holder is None:
            raise AssertionError("there is no namespace")
        return Path(f"/proc/{self._holder.pid}/ns/mnt").readlink()

    def _await_file(self, path: Path) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                log = self.folder / "daemons.log"
                raise AssertionError(f"no {path}: {log.read_text() if log.exists() else ''}")
            time.sleep(_LOOK_EACH_SECONDS)


@contextlib.contextmanager
def userfaultfd_for_all() -> Iterator[None]:
    """Within, QEMUs of other users may use userfaultfd, which copy on write needs; several may ask for it at once."""
    with (cache_folder() / "userfaultfd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        before = _USERFAULTFD.read_text().strip()
        note = cache_folder() / "userfaultfd.before"
        if before != "1":
            note.write_text(before)
        _USERFAULTFD.write_text("1")
        try:
            yield
        finally:
            with contextlib.suppress(BlockingIOError):  # another one needs it still, and is the last one then
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _USERFAULTFD.write_text(note.read_text() if note.exists() else before)
