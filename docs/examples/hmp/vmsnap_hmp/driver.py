"""The driver: one VM of QEMU, over its human monitor."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vmsnap.errors import (
    AlreadyExists,
    Busy,
    CannotCapture,
    HypervisorError,
    PauseExceeded,
    StorageFull,
    UnknownVm,
    VmGone,
)
from vmsnap.model import (
    CapturePlan,
    Disk,
    Duplicate,
    Finding,
    MemoryRegion,
    Moment,
    Nic,
    OwnedResource,
    RamImage,
    VmDescription,
    VmState,
)
from vmsnap.roles import (
    PATH,
    CaptureRequest,
    DriverContext,
    Hypervisor,
    LoadedVm,
    LoadRequest,
    Option,
    Program,
    seconds,
    with_defaults,
)
from vmsnap_hmp import loading, places
from vmsnap_hmp.blocks import disks_in
from vmsnap_hmp.commandline import CommandLine
from vmsnap_hmp.loading import Definition
from vmsnap_hmp.monitor import Monitor, NoAnswer
from vmsnap_hmp.places import DuplicateMark, DuplicatePlace, LoadedPlace, LoadedRecord
from vmsnap_hmp.processes import Process
from vmsnap_hmp.state import copy_ram, leave_out_ram, save_devices

REGION = "ram"
TIMEOUT = seconds()
STANDS = ("paused", "postmigrate", "prelaunch")
_COPIED_BYTES_PER_SECOND = 1.5e9
_FIXED_SECONDS = 0.03


class HmpHypervisor(Hypervisor):
    """QEMU over its human monitor. The guest's RAM must be a shared file on tmpfs, its disks raw images.

    The guest stands still while its RAM is copied, 0.7 s a GiB.
    """

    name = places.NAME
    options = (
        Option("monitor", "path of the UNIX socket of -monitor; a VM that vmsnap loaded has one of its own", type=PATH),
        Option("timeout", "after how long a call that QEMU does not answer is given up", "10", type=TIMEOUT),
    )
    needs = (Program(("qemu-system-x86_64",), "apt install qemu-system-x86"),)

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        """Remember name, context and checked options; no I/O."""
        super().__init__(vm, context, options)
        self._timeout_seconds = self._pause_seconds = TIMEOUT.read(with_defaults(self.options, options)["timeout"])
        self._place = LoadedPlace(context, vm)
        self._address = Path(options["monitor"]).absolute() if options.get("monitor") else self._place.monitor
        self._monitor = Monitor(vm, self._address)
        self._request: CaptureRequest | None = None
        self._saved = False

    # -- asking

    def _process(self) -> Process:
        process = Process.of(self._monitor.process())
        if process is None:
            raise VmGone(f"VM {self.vm!r} is gone")
        return process

    def describe(self) -> VmDescription:
        """Ask the monitor for state and disks, the kernel for the command line; see the role."""
        process = self._process()
        state, _ = self._monitor.status(self._timeout_seconds)
        try:
            definition = Definition(process.program(), dict(process.variables()), tuple(process.argv()[1:]))
        except (FileNotFoundError, ProcessLookupError):
            raise VmGone(f"VM {self.vm!r} is gone") from None
        try:
            line = definition.line
        except HypervisorError as e:
            return VmDescription(self.vm, self.name, state, 0, 0, (), (), refusals=(e.message,))
        refusals = list(line.refusals())
        disks = disks_in(self._monitor.ask("info block", self._timeout_seconds), line)
        ram_bytes = 0
        if not refusals:
            ram_bytes = line.ram_path.stat().st_size if line.ram_path.is_file() else 0
            if not ram_bytes or not process.maps(line.ram_path):
                refusals.append(f"{line.ram_path} is not the file that its RAM is in")
            if sorted(disk.device for disk in disks) != sorted(line.drives()):
                refusals.append("it has other disks than its command line says")
        return VmDescription(
            vm=self.vm,
            hypervisor=self.name,
            state=state,
            memory_bytes=ram_bytes,
            vcpus=line.vcpus,
            memory=(MemoryRegion(REGION, ram_bytes, backing=f"tmpfs:{line.ram_path}"),) if ram_bytes else (),
            disks=disks,
            definition=definition.plain(),
            refusals=tuple(refusals),
            hypervisor_version=self._monitor.ask("info version", self._timeout_seconds).split("\n")[0],
        )

    def state(self) -> VmState:
        """Ask what the VM does now; see the role."""
        try:
            return self._monitor.status(self._timeout_seconds)[0]
        except (UnknownVm, VmGone):
            return VmState.ABSENT

    def list_vms(self) -> Sequence[str]:
        """The VMs that vmsnap loaded; QEMU keeps no list."""
        return [record.vm for place, record in places.loaded(self.context) if place.process() is not None]

    def doctor(self) -> Sequence[Finding]:
        """See the role."""
        findings = []
        program = shutil.which("qemu-system-x86_64")
        if program is None:
            cure = "apt-get install qemu-system-x86"
            findings.append(Finding("QEMU", "missing", "there is no qemu-system-x86_64", cure))
        else:
            findings.append(Finding("QEMU", "ok", program))
        try:
            refusals = self.describe().refusals
        except UnknownVm:
            return findings
        except HypervisorError as e:
            return [*findings, Finding(f"VM {self.vm}", "missing", e.message, e.cure)]
        findings += [Finding(f"VM {self.vm}", "missing", refusal) for refusal in refusals]
        return findings or [Finding(f"VM {self.vm}", "ok", "can be captured")]

    # -- capturing

    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        """There is one way: to copy the RAM while the guest stands still; see the role."""
        line = self._line_to_capture()
        used = line.ram_path.stat().st_blocks * 512
        self._see_that_there_is_room(used)
        predicted = _FIXED_SECONDS + used / _COPIED_BYTES_PER_SECOND
        return CapturePlan("copy", disks_first=False, predicted_pause_seconds=predicted, reason="the only way it has")

    def _line_to_capture(self) -> CommandLine:
        description = self.describe()
        if description.refusals:
            raise CannotCapture(f"{self.vm}: {description.refusals[0]}")
        if description.state is VmState.ENDED:
            raise CannotCapture(f"{self.vm}: its guest has ended")
        return Definition.of(description.definition).line

    def _see_that_there_is_room(self, needed_bytes: int) -> None:
        room = os.statvfs(self.context.memory_dir)
        free = room.f_bavail * room.f_frsize
        if self.context.memory_budget_bytes is not None:
            images = [place.ram for place, _ in places.duplicates(self.context) if place.ram.exists()]
            free = min(free, self.context.memory_budget_bytes - sum(path.stat().st_blocks * 512 for path in images))
        if needed_bytes > free:
            raise StorageFull(
                f"{self.vm}: no room for {needed_bytes} bytes of RAM in {self.context.memory_dir}, {free} are free",
                cure="discard duplicates, or raise the memory budget",
            )

    def prepare(self, request: CaptureRequest, plan: CapturePlan) -> None:
        """Make the duplicate's folder, and tell QEMU to leave RAM out of what it saves; see the role."""
        line = self._line_to_capture()
        self._see_that_there_is_room(line.ram_path.stat().st_blocks * 512)
        try:
            DuplicatePlace(self.context, request.duplicate).make(self.vm)
        except OSError as e:
            raise CannotCapture(f"{self.vm}: no folder for the duplicate {request.duplicate!r}: {e}") from e
        self._request, self._saved = request, False
        self._pause_seconds = min(self._timeout_seconds, request.max_pause_seconds)
        leave_out_ram(self._monitor, True, self._timeout_seconds)

    def pause(self) -> Moment:
        """Stop the vCPUs. Where a capture was prepared, the devices are saved here already: QEMU says ``postmigrate``
        then, until the VM executes again, whoever made it so. That is how `duplicate` and `resume` see that it did not.
        """
        try:
            self._monitor.tell("stop", self._pause_seconds)
        except NoAnswer as e:
            with contextlib.suppress(HypervisorError):
                self._monitor.tell("cont", self._pause_seconds)
            raise PauseExceeded(f"{self.vm} did not stop within {self._pause_seconds:g} s") from e
        stopped = Moment.now("pause")
        if self._request is not None and not self._saved:
            place = DuplicatePlace(self.context, self._request.duplicate)
            try:
                save_devices(self._monitor, place.device_state, self._pause_seconds)
            except VmGone:
                raise
            except HypervisorError:
                self._execute()
                raise
            self._saved = True
        return stopped

    def _see_that_it_stood_still(self) -> None:
        _, word = self._monitor.status(self._pause_seconds)
        if word != "postmigrate":
            raise HypervisorError(f"{self.vm} is {word}: it executed while it was being captured")

    def duplicate(self) -> Duplicate:
        """Copy the RAM; see the role."""
        if self._request is None or not self._saved:
            raise HypervisorError(f"{self.vm}: duplicate without prepare and pause")
        self._see_that_it_stood_still()
        place = DuplicatePlace(self.context, self._request.duplicate)
        line = Definition.of(self.describe().definition).line
        instant = Moment.now("duplicate")
        copied = copy_ram(line.ram_path, place.ram)
        return Duplicate(
            name=self._request.duplicate,
            folder=place.folder,
            capture="copy",
            instant=instant,
            images=(RamImage(REGION, place.ram.stat().st_size, place.ram),),
            device_state=place.device_state,
            details={"copied_bytes": copied},
        )

    def resume(self) -> Moment:
        """Let the VM execute; see the role.

        :raises HypervisorError: it executes, but did so in between as well: what was captured is not of one instant
        """
        captured, self._saved = self._saved, False
        ran: HypervisorError | None = None
        if captured:
            try:
                self._see_that_it_stood_still()
            except (UnknownVm, VmGone):
                raise
            except HypervisorError as e:
                ran = e
        self._execute()
        if ran is not None:
            raise ran
        return Moment.now("resume")

    def _execute(self) -> None:
        try:
            state, _ = self._monitor.status(self._timeout_seconds)
            if state is VmState.ENDED:
                raise VmGone(f"the guest of {self.vm} has ended")
            if state is not VmState.EXECUTING:
                self._monitor.tell("migrate_cancel", self._timeout_seconds)
                # QEMU 10 says "Migration is not finalized yet" for a moment
                self._monitor.tell_until_taken("cont", self._timeout_seconds)
                self._monitor.await_status(("running",), self._timeout_seconds)
        except UnknownVm as e:
            raise VmGone(e.message) from e

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        """Nothing is left to copy; see the role."""
        progress(duplicate.details["copied_bytes"])
        leave_out_ram(self._monitor, False, self._timeout_seconds)
        try:
            DuplicatePlace(self.context, duplicate.name).mark(DuplicateMark(self.vm, finished=True))
        except OSError as e:
            raise HypervisorError(f"the duplicate {duplicate.name!r} is gone: {e}") from e
        self._request = None
        return duplicate

    def abandon(self) -> None:
        """Give up; see the role."""
        self._request, self._saved = None, False
        with contextlib.suppress(UnknownVm, VmGone):
            self._monitor.tell("migrate_cancel", self._timeout_seconds)
            leave_out_ram(self._monitor, False, self._timeout_seconds)
        for place, mark in places.duplicates(self.context):
            if mark.vm == self.vm and not mark.finished:
                place.remove()

    def discard_duplicate(self, name: str) -> None:
        """Remove the duplicate of that name; see the role."""
        DuplicatePlace(self.context, name).remove()

    # -- bringing back

    def load(self, request: LoadRequest) -> LoadedVm:
        """Start another QEMU on a copy of the RAM; see the role."""
        if self._place.process() is not None or self.state() is not VmState.ABSENT:
            raise AlreadyExists(f"a VM {self.vm!r} exists at {self._address}")
        definition = Definition.of(request.definition)
        loading.check_monitor_path(self._address)
        loading.check_disks(self.vm, definition.line, request.disks)
        if len(request.images) != 1:
            raise HypervisorError(f"{self.vm}: {len(request.images)} RAM images instead of one")
        record = LoadedRecord(
            self.vm, self._address, request.definition, tuple(request.disks), takeover=request.takeover
        )
        self._place.remove()  # what a VM left that died
        try:
            self._place.keep(record)
            loading.take_over_image(request.images[0].path, self._place.ram, disposable=request.images_disposable)
            shutil.copyfile(request.device_state, self._place.device_state)
            loading.start(self._place, record, self._timeout_seconds)
        except OSError as e:
            self._place.remove()
            raise HypervisorError(f"{self.vm} cannot be loaded: {e}") from e
        except BaseException:
            loading.stop(self._place, self._timeout_seconds)
            self._place.remove()
            raise
        return LoadedVm(self.vm, {"monitor": str(self._address)})

    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        """Start QEMU anew on its own state and RAM with these disks, and ask afterwards; see the role."""
        record = self._record()
        loading.check_disks(self.vm, Definition.of(record.definition).line, disks, record.disks)
        if self.state() is not VmState.STOPPED:
            raise HypervisorError(f"{self.vm} does not stand still: its disks cannot be switched")
        has = {(disk.device, disk.address) for disk in self.describe().disks}
        if has != {(disk.device, disk.address) for disk in disks}:
            self._start_on(disks, record)
        return self._disks_among(disks)

    def _start_on(self, disks: Sequence[Disk], record: LoadedRecord) -> None:
        leave_out_ram(self._monitor, True, self._timeout_seconds)
        save_devices(self._monitor, self._place.device_state, self._timeout_seconds)
        kept = self._place.device_state.read_bytes()
        loading.stop(self._place, self._timeout_seconds)
        try:
            loading.start(self._place, replace(record, disks=tuple(disks)), self._timeout_seconds)
        except HypervisorError:
            self._place.device_state.write_bytes(kept)
            loading.start(self._place, record, self._timeout_seconds)
            raise

    def _disks_among(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        have = self.describe().disks
        allowed = {(disk.device, disk.address) for disk in disks}
        wrong = [disk for disk in have if not disk.read_only and (disk.device, disk.address) not in allowed]
        if wrong:
            raise HypervisorError(f"{self.vm} has {wrong[0].address} as {wrong[0].device}")
        return have

    def _record(self) -> LoadedRecord:
        record = self._place.record()
        if record is None:
            raise HypervisorError(f"{self.vm} was not loaded by vmsnap")
        return record

    def cut_network(self) -> tuple[Nic, ...]:
        """There is none to cut: VMs with a network are refused; see the role."""
        refusals = self.describe().refusals
        if refusals:
            raise HypervisorError(f"{self.vm}: it cannot be shown that it has no network: {refusals[0]}")
        return ()

    def shut_down(self, timeout_seconds: float) -> None:
        """Press the power button and wait. A VM that was loaded shows afterwards that its guest did it."""
        self._monitor.tell("system_powerdown", self._timeout_seconds)
        try:
            self._monitor.await_status(("shutdown",), timeout_seconds)
        except (UnknownVm, VmGone) as e:
            raise HypervisorError(f"{self.vm} ended, and nothing shows that its guest shut it down") from e

    def fence(self, *, kill: bool = False) -> str:
        """Ask the kernel who listens on the monitor: QEMU does as long as it lives; see the role."""
        known = self._place.record()
        process: Process | None = None
        try:
            process = Process.of(self._monitor.process())
        except VmGone:
            shown = f"nobody listens on {self._address}"
        except UnknownVm as e:
            if known is None:
                raise HypervisorError(
                    f"{self.vm}: there is no socket {self._address}, and nothing shows that its QEMU has ended",
                    cure="see its option -monitor",
                ) from e
            shown = f"there is no socket {self._address}"
        if process is None and known is not None:
            process = self._place.process()
        if process is None:
            return f"{shown if known is None else f'{shown}, and its process is gone'}"
        if not kill:
            raise Busy(f"VM {self.vm!r} lives: process {process.pid} has its monitor", cure="end it first")
        process.kill(self._timeout_seconds)
        return f"its process {process.pid} was killed and has ended"

    def destroy(self) -> None:
        """End the VM; see the role."""
        if self._place.record() is None:
            if self.state() is not VmState.ABSENT:
                raise HypervisorError(f"{self.vm} was not loaded by vmsnap", cure="end it yourself")
            return
        loading.stop(self._place, self._timeout_seconds)
        self._place.remove()

    def list_owned(self) -> Sequence[OwnedResource]:
        """Duplicates and loaded VMs; both carry their own name as the tag."""
        found = [place.folder.name for place, _ in places.duplicates(self.context)]
        owned = [OwnedResource("duplicate", name, name, self.name) for name in found]
        return owned + [OwnedResource("vm", row.vm, row.vm, self.name) for _, row in places.loaded(self.context)]
