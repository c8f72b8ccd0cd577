"""Captures of a VM of QEMU's, whoever started its process: what the drivers for such VMs have in common."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmsnap.errors import Busy, CannotCapture, HypervisorError, ProtocolError, UnknownVm, UsageError, VmGone
from vmsnap.model import (
    CapturePlan,
    Disk,
    Duplicate,
    FreezePlan,
    Json,
    Moment,
    Nic,
    OwnedResource,
    RamImage,
    VmDescription,
    VmState,
    check_name,
)
from vmsnap.roles import CaptureRequest, DriverContext, Hypervisor
from vmsnap_drivers.qemu import disk_sizes, ending, freeze, network, process
from vmsnap_drivers.qemu.capture import duplicates, learned, plan, record, settings
from vmsnap_drivers.qemu.capture.cow import CowCapture, can_hold
from vmsnap_drivers.qemu.capture.drain import Drain
from vmsnap_drivers.qemu.capture.heal import heal
from vmsnap_drivers.qemu.capture.migration import cancel_migration
from vmsnap_drivers.qemu.capture.precopy import PrecopyCapture
from vmsnap_drivers.qemu.capture.revive import make_run, stop
from vmsnap_drivers.qemu.capture.session import STALL_TIMEOUT_SECONDS, Capture, Session
from vmsnap_drivers.qemu.capture.turn import kept_free, turn_to_heal, turn_to_lift
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.ram_image import image_path
from vmsnap_drivers.qemu.status import vm_state
from vmsnap_drivers.qemu.stream import DEVICE_STATE_NAME
from vmsnap_drivers.qemu.stream_format import CapturedMemory


class MonitoredHypervisor(Hypervisor):
    """A VM of a QEMU that is reached by a `Monitor`: all of a capture. How the monitor is had, how the VM is described
    and brought back is each driver's own.

    The option ``capture`` is ``auto``, ``cow`` or ``precopy``.
    """

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        super().__init__(check_name(vm, "VM name"), context, options)
        self._wanted = options.get("capture", "auto")
        self._monitor: Monitor | None = None
        self._capture: Capture | None = None
        self._first_seen: Sequence[Disk] = ()

    @abstractmethod
    def _connect(self) -> Monitor:
        """Borrow the VM's monitor. Raises what `Monitor.borrow` raises."""

    @abstractmethod
    def _described_by(self, monitor: Monitor) -> VmDescription:
        """The VM as the monitor and whoever else knows it tell. Raises what `describe` raises."""

    @property
    def monitor(self) -> Monitor:
        """The connection, opened when first used."""
        if self._monitor is None:
            with kept_free(self._record, giving_up=False):
                self._monitor = self._connect()
        return self._monitor

    def state(self) -> VmState:
        try:
            return vm_state(self.monitor)
        except (UnknownVm, VmGone):
            self.close()
            return VmState.ABSENT

    def describe(self) -> VmDescription:
        found = self._described_by(self.monitor)
        # What the first look finds is what the core knows the VM as.
        self._first_seen = self._first_seen or found.disks
        return found

    # -- capturing

    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        description = self.describe()
        known = learned.factors(self._state_folder, self.vm)
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
        """See the role; also outside of a capture."""
        return stop(self.monitor) if self._capture is None else self._capture.pause()

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
        # The guest goes on already, so that asking costs it nothing.
        disk_sizes.check_unchanged(self.vm, self.monitor, self._first_seen)
        self._first_seen = ()
        captured = self._collected(capture, progress)
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
                self._capture.give_up()
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
        duplicates.discard(self.name, self.context, name)

    # -- holding disks

    def plan_freeze(self, disks: Sequence[Disk], tag: str) -> FreezePlan:
        if not self.freezes:
            return super().plan_freeze(disks, tag)
        return freeze.plan_freeze(self.vm, self.monitor, disks, tag, self._freeze_records, self.context.spool_dir)

    def prepare_freeze(self, plan: FreezePlan) -> None:
        freeze.prepare(plan, self.monitor, self._open_way)

    def freeze_disks(self, plan: FreezePlan) -> Moment:
        return freeze.freeze(plan, self.monitor)

    def check_frozen(self, plan: FreezePlan) -> None:
        freeze.check(plan, self.monitor)

    def thaw_disks(self, plan: FreezePlan) -> None:
        freeze.thaw(plan)

    def thaw_owned(self, owned: OwnedResource) -> None:
        freeze.thaw_owned(owned, self._freeze_records)

    # -- bringing back

    def cut_network(self) -> tuple[Nic, ...]:
        return network.cut(self.monitor)

    def shut_down(self, timeout_seconds: float) -> None:
        ending.shut_down(self.vm, self.monitor, timeout_seconds)

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    # -- within

    @property
    def _state_folder(self) -> Path:
        """What the driver keeps of its VMs is below it."""
        return self.context.state_dir / self.name

    @property
    def _freeze_records(self) -> Path:
        return self._state_folder / freeze.FOLDER

    def _open_way(self, file: Path) -> None:
        """See to it that QEMU gets to a file that is given to it. A QEMU that somebody started himself is left to him.

        :raises HypervisorError: it cannot
        """

    @property
    def _record(self) -> Path:
        return record.place(self._state_folder, self.vm)

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
            learned.remember(self._state_folder, self.vm, capture.name, chosen.predicted_pause_seconds, measured)
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
        room = self._room_bytes(way, description.memory_bytes)
        folder = plan.choose_folder(self.context, self.vm, room) / request.duplicate
        before = settings.Settings.read(monitor)
        pid = monitor.peer_pid
        process.note(self._state_folder, self.vm, pid, monitor.address, description.disks)
        record.write(place, record.CaptureRecord.of_this_process(self.vm, folder, way, pid, before))
        try:
            record.make_duplicate_folder(self.name, folder, self.vm, way)
        except FileExistsError as e:
            place.unlink()
            raise UsageError(f"a duplicate {request.duplicate!r} exists already") from e
        held = way == "cow" and description.state is VmState.EXECUTING and can_hold(monitor.version, pid)
        drain = Drain(folder, stall_timeout_seconds=STALL_TIMEOUT_SECONDS, held=held)
        session = Session(monitor, folder, request.max_pause_seconds, before, drain, chosen)
        self._capture = self._capture_by(way, session, held=held, executing=description.state is VmState.EXECUTING)
        self._capture.prepare()

    def _capture_by(self, way: str, session: Session, *, held: bool, executing: bool) -> Capture:
        """What captures in the way of the plan."""
        if way == "cow":
            return CowCapture(session, held=held, executing=executing)
        return PrecopyCapture(session)

    def _room_bytes(self, way: str, memory_bytes: int) -> int:
        """What a capture in that way takes of the host's memory, for a guest with so much RAM."""
        return memory_bytes

    def _collected(self, capture: Capture, progress: Callable[[int], None]) -> CapturedMemory:
        try:
            return capture.collect(progress)
        except HypervisorError as e:
            if self.state() is VmState.ABSENT:
                raise VmGone(f"VM {self.vm!r} ended while its memory was copied") from e
            raise
