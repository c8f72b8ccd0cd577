"""`QemuHypervisor`: the role, each step handed to the module that knows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import (
    Busy,
    CannotCapture,
    HypervisorError,
    ProtocolError,
    UnknownVm,
    UsageError,
    VmGone,
)
from vmsnap.model import (
    CapturePlan,
    Disk,
    Duplicate,
    Finding,
    Json,
    Moment,
    Nic,
    OwnedResource,
    RamImage,
    VmDescription,
    VmState,
    check_name,
)
from vmsnap.roles import CaptureRequest, DriverContext, Hypervisor, LoadedVm, LoadRequest, Option
from vmsnap_drivers.hypervisors.qemu import (
    describe,
    doctor,
    ending,
    fence,
    launch,
    learned,
    life,
    network,
    own_disks,
    owned,
    plan,
    process,
    record,
    settings,
    tpm,
)
from vmsnap_drivers.hypervisors.qemu.cow import CowCapture, can_hold
from vmsnap_drivers.hypervisors.qemu.drain import Drain
from vmsnap_drivers.hypervisors.qemu.heal import heal
from vmsnap_drivers.hypervisors.qemu.migration import cancel_migration
from vmsnap_drivers.hypervisors.qemu.precopy import PrecopyCapture
from vmsnap_drivers.hypervisors.qemu.revive import make_run
from vmsnap_drivers.hypervisors.qemu.session import STALL_TIMEOUT_SECONDS, Capture, Session
from vmsnap_drivers.hypervisors.qemu.turn import kept_free, turn_to_heal, turn_to_lift
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.ram_image import image_path
from vmsnap_drivers.qemu.stream import DEVICE_STATE_NAME
from vmsnap_drivers.qemu.stream_format import CapturedMemory

_PROGRESS_SECONDS: Final = 0.1


class QemuHypervisor(Hypervisor):
    """A VM of a QEMU (7.2 to 10.0 tried), reached by its QMP socket."""

    name = "qemu"
    options = (
        Option("qmp", "path of the VM's QMP socket (QEMU's option -qmp unix:PATH,server=on,wait=off)"),
        Option("capture", "how to capture memory", "auto", ("auto", "cow", "precopy")),
    )

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        super().__init__(check_name(vm, "VM name"), context, options)
        self._wanted = options.get("capture", "auto")
        self._folder = launch.run_folder(context.state_dir, vm)
        self._socket = options.get("qmp") or str(self._folder / "qmp.sock")
        self._monitor: Monitor | None = None
        self._capture: Capture | None = None

    @property
    def monitor(self) -> Monitor:
        """The connection, opened when first used."""
        if self._monitor is None:
            with kept_free(self._record, giving_up=False):
                self._monitor = Monitor.borrow(self._socket)
        return self._monitor

    # -- asking

    def describe(self) -> VmDescription:
        return describe.describe(self.vm, self.monitor)

    def state(self) -> VmState:
        try:
            return describe.vm_state(self.monitor)
        except (UnknownVm, VmGone):
            self.close()
            return VmState.ABSENT

    def list_vms(self) -> Sequence[str]:
        runs = self._folder.parent
        marks = [launch.read_mark(folder) for folder in sorted(runs.iterdir())] if runs.is_dir() else []
        return [mark.vm for mark in marks if mark is not None and launch.is_alive(mark)]

    def doctor(self) -> Sequence[Finding]:
        findings = list(doctor.look_at_host(self.context))
        if Path(self._socket).exists():
            known = learned.factors(self.context.state_dir, self.vm)
            findings += doctor.look_at_vm(self.vm, self._socket, self._wanted, known)
        return findings

    # -- capturing

    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        description = self.describe()
        known = learned.factors(self.context.state_dir, self.vm)
        chosen = plan.plan_capture(self._wanted, self.monitor, description, request, known)
        plan.choose_folder(self.context, self.vm, description.memory_bytes)
        return chosen

    def prepare(self, request: CaptureRequest, plan: CapturePlan) -> None:
        check_name(request.duplicate, "duplicate name")
        try:
            self._prepare(request, plan)
        except CannotCapture:
            self.abandon()
            raise

    def pause(self) -> Moment:
        return self._going_on().pause()

    def duplicate(self) -> Duplicate:
        capture = self._going_on()
        instant = capture.duplicate()
        capture.is_fixed = True
        folder = capture.session.folder
        return Duplicate(folder.name, folder, capture.name, instant, (), folder / DEVICE_STATE_NAME)

    def resume(self) -> Moment:
        if self._capture is not None and self._capture.is_fixed:
            try:
                return self._capture.resume()
            except HypervisorError:
                with kept_free(self._record, giving_up=True):
                    make_run(self.monitor)
                raise
        with kept_free(self._record, giving_up=True):
            monitor = self.monitor
            # Asked once the monitor is ours: until then another process may have set it right, and begun anew.
            with turn_to_lift(self._record, giving_up=True) as broken_off:
                if broken_off:
                    cancel_migration(monitor)
            return make_run(monitor)

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        capture = self._going_on()
        session = capture.session
        captured = self._drained(capture, progress)
        session.wait("MIGRATION", status="completed", timeout_seconds=STALL_TIMEOUT_SECONDS)
        session.drain.stop()
        settings.restore(session.monitor, session.before)
        self._record.unlink(missing_ok=True)
        self._capture = None
        images = tuple(
            RamImage(
                block.name, block.length_bytes, image_path(captured.folder, number, block.name), captured.page_bytes
            )
            for number, block in enumerate(captured.blocks)
        )
        details = {"capture": capture.name, "memory": captured.to_json(), "pause": self._checked(capture)}
        details |= capture.details
        return Duplicate(
            duplicate.name,
            duplicate.folder,
            duplicate.capture,
            duplicate.instant,
            images,
            captured.device_state,
            details,
        )

    def abandon(self) -> None:
        place = self._record
        left = record.read(place)
        with kept_free(self._record, giving_up=True):
            if self._capture is not None:
                self._capture.session.drain.stop()
                self._capture = None
            if left is not None:
                if left.qemu_lives() and self.state() is not VmState.ABSENT:
                    cancel_migration(self.monitor)
                shutil.rmtree(left.folder, ignore_errors=True)
        with turn_to_heal(place) as is_ours:
            if is_ours:
                if left is not None and left.qemu_lives():
                    self._restore(left)
                place.unlink()

    def discard_duplicate(self, name: str) -> None:
        owned.discard(self.context, name)

    # -- bringing back

    def load(self, request: LoadRequest) -> LoadedVm:
        mark = launch.load(self.vm, self._folder, Path(self._socket), request)
        return LoadedVm(self.vm, {"qmp": mark.socket})

    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        own_disks.check(self.vm, self.monitor, disks, self._folder, self.context.state_dir)
        return self.describe().disks

    def cut_network(self) -> tuple[Nic, ...]:
        return network.cut(self.monitor)

    def shut_down(self, timeout_seconds: float) -> None:
        ending.shut_down(self.vm, self.monitor, timeout_seconds)

    def fence(self, *, kill: bool = False) -> str:
        self.close()
        captured, mark = process.read(self.context.state_dir, self.vm), launch.read_mark(self._folder)
        loaded = process.ProcessRecord.of_mark(mark) if mark is not None else None
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

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    # -- within

    @property
    def _record(self) -> Path:
        return record.place(self.context.state_dir, self.vm)

    def _restore(self, left: record.CaptureRecord) -> None:
        try:
            if left.capture == "cow":
                heal(self.monitor)
        except VmGone:
            return
        finally:
            if self.state() is not VmState.ABSENT:
                settings.restore(self.monitor, left.settings)

    def _checked(self, capture: Capture) -> Json:
        """The pause beside its prediction, for the manifest and for the next prediction."""
        chosen, measured = capture.session.plan, capture.pause_seconds()
        if chosen.predicted_pause_seconds and measured:
            learned.remember(self.context.state_dir, self.vm, capture.name, chosen.predicted_pause_seconds, measured)
        return {
            "predicted_seconds": chosen.predicted_pause_seconds,
            "measured_seconds": measured,
            "reason": chosen.reason,
        }

    def _going_on(self) -> Capture:
        if self._capture is None:
            raise ProtocolError(f"no capture of VM {self.vm!r} was prepared")
        return self._capture

    def _prepare(self, request: CaptureRequest, chosen: CapturePlan) -> None:
        monitor, way = self.monitor, chosen.capture
        place = self._record
        if self._capture is not None or record.read(place) is not None:
            raise Busy(f"a capture of VM {self.vm!r} is going on", cure=f"vmsnap recover {self.vm}")
        description = self.describe()
        folder = plan.choose_folder(self.context, self.vm, description.memory_bytes) / request.duplicate
        before = settings.Settings.read(monitor)
        pid = monitor.peer_pid
        process.note(self.context.state_dir, self.vm, pid, self._socket, description.disks)
        record.write(place, record.CaptureRecord.of_this_process(self.vm, folder, way, pid, before))
        try:
            record.make_duplicate_folder(folder, self.vm, way)
        except FileExistsError as e:
            place.unlink()
            raise UsageError(f"a duplicate {request.duplicate!r} exists already") from e
        held = way == "cow" and description.state is VmState.EXECUTING and can_hold(monitor.version, pid)
        drain = Drain(folder, stall_timeout_seconds=STALL_TIMEOUT_SECONDS, held=held)
        session = Session(monitor, folder, request.max_pause_seconds, before, drain, chosen)
        if way == "cow":
            self._capture = CowCapture(session, held=held, executing=description.state is VmState.EXECUTING)
        else:
            self._capture = PrecopyCapture(session)
        self._capture.prepare()

    def _drained(self, capture: Capture, progress: Callable[[int], None]) -> CapturedMemory:
        drain = capture.session.drain
        try:
            while (captured := drain.finish(_PROGRESS_SECONDS)) is None:
                progress(drain.read_bytes)
        except HypervisorError as e:
            if self.state() is VmState.ABSENT:
                raise VmGone(f"VM {self.vm!r} ended while its memory was copied") from e
            raise
        progress(drain.read_bytes)
        return captured
