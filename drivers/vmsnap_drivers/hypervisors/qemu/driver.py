"""`QemuHypervisor`: the role, each step handed to the module that knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vmsnap.errors import HypervisorError
from vmsnap.model import (
    CapturePlan,
    Disk,
    Duplicate,
    Finding,
    OwnedResource,
    VmDescription,
    VmState,
)
from vmsnap.roles import PATH, YES_NO, CaptureRequest, DriverContext, LoadedVm, LoadRequest, Option, with_defaults
from vmsnap_drivers.hypervisors.qemu import describe, launch, owned, tpm
from vmsnap_drivers.hypervisors.qemu.plugged import check_unchanged, plugged
from vmsnap_drivers.qemu import doctor, fence, life, own_disks, process
from vmsnap_drivers.qemu.capture import learned
from vmsnap_drivers.qemu.capture.hypervisor import MonitoredHypervisor
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.plain_files import PLAIN_FILES, plain_files


class QemuHypervisor(MonitoredHypervisor):
    """A VM of a QEMU (7.2 to 10.0 tried), reached by its QMP socket."""

    name = "qemu"
    freezes = True
    loads_luns = True
    options = (
        Option("qmp", "path of the VM's QMP socket (QEMU's option -qmp unix:PATH,server=on,wait=off)", type=PATH),
        Option("capture", "how to capture memory", "auto", ("auto", "cow", "precopy")),
        PLAIN_FILES,
    )
    needs = (doctor.QEMU,)

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        super().__init__(vm, context, options)
        self._folder = launch.run_folder(context.state_dir, vm)
        self._socket = options.get("qmp") or str(self._folder / "qmp.sock")
        self._plugged: frozenset[str] | None = None
        self._vouches = YES_NO.read(with_defaults(self.options, options)["plain_files"])

    # -- asking

    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        self._plugged = plugged(self.monitor)
        return super().plan_capture(request)

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        # The guest goes on already, so that asking costs it nothing.
        if self._plugged is not None:
            check_unchanged(self.vm, self._plugged, plugged(self.monitor))
            self._plugged = None
        return super().finish_duplicate(duplicate, progress)

    def list_vms(self) -> Sequence[str]:
        return [mark.vm for mark in self._marks() if launch.is_alive(mark)]

    def doctor(self) -> Sequence[Finding]:
        findings = list(doctor.look_at_host(self.context))
        if Path(self._socket).exists():
            known = learned.factors(self._state_folder, self.vm)
            findings += doctor.look_at_vm(self.vm, self._connect, self._described_by, self._wanted, known)
        return findings

    # -- bringing back

    def load(self, request: LoadRequest) -> LoadedVm:
        mark = launch.load(self.vm, self._folder, Path(self._socket), request)
        return LoadedVm(self.vm, {"qmp": mark.socket})

    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        known = [*process.read_all(self.context.state_dir), *map(launch.record_of, self._marks())]
        own_disks.check(self.vm, self.monitor, disks, self._folder, known)
        return self.describe().disks

    def fence(self, *, kill: bool = False) -> str:
        self.close()
        captured, mark = process.read(self._state_folder, self.vm), launch.read_mark(self._folder)
        loaded = launch.record_of(mark) if mark is not None else None
        known = [record for record in (captured, loaded) if record is not None]
        return fence.fence(self.vm, Path(self._socket), known, kill=kill)

    def await_life(self, seconds: float) -> str:
        logs, agent = life.signs(self.monitor, self._folder)
        return life.await_life(self.vm, self.monitor, logs, agent, seconds)

    def destroy(self) -> None:
        mark = launch.read_mark(self._folder) or launch.find_unmarked(self.vm, self._folder, self._socket)
        if mark is None:
            if self.state() is not VmState.ABSENT:
                raise HypervisorError(f"VM {self.vm!r} was not started by vmsnap and is not ended by it")
            tpm.end(self._folder)
            return
        self.close()
        launch.destroy(self._folder, mark)

    def list_owned(self) -> Sequence[OwnedResource]:
        return owned.list_owned(self.context)

    # -- within

    def _connect(self) -> Monitor:
        return Monitor.borrow(self._socket)

    def _described_by(self, monitor: Monitor) -> VmDescription:
        found = describe.describe(self.vm, monitor)
        return replace(found, disks=plain_files(found.disks)) if self._vouches else found

    def _marks(self) -> list[launch.LoadedMark]:
        runs = self._folder.parent
        marks = [launch.read_mark(folder) for folder in sorted(runs.iterdir())] if runs.is_dir() else []
        return [mark for mark in marks if mark is not None]
