"""The lab's guest as a domain of libvirt's: the same guest, whose QEMU libvirt starts and talks to."""

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import libvirt
import libvirt_qemu

from .bare_disks import write_emulator
from .initramfs import guest_image
from .libvirtd import USER, Libvirtd
from .machine import DEFAULT_DISKS, MIB, PATIENCE_SECONDS, Disk, LabError, LabMachine
from .qemus import QemuBuild

CHAP = "chap"
"""The usage of libvirt's secret of whoever has accounts on LUNs."""
_POLL_SECONDS = 0.02
_NO_DOMAIN = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)


class DomainOracle:
    """Asks QEMU through a connection to libvirt of the lab's own, with the interface of `Oracle` as far as it goes."""

    def __init__(self, uri: str, name: str) -> None:
        self._connection = libvirt.open(uri)
        self._domain = self._connection.lookupByName(name)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its result."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": command, "arguments": named})
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(self._domain, text, 0))
        if "error" in answer:
            raise LabError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def status(self) -> str:
        """``running``, ``paused``, …"""
        return str(self.execute("query-status")["status"])

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class LabDomain(LabMachine):
    """A guest that libvirt runs, persistent under `name`. What `LabMachine` says of its folder holds, but for the
    monitor sockets.
    """

    def __init__(
        self,
        folder: Path,
        qemu: QemuBuild,
        libvirtd: Libvirtd,
        *,
        name: str = "vm001",
        memory_mib: int = 256,
        disks: Sequence[Disk] = DEFAULT_DISKS,
        settings: Mapping[str, int] | None = None,
        interface: str = "<interface type='user'>{}</interface>",
        more_devices: str = "",
        more_os: str = "",
        own_mib: int = 0,
    ) -> None:
        """Describe it; nothing is started.

        :param own_mib: so much of its memory its kernel uses, where it is not to use all.
        :param more_os: elements of ``<os>``, such as those of a firmware.
        :param interface: the NIC's element; its address and model are put where the braces are.
        """
        super().__init__(folder, qemu, name=name, memory_mib=memory_mib, disks=disks, settings=settings)
        self.libvirtd = libvirtd
        self._interface = interface.format("<mac address='52:54:00:12:34:56'/><model type='virtio'/>")
        self._more_devices = more_devices + (self._channel() if self.settings.get("agent") else "")
        self._more_os = more_os
        self._own_mib = own_mib
        self._pid = 0

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._pid

    @property
    def domain(self) -> Any:
        """libvirt's object, over a new connection."""
        return libvirt.open(self.libvirtd.uri).lookupByName(self.name)

    @property
    def oracle(self) -> Any:
        """A connection of the lab's own; a new one each time, as libvirtd may have been started again."""
        return DomainOracle(self.libvirtd.uri, self.name)

    def definition(self) -> str:
        """The domain's XML."""
        options = [f"vmsnap.{name}={value}" for name, value in self.settings.items()]
        words = " ".join(["console=ttyS0", "quiet", "panic=-1", "tsc=reliable", "no_timer_check", *options])
        words += f" mem={self._own_mib}M" if self._own_mib else ""
        disks = "".join(self._disk(index, disk) for index, disk in enumerate(self.disks))
        return f"""\
<domain type='qemu'>
  <name>{self.name}</name><uuid>{self.uuid}</uuid>
  <memory unit='MiB'>{self.memory_mib}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='{self.machine_type}'>hvm</type>{self._more_os}
    <kernel>{self.folder}/vmlinuz</kernel><initrd>{self.folder}/initramfs</initrd><cmdline>{escape(words)}</cmdline></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{self._emulator()}</emulator>{disks}{self._interface}
    <serial type='unix'><source mode='bind' path='{self.serial_socket}'/>
      <log file='{self.serial_log}' append='on'/></serial>
    <memballoon model='none'/>{self._more_devices}
  </devices>
</domain>"""

    def _emulator(self) -> Path:
        bare = any(disk.bare for disk in self.disks)
        return write_emulator(self.folder, self.qemu.wrapper) if bare else self.qemu.wrapper

    def _disk(self, index: int, disk: Disk) -> str:
        target = f"<target dev='vd{'abcdef'[index]}' bus='virtio'/>"
        driver = f"<driver name='qemu' type='{disk.format}'/>"
        if disk.is_lun:
            portal, _, name = disk.address.removeprefix("iscsi://").partition("/")
            host, _, port = portal.rpartition(":")
            account = f"<auth username='{disk.account}'><secret type='iscsi' usage='{CHAP}'/></auth>"
            initiator = f"<initiator><iqn name='{disk.initiator}'/></initiator>"
            inner = f"<host name='{host}' port='{port}'/>{initiator if disk.initiator else ''}"
            inner += account if disk.account else ""
            source = f"<source protocol='iscsi' name='{name}'>{inner}</source>"
            return f"<disk type='network' device='disk'>{driver}{source}{target}</disk>"
        return f"<disk type='file' device='disk'>{driver}<source file='{self.disk_path(index)}'/>{target}</disk>"

    def _channel(self) -> str:
        """That of the guest's agent."""
        return (
            f"<channel type='unix'><source mode='bind' path='{self.folder}/agent.sock'/>"
            "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        )

    def start(self, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Make disks that are missing, define the domain and start it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        image = guest_image(agent=bool(self.settings.get("agent")))
        for source, name in ((image.kernel, "vmlinuz"), (image.initramfs, "initramfs")):
            # libvirt gives them to QEMU's user.
            shutil.copyfile(source, self.folder / name)
        for index, disk in enumerate(self.disks):
            if disk.is_lun:
                continue
            if not self.disk_path(index).exists():
                self.qemu.create_image(self.disk_path(index), disk.format, disk.size_bytes)
            shutil.chown(self.disk_path(index), USER, USER)
        connection = libvirt.open(self.libvirtd.uri)
        try:
            connection.defineXML(self.definition()).create()
        finally:
            connection.close()
        self.note_process()

    def note_process(self) -> None:
        """Look which process it is, when libvirt has started it."""
        (self._pid,) = [
            int(process.name)
            for process in Path("/proc").glob("[0-9]*")
            if self.uuid.encode() in _words(process) and b"-S" in _words(process)
        ]

    def powerdown(self, timeout_seconds: float = PATIENCE_SECONDS) -> int:
        """Press the power button; see `LabMachine.powerdown`."""
        self.domain.shutdown()
        return self._flushed_at_its_end(timeout_seconds)

    def ended(self) -> bool:
        """Whether its process is gone."""
        return not Path(f"/proc/{self._pid}/cmdline").exists() or not _words(Path(f"/proc/{self._pid}"))[0]

    def kill(self) -> None:
        """End QEMU now, as a power failure would, and wait until it is gone. Idempotent."""
        if not self._pid or self.ended():
            return
        os.kill(self._pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not self.ended():
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} does not end")
            time.sleep(_POLL_SECONDS)

    def ask_agent(self, command: str) -> Any:
        """What the guest's agent returns for a command without arguments."""
        text = libvirt_qemu.qemuAgentCommand(self.domain, json.dumps({"execute": command}), 20, 0)
        return json.loads(text)["return"]

    def undefine(self) -> None:
        """Let libvirt forget it."""
        try:
            self.domain.undefine()
        except libvirt.libvirtError as e:
            if e.get_error_code() not in _NO_DOMAIN:
                raise


def _words(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


__all__ = ["CHAP", "MIB", "DomainOracle", "LabDomain"]
