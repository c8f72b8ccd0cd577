"""A running guest: starts QEMU on it, follows what it says, asks QEMU about it behind the product's back."""

import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import serial
from .initramfs import guest_image
from .loaded_ram import loaded_ram_arguments
from .qemus import QemuBuild
from .qmp import Oracle
from .started import Started

MIB = 1024 * 1024
_LONGEST_SOCKET_PATH = 107
_OWN_MEMORY_MIB = 256
_POLL_SECONDS = 0.02
PATIENCE_SECONDS = 180.0
"""For a slow and busy machine; nothing that a guest does takes so long on an idle one."""
_ODD_BYTES = 8192


class LabError(Exception):
    """The guest or its QEMU did not do what was waited for; the message has its last words."""


@dataclass(frozen=True)
class Disk:
    """An empty virtual disk to give to a guest."""

    format: str
    """``qcow2`` or ``raw``."""
    size_bytes: int = 256 * MIB
    address: str = ""
    """Where it lies: on a LUN, ``iscsi://portal/iqn/lun``, reached by QEMU's own initiator, or in an image file or on a
    device that is there already, by its absolute path; empty for a file that the machine makes.
    """
    account: str = ""
    """The CHAP account there, whose secret is QEMU's object ``chap``, of a domain libvirt's secret of that usage;
    empty where none is asked for.
    """

    initiator: str = ""
    """Who a domain says that it is there; empty for what QEMU says of itself, which has the machine's UUID."""

    bare: bool = False
    """Raw, and the guest's device stands on the node of the file itself, as under newer libvirts."""

    @property
    def is_lun(self) -> bool:
        """Whether it lies on a LUN."""
        return self.address.startswith("iscsi://")


DEFAULT_DISKS = (Disk("qcow2"), Disk("raw"))
WITH_BARE_DISK = (Disk("qcow2"), Disk("raw", bare=True))


class LabMachine(Started):
    """A guest in a folder of its own. Use with ``with``, or call `start` and, whatever happens, `kill`.

    In the folder: ``qmp.sock`` (the monitor for the product), ``oracle.sock`` (the monitor for the
    lab), ``serial.sock`` (the console, for one listener), ``serial.log`` (all that the console said),
    ``disk0.qcow2``, ``disk1.raw``, … and ``qemu.log``. Block node and device of disk N both have the
    id ``diskN``.
    """

    def __init__(
        self,
        folder: Path,
        qemu: QemuBuild,
        *,
        name: str = "vm001",
        memory_mib: int = 512,
        loaded_mib: int = 0,
        round_memory: bool = False,
        disks: Sequence[Disk] = DEFAULT_DISKS,
        machine_type: str = "pc",
        settings: Mapping[str, int] | None = None,
        network: str = "user,restrict=on",
        extra_arguments: Sequence[str] = (),
    ) -> None:
        """Describe a machine; nothing is started.

        :param memory_mib: RAM in MiB, all of it together.
        :param loaded_mib: so much of it, a multiple of 128, is filled when QEMU starts and kept from
            the guest's kernel.
        :param round_memory: see `memory_bytes`.
        :param machine_type: ``pc`` or ``q35``.
        :param settings: the workload's settings, see ``guest/workload.c``.
        :param network: what the NIC is connected to, a value of ``-netdev`` without its id.
        :param extra_arguments: more QEMU arguments, at the end of its command line.
        :raise ValueError: when `folder` is too deep for the names of UNIX sockets.
        """
        self.folder = folder.absolute()
        self.qmp_socket = self.folder / "qmp.sock"
        self.oracle_socket = self.folder / "oracle.sock"
        self.serial_socket = self.folder / "serial.sock"
        self.serial_log = self.folder / "serial.log"
        self.qemu = qemu
        self.name = name
        self.memory_mib = memory_mib
        self.loaded_mib = loaded_mib
        self.round_memory = round_memory
        self.disks = tuple(disks)
        self.machine_type = machine_type
        self.settings = dict(settings or {})
        self.network = network
        self.extra_arguments = tuple(extra_arguments)
        self.uuid = str(uuid.uuid4())
        self._process: subprocess.Popen[bytes] | None = None
        self._oracle: Oracle | None = None
        if len(str(self.oracle_socket)) > _LONGEST_SOCKET_PATH:
            raise ValueError(f"{self.folder}: too deep for the names of UNIX sockets")

    def disk_path(self, index: int) -> Path:
        """The image of disk `index`, where that is a file."""
        disk = self.disks[index]
        return Path(disk.address) if disk.address else self.folder / f"disk{index}.{disk.format}"

    @property
    def memory_bytes(self) -> int:
        """The size of the RAM: `memory_mib`, and for a QEMU that would lose pages of it 8 KiB more.

        With ``round_memory`` it is always `memory_mib`: for measuring pauses, not for restoring from
        a pre-copy, on such a QEMU.
        """
        odd_bytes = _ODD_BYTES if self.qemu.loses_dirty_pages and not self.round_memory else 0
        return self.memory_mib * MIB + odd_bytes

    @property
    def pid(self) -> int:
        """QEMU's process id.

        :raise LabError: when it was not started.
        """
        if self._process is None:
            raise LabError(f"{self.name} was not started")
        return self._process.pid

    @property
    def oracle(self) -> Oracle:
        """The lab's own monitor connection, opened at first use.

        :raise OSError: when QEMU has ended.
        """
        if self._oracle is None:
            self._oracle = Oracle(self.oracle_socket)
        return self._oracle

    def command(self) -> list[str]:
        """The argv of this machine's QEMU."""
        image = guest_image(agent=bool(self.settings.get("agent")))
        options = [f"vmsnap.{name}={value}" for name, value in self.settings.items()]
        # Linux counts ticks against its own clock when it boots, and panics where a busy host gave none: "IO-APIC +
        # timer doesn't work". It is told not to, as kvm guests are.
        kernel_arguments = ["console=ttyS0", "quiet", "panic=-1", "tsc=reliable", "no_timer_check", *options]
        loaded: list[str] = []
        if self.loaded_mib:
            kernel_arguments.append(f"mem={_OWN_MEMORY_MIB}M")
            loaded = loaded_ram_arguments(
                self.loaded_mib, self.memory_mib, above_mib=_OWN_MEMORY_MIB, machine_type=self.machine_type
            )
        # fmt: off
        return self.qemu.command(
            "-name", self.name, "-uuid", self.uuid, "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-machine", f"{self.machine_type},accel=tcg",
            "-m", f"{self.memory_bytes // 1024}K", "-smp", "1",
            "-kernel", str(image.kernel), "-initrd", str(image.initramfs),
            "-append", " ".join(kernel_arguments),
            "-chardev", f"socket,id=serial0,path={self.serial_socket},server=on,wait=off,"
                        f"logfile={self.serial_log},logappend=on",
            "-serial", "chardev:serial0",
            "-qmp", f"unix:{self.qmp_socket},server=on,wait=off",
            "-qmp", f"unix:{self.oracle_socket},server=on,wait=off",
            *self._disk_arguments(),
            "-netdev", f"{self.network},id=net0", "-device", "virtio-net-pci,netdev=net0,id=nic0,romfile=",
            *loaded, *self.extra_arguments,
        )
        # fmt: on

    def _disk_arguments(self) -> list[str]:
        arguments = []
        for index, disk in enumerate(self.disks):
            name = f"disk{index}"
            where = _lun_options(disk) if disk.is_lun else _file_options(self.disk_path(index))
            if disk.bare:
                arguments += ["-blockdev", f"node-name={name},{where}"]
            else:
                arguments += ["-blockdev", f"node-name={name}-file,{where}"]
                arguments += ["-blockdev", f"driver={disk.format},node-name={name},file={name}-file"]
            arguments += ["-device", f"virtio-blk-pci,drive={name},id={name}"]
        return arguments

    def start(self, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Create the disks that are missing, start QEMU and wait for its monitor, not for the guest.

        :raise LabError: when QEMU ends at once or its monitor does not come up in time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, disk in enumerate(self.disks):
            if not disk.is_lun and not self.disk_path(index).exists():
                self.qemu.create_image(self.disk_path(index), disk.format, disk.size_bytes)
        with (self.folder / "qemu.log").open("ab") as log:
            # A session of its own, so that Ctrl-C on a test or demo does not reach the guest.
            self._process = subprocess.Popen(
                self.command(), env=self.qemu.start_environment(), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._wait("its monitor", self._monitor_answers, timeout_seconds)
        except BaseException:
            self.kill()
            raise

    def _monitor_answers(self) -> bool:
        try:
            return self.oracle.status() != ""
        except OSError:
            return False

    def serial_text(self) -> str:
        """All that the guest printed so far."""
        return self.serial_log.read_text(errors="replace") if self.serial_log.exists() else ""

    def latest_count(self) -> int:
        """The last count that the guest printed, 0 before the first."""
        return max(serial.counts(self.serial_text())[-1:], default=0)

    def latest_check(self) -> int:
        """The last count at which the guest found everything in agreement, 0 before the first."""
        return max(serial.checks(self.serial_text())[-1:], default=0)

    def faults(self) -> list[str]:
        """What the guest complained about; empty while all is well."""
        return serial.faults(self.serial_text())

    def wait_for_count(self, at_least: int, timeout_seconds: float = PATIENCE_SECONDS) -> int:
        """Wait until the guest has printed a count of `at_least` and return the latest.

        :raise LabError: when it faults, ends, or does not get there in time.
        """
        return self._wait_for(f"count {at_least}", self.latest_count, at_least, timeout_seconds)

    def wait_for_check(self, at_least: int, timeout_seconds: float = PATIENCE_SECONDS) -> int:
        """Wait until the guest verified everything at a count of `at_least` and return that count.

        :raise LabError: when it faults, ends, or does not get there in time.
        """
        return self._wait_for(f"check {at_least}", self.latest_check, at_least, timeout_seconds)

    def wait_for_fault(self, timeout_seconds: float = PATIENCE_SECONDS) -> list[str]:
        """Wait until the guest complains and return what about, in whole lines: it prints a line in several pieces.

        :raise LabError: when it ends or does not complain in time.
        """

        def said() -> list[str]:
            return serial.faults(self.serial_text().rpartition("\n")[0])

        self._wait("a fault", lambda: bool(said()), timeout_seconds)
        return said()

    def powerdown(self, timeout_seconds: float = PATIENCE_SECONDS) -> int:
        """Press the power button, wait until QEMU has ended, and return the count that the guest flushed.

        :raise LabError: when it does not end in time, or ends without flushing.
        """
        self.oracle.execute("system_powerdown")
        return self._flushed_at_its_end(timeout_seconds)

    def _flushed_at_its_end(self, timeout_seconds: float) -> int:
        self._wait("the end of QEMU", self.ended, timeout_seconds)
        last = serial.flushed(self.serial_text())
        if last is None:
            raise LabError(f"{self.name} ended without flushing: {self._last_words()}")
        return last

    def ended(self) -> bool:
        """Whether QEMU is no longer running."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """End QEMU now, as a power failure would. Killing twice, or what was never started, is fine."""
        if self._oracle is not None:
            self._oracle.close()
            self._oracle = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _wait_for(self, what: str, latest: Callable[[], int], at_least: int, timeout_seconds: float) -> int:
        def reached() -> bool:
            if found := self.faults():
                raise LabError(f"{self.name}: {found}")
            return latest() >= at_least

        self._wait(what, reached, timeout_seconds)
        return latest()

    def _wait(self, what: str, condition: Callable[[], bool], timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            # What is waited for may be its end, or among its last words.
            if self.ended() and not condition():
                raise LabError(f"{self.name} ended while waiting for {what}: {self._last_words()}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: no {what} within {timeout_seconds} s: {self._last_words()}")
            time.sleep(_POLL_SECONDS)

    def _last_words(self) -> str:
        log = self.folder / "qemu.log"
        errors = log.read_text(errors="replace") if log.exists() else ""
        return f"QEMU said {errors[-1000:]!r}, the guest {self.serial_text()[-500:]!r}"


def _file_options(path: Path) -> str:
    return f"driver={'host_device' if path.is_block_device() else 'file'},filename={path}"


def _lun_options(disk: Disk) -> str:
    portal, target, lun = disk.address.removeprefix("iscsi://").split("/")
    account = f",user={disk.account},password-secret=chap" if disk.account else ""
    return f"driver=iscsi,transport=tcp,portal={portal},target={target},lun={lun}{account}"
