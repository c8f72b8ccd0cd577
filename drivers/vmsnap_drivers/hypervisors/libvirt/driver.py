"""`LibvirtHypervisor`: the role, each step handed to the module that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError, VmsnapError
from vmsnap.model import (
    CapturePlan,
    Disk,
    Duplicate,
    Finding,
    Moment,
    Nic,
    OwnedResource,
    SeenVm,
    VmDescription,
    VmState,
)
from vmsnap.roles import (
    YES_NO,
    CaptureRequest,
    DriverContext,
    LoadedVm,
    LoadRequest,
    Module,
    Option,
    seconds,
    with_defaults,
)
from vmsnap_drivers.hypervisors.libvirt import describe, fence, freezing, launch, run, snapshot_capture
from vmsnap_drivers.hypervisors.libvirt.agent import AgentPlace, place_of
from vmsnap_drivers.hypervisors.libvirt.checks import check_disks, cut_links, logs_of
from vmsnap_drivers.hypervisors.libvirt.doctor import look_at_agent, look_at_libvirt, tell_frozen
from vmsnap_drivers.hypervisors.libvirt.domain import reached
from vmsnap_drivers.hypervisors.libvirt.freezing import FrozenFileSystems
from vmsnap_drivers.hypervisors.libvirt.reach import is_within, let_through
from vmsnap_drivers.hypervisors.libvirt.remote import check_passes_descriptors
from vmsnap_drivers.hypervisors.libvirt.seeing import see_all
from vmsnap_drivers.hypervisors.libvirt.shape import Shape, check_unchanged
from vmsnap_drivers.hypervisors.libvirt.tags import tags_of
from vmsnap_drivers.qemu import doctor, freeze, life, own_disks, process
from vmsnap_drivers.qemu.capture import duplicates, learned, plan
from vmsnap_drivers.qemu.capture.hypervisor import MonitoredHypervisor
from vmsnap_drivers.qemu.capture.revive import make_run
from vmsnap_drivers.qemu.capture.session import Capture, Session
from vmsnap_drivers.qemu.capture.turn import kept_free
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress, is_libvirt_address
from vmsnap_drivers.qemu.libvirt.calls import INSTALL, Unreachable
from vmsnap_drivers.qemu.libvirt.process import monitor_socket, process_of
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import mapped_memory, user_of
from vmsnap_drivers.qemu.plain_files import PLAIN_FILES, plain_files
from vmsnap_drivers.qemu.second_monitor import SecondMonitor
from vmsnap_drivers.qemu.status import vm_state

_FREEZE_SECONDS: Final = seconds(60.0)


class LibvirtHypervisor(MonitoredHypervisor):
    """A domain of a libvirt on this host (9.0 tried, with QEMU 7.2 and 10.0)."""

    name = "libvirt"
    freezes = True
    loads_luns = True
    options = (
        Option("uri", "where libvirt is", "qemu:///system"),
        Option("domain", "the domain's name or UUID (default: the VM's name)"),
        Option("define", "whether a restored domain is persistent", "no", type=YES_NO),
        Option("capture", "how to capture memory", "auto", ("auto", "cow", "precopy")),
        Option(
            "memory",
            "whether memory is captured through the monitor, in milliseconds, or by libvirt's own snapshot",
            "monitor",
            ("monitor", "supported"),
        ),
        Option("fsfreeze", "whether the guest's agent freezes its file systems around the pause", "no", type=YES_NO),
        Option("fsfreeze_timeout", "how long freezing may take", "5", type=_FREEZE_SECONDS),
        PLAIN_FILES,
    )
    needs = (Module("libvirt", INSTALL), doctor.QEMU)

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        super().__init__(vm, context, options)
        given = with_defaults(self.options, options)
        self._uri = given["uri"]
        self._domain = options.get("domain") or vm
        self._define = YES_NO.read(given["define"])
        self._shape: Shape | None = None
        self._supported = given["memory"] == "supported"
        self._folder = run.run_folder(self._state_folder, vm)
        self._second = SecondMonitor(self._record.with_suffix(".monitor"))
        self._vouches = YES_NO.read(given[PLAIN_FILES.name])
        self._fsfreezes = YES_NO.read(given["fsfreeze"])
        self._freeze_seconds = _FREEZE_SECONDS.read(given["fsfreeze_timeout"])
        self._frozen = FrozenFileSystems(vm, self._record.with_suffix(".frozen"))
        self._agent: AgentPlace | None = None

    # -- asking

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

    def tags(self) -> Sequence[str]:
        with reached(self._uri) as domains:
            return tags_of(domains.find(self._domain).tree())

    def see_vms(self) -> Sequence[SeenVm]:
        with reached(self._uri) as domains:
            return see_all(domains)

    def doctor(self) -> Sequence[Finding]:
        findings = [*doctor.look_at_host(self.context), *look_at_libvirt(self._uri)]
        known = learned.factors(self._state_folder, self.vm)
        if self._is_there():
            findings += doctor.look_at_vm(self.vm, self._connect, self._described_by, self._wanted, known)
            if self._frozen.is_marked():
                findings.append(tell_frozen(self.vm, self._domain))
            elif self._fsfreezes:
                findings.append(look_at_agent(self.vm, lambda: self._frozen.check(self._agent_place())))
        return findings

    # -- capturing

    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        check_passes_descriptors(self.vm, self._uri)
        chosen = self._plan_snapshot(request) if self._supported else super().plan_capture(request)
        if self._fsfreezes:
            chosen = replace(chosen, lead_seconds=chosen.lead_seconds + freezing.longest_seconds(self._freeze_seconds))
        return chosen

    def pause(self) -> Moment:
        """See the role. A domain that was changed meanwhile is left running."""
        if self._capture is not None:
            self._check_unchanged()
            if self._agent is not None:
                number = self._frozen.freeze(self._agent, self.monitor.peer_pid, self._freeze_seconds)
                self._capture.details[freezing.DETAIL] = {"file_systems": number}
        return super().pause()

    def prepare(self, request: CaptureRequest, plan: CapturePlan) -> None:
        """See the role. From now on QEMU can be told to go on without libvirtd as well."""
        self._agent = None
        if self._fsfreezes and self.state() is VmState.EXECUTING:
            agent = self._agent_place()
            self._frozen.check(agent)
            self._agent = agent
        why_not = self._second.open(self.monitor)
        super().prepare(request, plan)
        if why_not:
            self._going_on().details["no_second_monitor"] = why_not

    def resume(self) -> Moment:
        """See the role. What was frozen is thawed as soon as the guest executes."""
        moment = self._resume()
        self._thaw()
        return moment

    def _resume(self) -> Moment:
        """Where no capture of this process goes on, as in a guardian, QEMU is told past libvirtd, which may be what
        hangs; and where libvirtd is gone.
        """
        if self._monitor is None and (moment := self._resume_by_second()):
            return moment
        try:
            return super().resume()
        except Unreachable:
            self.close()
            if moment := self._resume_by_second():
                return moment
            with self._past_libvirt() as monitor:
                if monitor is None:
                    raise
                with kept_free(self._record, giving_up=True):
                    return make_run(monitor)

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        # The guest goes on already, so that asking costs it nothing.
        self._check_unchanged()
        self._shape = None
        finished = super().finish_duplicate(duplicate, progress)
        self._second.close(self.monitor)
        return finished

    def abandon(self) -> None:
        self._shape = self._agent = None
        super().abandon()
        if self._frozen.is_marked():
            state = self.state()
            if state is VmState.ABSENT:
                self._frozen.forget()
            elif state is VmState.EXECUTING:
                self._thaw()
        if self._second.is_there():
            if self.state() is VmState.ABSENT:
                self._second.forget()
            else:
                self._second.close(self.monitor)

    # -- bringing back

    def duplicate_options(self) -> Mapping[str, str]:
        return {"uri": self._uri}

    def load(self, request: LoadRequest) -> LoadedVm:
        self.close()
        ours = self._our_folders()
        launch.load(
            self.vm, self._uri, self._domain, self._folder, request, ours, define=self._define, frozen=self._frozen
        )
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
            self._frozen.forget()
            return
        self.close()
        launch.destroy(self._folder, mark)
        self._frozen.forget()

    def list_owned(self) -> Sequence[OwnedResource]:
        loaded = [OwnedResource("vm", mark.vm, mark.vm, self.name) for mark in run.all_marks(self._state_folder)]
        overlays = freeze.list_owned(self.name, self._freeze_records)
        return [*duplicates.list_owned(self.name, self.context), *loaded, *overlays]

    # -- within

    def _plan_snapshot(self, request: CaptureRequest) -> CapturePlan:
        description = self.describe()
        plan.check(description)
        mapped = mapped_memory(self.monitor.peer_pid)
        factor = learned.factors(self._state_folder, self.vm).get(snapshot_capture.NAME, 1.0)
        chosen = snapshot_capture.plan_snapshot(description, mapped, request.max_pause_seconds, factor)
        plan.choose_folder(self.context, self.vm, self._room_bytes(chosen.capture, description.memory_bytes))
        return chosen

    def _capture_by(self, way: str, session: Session, *, held: bool, executing: bool) -> Capture:
        if way == snapshot_capture.NAME:
            return snapshot_capture.SnapshotCapture(session, self._uri, self._domain)
        return super()._capture_by(way, session, held=held, executing=executing)

    def _room_bytes(self, way: str, memory_bytes: int) -> int:
        # libvirt's file, and the images that are made of it.
        return 2 * memory_bytes if way == snapshot_capture.NAME else super()._room_bytes(way, memory_bytes)

    def _check_unchanged(self) -> None:
        if self._shape is not None:
            with reached(self._uri) as domains:
                check_unchanged(self.vm, domains, self._domain, self._shape)

    def _is_there(self) -> bool:
        """Whether libvirt has such a domain; what else is wrong is told where libvirt is looked at."""
        try:
            with reached(self._uri) as domains:
                domains.find(self._domain)
        except VmsnapError:
            return False
        return True

    def _connect(self) -> Monitor:
        with reached(self._uri) as domains:
            domains.check_kind()
            address = LibvirtAddress(self._uri, domains.find(self._domain).uuid)
        return Monitor.borrow(address.text())

    def _described_by(self, monitor: Monitor) -> VmDescription:
        with reached(self._uri) as domains:
            domain = domains.find(self._domain)
            # What the first look finds is what the core knows the VM as.
            self._shape = self._shape or Shape.of(domain)
            found = describe.describe(self.vm, domain, monitor)
        return replace(found, disks=plain_files(found.disks)) if self._vouches else found

    def _our_folders(self) -> list[Path]:
        """Those of vmsnap's in which QEMU's user may be let through to a disk of its own."""
        return [self.context.state_dir, *filter(None, (self.context.duplicates_dir, self.context.spool_dir))]

    def _open_way(self, file: Path) -> None:
        ours = self._our_folders()
        # Elsewhere it lies beside its disk, to which QEMU has got.
        if is_within(file.parent, ours):
            let_through(user_of(self.monitor.peer_pid)[0], [str(file)], ours)

    def _agent_place(self) -> AgentPlace:
        with reached(self._uri) as domains:
            domain = domains.find(self._domain)
            return place_of(self.vm, self._uri, domain.uuid, domain.tree())

    def _thaw(self) -> None:
        with kept_free(self._record, giving_up=False):
            frozen_seconds = self._frozen.thaw()
        if frozen_seconds is not None and self._capture is not None:
            self._capture.details[freezing.DETAIL]["frozen_seconds"] = round(frozen_seconds, 4)

    def _resume_by_second(self) -> Moment | None:
        """None where that is not there."""
        if not self._second.is_there():
            return None
        with kept_free(self._record, giving_up=True):
            return self._second.make_run()

    @contextmanager
    def _past_libvirt(self) -> Iterator[Monitor | None]:
        """The monitor of the domain that was captured last, without libvirtd, which must have gone and may come again:
        so for moments only. None where no QEMU of it is on this host.

        :raises Busy: libvirtd has the monitor, and does not answer us
        :raises Unreachable: it was never captured, or its monitor is not found
        """
        known = process.read(self._state_folder, self.vm)
        if known is None or not is_libvirt_address(known.socket):
            raise Unreachable(f"libvirt at {self._uri} cannot be reached, and VM {self.vm!r} was never captured")
        pid = process_of(LibvirtAddress.parse(known.socket).uuid)
        if pid is None:
            yield None
            return
        socket = monitor_socket(pid)
        if socket is None:
            raise Unreachable(f"libvirt at {self._uri} cannot be reached, nor the monitor of process {pid}")
        with Monitor.borrow(socket) as monitor:
            yield monitor
