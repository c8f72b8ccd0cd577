"""`LibvirtHypervisor`: the role, each step handed to the module that knows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk, Finding, Moment, Nic, OwnedResource, VmDescription, VmState
from vmsnap.roles import DriverContext, LoadedVm, LoadRequest, Option
from vmsnap_drivers.hypervisors.libvirt import describe, fence, launch, run
from vmsnap_drivers.hypervisors.libvirt.checks import check_disks, cut_links, logs_of
from vmsnap_drivers.hypervisors.libvirt.domain import reached
from vmsnap_drivers.qemu import doctor, life, own_disks, process
from vmsnap_drivers.qemu.capture import duplicates, learned
from vmsnap_drivers.qemu.capture.hypervisor import MonitoredHypervisor
from vmsnap_drivers.qemu.capture.revive import make_run
from vmsnap_drivers.qemu.capture.turn import kept_free
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress
from vmsnap_drivers.qemu.libvirt.calls import Unreachable
from vmsnap_drivers.qemu.libvirt.process import monitor_socket
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import start_time
from vmsnap_drivers.qemu.status import vm_state


class LibvirtHypervisor(MonitoredHypervisor):
    """A domain of a libvirt on this host (9.0 tried, with QEMU 7.2)."""

    name = "libvirt"
    options = (
        Option("uri", "where libvirt is", "qemu:///system"),
        Option("domain", "the domain's name or UUID (default: the VM's name)"),
        Option("capture", "how to capture memory", "auto", ("auto", "cow", "precopy")),
    )

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        super().__init__(vm, context, options)
        self._uri = options.get("uri", "qemu:///system")
        self._domain = options.get("domain") or vm
        self._folder = run.run_folder(self._state_folder, vm)

    # -- asking

    def describe(self) -> VmDescription:
        return self._described_by(self.monitor)

    def state(self) -> VmState:
        try:
            return super().state()
        except Unreachable:
            self.close()
            with self._past_libvirt() as monitor:
                return VmState.ABSENT if monitor is None else vm_state(monitor)

    def list_vms(self) -> Sequence[str]:
        with reached(self._uri) as domains:
            return sorted(domain.name for domain in domains.all())

    def doctor(self) -> Sequence[Finding]:
        findings = list(doctor.look_at_host(self.context))
        known = learned.factors(self._state_folder, self.vm)
        return findings + list(doctor.look_at_vm(self.vm, self._connect, self._described_by, self._wanted, known))

    # -- capturing

    def resume(self) -> Moment:
        """See the role. Where libvirtd is gone, its QEMU is told directly: it serves somebody else then."""
        try:
            return super().resume()
        except Unreachable:
            self.close()
            with self._past_libvirt() as monitor:
                if monitor is None:
                    raise
                with kept_free(self._record, giving_up=True):
                    return make_run(monitor)

    # -- bringing back

    def duplicate_options(self) -> Mapping[str, str]:
        return {"uri": self._uri}

    def load(self, request: LoadRequest) -> LoadedVm:
        self.close()
        ours = [self.context.state_dir, *filter(None, (self.context.duplicates_dir,))]
        launch.load(self.vm, self._uri, self._domain, self._folder, request, ours)
        return LoadedVm(self.vm, {"uri": self._uri, "domain": self._domain})

    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        own_disks.check(self.vm, self.monitor, disks, self._folder, process.read_all(self.context.state_dir))
        with reached(self._uri) as domains:
            check_disks(domains, domains.find(self._domain))
        return self.describe().disks

    def cut_network(self) -> tuple[Nic, ...]:
        with reached(self._uri) as domains:
            cut_links(domains.find(self._domain))
        return super().cut_network()

    def fence(self, *, kill: bool = False) -> str:
        self.close()
        known = process.read(self._state_folder, self.vm)
        return fence.fence(self.vm, self._uri, self._domain, known, kill=kill)

    def await_life(self, seconds: float) -> str:
        with reached(self._uri) as domains:
            logs = logs_of(domains.find(self._domain).tree())
        return life.await_life(self.vm, self.monitor, logs, None, seconds)

    def destroy(self) -> None:
        mark = run.read_mark(self._folder)
        if mark is None:
            if self.state() is not VmState.ABSENT:
                raise HypervisorError(f"VM {self.vm!r} was not started by vmsnap and is not ended by it")
            return
        self.close()
        launch.destroy(self._folder, mark)

    def list_owned(self) -> Sequence[OwnedResource]:
        loaded = [OwnedResource("vm", mark.vm, mark.vm, self.name) for mark in run.all_marks(self._state_folder)]
        return [*duplicates.list_owned(self.name, self.context), *loaded]

    # -- within

    def _connect(self) -> Monitor:
        with reached(self._uri) as domains:
            address = LibvirtAddress(self._uri, domains.find(self._domain).uuid)
        return Monitor.borrow(address.text())

    def _described_by(self, monitor: Monitor) -> VmDescription:
        with reached(self._uri) as domains:
            return describe.describe(self.vm, domains.find(self._domain), monitor)

    @contextmanager
    def _past_libvirt(self) -> Iterator[Monitor | None]:
        """The monitor of the QEMU that was captured last, without libvirtd, which must have gone and may come again: so
        for moments only. None where that QEMU has ended, or is not known.

        :raises Busy: libvirtd has the monitor, and does not answer us
        """
        known = process.read(self._state_folder, self.vm)
        socket: Path | None = None
        if known is not None and start_time(known.pid) == known.pid_started:
            socket = monitor_socket(known.pid)
        if socket is None:
            yield None
            return
        with Monitor.borrow(socket) as monitor:
            yield monitor
