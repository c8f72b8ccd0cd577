"""The libvirt driver fulfils the contract of its role, on real domains."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import disk_records, find_qemu
from tests.lab import serial as console
from tests.lab.domain import LabDomain
from tests.lab.libvirtd import Libvirtd, userfaultfd_for_all
from vmsnap.model import Disk, Duplicate
from vmsnap.roles import DriverContext, Hypervisor
from vmsnap.testing.hypervisor import HypervisorContract
from vmsnap.testing.rigs import HypervisorRig, Packets
from vmsnap_drivers.hypervisors.libvirt import LibvirtHypervisor
from vmsnap_drivers.qemu.libvirt.process import find_qemu as find_process

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]


class Domains:
    """A libvirtd and two guests, started again when a scenario has ended one."""

    def __init__(self, place: Path, libvirtd: Libvirtd) -> None:
        self.place, self.libvirtd = place, libvirtd
        self._machines: dict[str, LabDomain] = {}
        self._started = 0

    def running(self, name: str) -> LabDomain:
        machine = self._machines.get(name)
        if machine is not None and not machine.ended() and not machine.faults():
            machine.domain.resume() if machine.oracle.status() == "paused" else None
            return machine
        if machine is not None:
            machine.kill()
            self.await_end(name)
        self._started += 1
        self._machines[name] = machine = LabDomain(
            self.place / f"guest{self._started}", find_qemu("7.2"), self.libvirtd, name=name, memory_mib=128
        )
        machine.undefine()
        machine.start()
        machine.wait_for_check(1)
        return machine

    def await_end(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while name in self.libvirtd.virsh("list", "--name").split():
            assert time.monotonic() < deadline, f"libvirt has not noticed the end of {name}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def domains() -> Iterator[Domains]:
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    place.chmod(0o755)
    with userfaultfd_for_all(), Libvirtd(place / "lv") as libvirtd:
        yield Domains(place, libvirtd)
    shutil.rmtree(place)


class LibvirtRig(HypervisorRig):
    """Two real guests; the oracle reads their second, raw disk, and what they say on their consoles."""

    vm, foreign_vm = "vm001", "vm900"
    watch_seconds = 1.0
    patience_seconds = 60.0
    examples = 1

    def __init__(self, domains: Domains, folder: Path) -> None:
        self.domains = domains
        self.options = {"uri": domains.libvirtd.uri}
        self.scratch = folder / "scratch"
        self.context = DriverContext(folder / "state", folder / "memory")
        for made in (self.scratch, self.context.state_dir, self.context.memory_dir):
            made.mkdir(mode=0o755)
        self.machines = {name: domains.running(name) for name in (self.vm, self.foreign_vm)}
        self.drivers: list[Hypervisor] = []
        self._looked: dict[str, int] = {}

    def driver(self, vm: str, options: Mapping[str, str] | None = None) -> Hypervisor:
        made = LibvirtHypervisor(vm, self.context, {**self.options, **(options or {})})
        self.drivers.append(made)
        return made

    def _disk(self, vm: str) -> Path:
        text = self.domains.libvirtd.virsh("domblklist", vm)
        return next(Path(line.split()[1]) for line in text.splitlines() if line.split()[:1] == ["vdb"])

    def _serial(self, vm: str) -> Path:
        loaded = self.context.state_dir / "libvirt" / "run" / vm / "serial.log"
        return loaded if loaded.exists() else self.machines[vm].serial_log

    def progress(self, vm: str) -> int:
        """The newest record on the raw disk, which the guest writes last; while that is frozen, what the guest says."""
        return self._said(vm) if vm == self.vm and self._overlays() else self._written(vm)

    def _written(self, vm: str) -> int:
        image = self._disk(vm)
        for _ in range(20):
            with contextlib.suppress(ValueError):  # it is being written
                return disk_records.newest_record(image, 1)
        return disk_records.newest_record(image, 1)

    def _said(self, vm: str) -> int:
        return max(console.counts(self._serial(vm).read_text(errors="replace")), default=0)

    def _overlays(self) -> list[Path]:
        return list(self.machines[self.vm].folder.glob("*.frozen.qcow2*"))

    def image_progress(self, duplicate: Duplicate) -> int | None:
        return None

    def verdict(self, vm: str) -> str:
        log = self._serial(vm)
        checks = len(console.checks(log.read_text(errors="replace")))
        deadline = time.monotonic() + self.patience_seconds
        while time.monotonic() < deadline:
            text = log.read_text(errors="replace")
            if found := console.faults(text):
                return str(found)
            if len(console.checks(text)) > checks:
                return ""
            time.sleep(0.02)
        return "the guest did not check itself in time"

    def undrained(self, vm: str) -> str:
        said, written = self._said(vm), self._written(vm)
        return "" if written >= said else f"the guest wrote {said}, its disk has {written}"

    def clean(self, disks: Sequence[Disk]) -> bool:
        first = disks[0]
        raw = self.scratch / "clean.raw"
        subprocess.run(
            ["qemu-img", "convert", "-U", "-f", first.format, "-O", "raw", first.address, str(raw)], check=True
        )
        return disk_records.flushed_count(raw) is not None

    def kill(self, vm: str) -> None:
        uuid = self.domains.libvirtd.virsh("domuuid", vm).strip()
        os.kill(find_process(uuid), signal.SIGKILL)
        self.domains.await_end(vm)

    def resume_past_driver(self, vm: str) -> None:
        self.domains.libvirtd.virsh("qemu-monitor-command", vm, '{"execute":"cont"}')

    def ignore_shutdown(self, vm: str) -> None:
        raise AssertionError("the lab's guest is deaf from its start or never")

    def packets(self, vm: str) -> Packets | None:
        return None

    def traces(self) -> frozenset[str]:
        found = {str(path) for path in self.context.memory_dir.rglob("*")}
        found |= {str(path) for path in (self.context.state_dir / "libvirt").glob("captures/*")}
        found |= {str(path) for path in (self.context.state_dir / "libvirt").glob("run/*")}
        found |= {str(path) for path in (self.context.state_dir / "libvirt").glob("freezes*")}
        found |= set(map(str, self._overlays()))
        found |= {f"process {pid}" for pid in self.domains.libvirtd.qemus()}
        found |= set(self.domains.libvirtd.virsh("list", "--all").splitlines())
        machine = self.machines[self.vm]
        if not machine.ended():
            ask = machine.oracle.execute
            found |= {str(ask(query)) for query in ("query-migrate-parameters", "query-migrate-capabilities")}
            found |= {node["node-name"] for node in ask("query-named-block-nodes")}
        return frozenset(found)

    def end(self) -> None:
        """Nothing of the scenario is left for the next one."""
        for driver in self.drivers:
            if driver.vm == self.vm and not self.machines[self.vm].ended():
                driver.abandon()
                driver.resume()
            driver.close()
        for name in self.domains.libvirtd.virsh("list", "--name").split():
            if name not in self.machines:
                self.domains.libvirtd.virsh("destroy", name)


def only(*numbers: int) -> Callable[[type[HypervisorContract]], type[HypervisorContract]]:
    """Keep the scenarios of these numbers: each of the others takes its time, too."""

    def choose(suite: type[HypervisorContract]) -> type[HypervisorContract]:
        for name in dir(suite):
            if name.startswith("test_") and not (EVERYTHING or int(name[5:7]) in numbers):
                setattr(suite, name, None)
        return suite

    return choose


EVERYTHING = bool(os.environ.get("VMSNAP_WHOLE_CONTRACT"))
"""With VMSNAP_WHOLE_CONTRACT=1 all scenarios are carried out; `docs/libvirt.md` says which ones cannot be."""


@only(1, 3, 4, 12, 13, 16, 30, 31, 40, 45, 63)
class TestLibvirtHypervisor(HypervisorContract):
    @pytest.fixture
    def rig(self, domains: Domains) -> Iterator[LibvirtRig]:  # type: ignore[override]
        folder = Path(tempfile.mkdtemp(prefix="rig-", dir=domains.place))
        folder.chmod(0o755)
        rig = LibvirtRig(domains, folder)
        yield rig
        rig.end()
        shutil.rmtree(folder)
