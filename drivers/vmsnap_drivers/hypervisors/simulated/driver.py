"""The driver of the simulated hypervisor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    FreezePlan,
    MemoryRegion,
    Moment,
    Nic,
    OwnedResource,
    RamImage,
    VmDescription,
    VmState,
    check_name,
)
from vmsnap.roles import (
    PATH,
    CaptureRequest,
    DriverContext,
    Hypervisor,
    LoadedVm,
    LoadRequest,
    Option,
    seconds,
    with_defaults,
)
from vmsnap_drivers.hypervisors.simulated import freezing, lifecycle, record
from vmsnap_drivers.hypervisors.simulated.control import Control, NoAnswer, Reply
from vmsnap_drivers.hypervisors.simulated.duplicates import DuplicateFolder, duplicates_in
from vmsnap_drivers.hypervisors.simulated.loading import plan_loading
from vmsnap_drivers.hypervisors.simulated.process import start_process

VERSION = "1"
REGION = "ram"
NIC = "nic0"
_FORK_SECONDS = 0.0005
_FORK_SECONDS_PER_GIB = 0.02
_POLL_SECONDS = 0.001
_TIMEOUT = seconds()
_BEATS = 2
"""How often a guest must have counted to be taken for alive."""
_STATES = {
    "executing": VmState.EXECUTING,
    "stopped": VmState.STOPPED,
    "ended": VmState.ENDED,
    "fault": VmState.ENDED,
}


class SimulatedHypervisor(Hypervisor):
    """One simulated VM, over its control socket. Disks in use can be held by overlays.

    A guest whose RAM and disks disagree has faulted: its state is `VmState.ENDED`, and `describe` says why in its
    refusals. A VM that has ended keeps its process until it is destroyed or stopped.
    """

    name = "simulated"
    freezes = True
    options = (
        Option("socket", "path of the VM's control socket; without it the VM is found by its name", type=PATH),
        Option("timeout", "after how long a call that the VM does not answer is given up", "5", type=_TIMEOUT),
    )

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        """Remember name, context and checked options; no I/O."""
        super().__init__(vm, context, options)
        socket = options.get("socket")
        self.socket = Path(socket).absolute() if socket else lifecycle.socket_of(context.state_dir, vm)
        self._timeout = _TIMEOUT.read(with_defaults(self.options, options)["timeout"])
        self._pause_timeout = self._timeout
        self._control = Control(self.socket)
        self._request: CaptureRequest | None = None
        self._epoch: int | None = None

    def _call(self, name: str, timeout_seconds: float | None = None, **arguments: Any) -> Reply:
        return self._control.call(name, timeout_seconds or self._timeout, **arguments)

    # -- asking

    def describe(self) -> VmDescription:
        """Ask the VM; see the role."""
        if record.read(self.socket) is None:
            raise UnknownVm(f"no simulated VM {self.vm!r} is at {self.socket}", cure="see: vmsnap-sim list")
        status = self._call("status")
        memory_bytes = int(status["memory_bytes"])
        return VmDescription(
            vm=self.vm,
            hypervisor=self.name,
            state=_STATES[status["state"]],
            memory_bytes=memory_bytes,
            vcpus=1,
            memory=(MemoryRegion(REGION, memory_bytes),),
            disks=tuple(_disk(disk) for disk in status["disks"]),
            nics=(_nic(status["nic"]),),
            definition={
                "format": 1,
                "memory_bytes": memory_bytes,
                "ticks_per_second": status["ticks_per_second"],
                "disks": [
                    {key: disk[key] for key in ("device", "size_bytes", "read_only")} for disk in status["disks"]
                ],
                "nic": {"mac": status["nic"]["mac"], "bridge": status["nic"]["bridge"]},
            },
            refusals=_refusals(status),
            hypervisor_version=VERSION,
        )

    def state(self) -> VmState:
        """Ask what the VM does now.

        :raises HypervisorError: its process lives and does not answer: not the same as absent
        """
        try:
            return _STATES[self._call("status")["state"]]
        except VmGone:
            return VmState.ABSENT

    def list_vms(self) -> Sequence[str]:
        """The simulated VMs of this state folder that live."""
        folder = lifecycle.run_folder(self.context.state_dir)
        return [entry.vm for path, entry in record.records_in(folder) if record.alive(path)]

    def doctor(self) -> Sequence[Finding]:
        """Look whether simulated VMs can run and be captured here."""
        findings = []
        for what, folder in (("state folder", self.context.state_dir), ("memory folder", self.context.memory_dir)):
            usable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
            findings.append(
                Finding(what, "ok", str(folder))
                if usable
                else Finding(what, "missing", f"{folder} cannot be written", f"make it: mkdir -m 700 -p {folder}")
            )
        if record.alive(self.socket):
            findings.append(self._doctor_vm())
        return findings

    def _doctor_vm(self) -> Finding:
        try:
            status = self._call("status")
        except HypervisorError as e:
            return Finding(f"VM {self.vm}", "missing", str(e), f"end it: vmsnap-sim stop --force {self.vm}")
        fault = status["fault"]
        return Finding(f"VM {self.vm}", "missing" if fault else "ok", fault or str(status["state"]))

    # -- capturing

    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        """By fork, always; see the role."""
        status = self._call("status")
        refusals = _refusals(status)
        if refusals:
            raise CannotCapture(f"{self.vm}: {refusals[0]}")
        memory_bytes = int(status["memory_bytes"])
        self._root_with_room(memory_bytes)
        predicted = _FORK_SECONDS + memory_bytes / (1 << 30) * _FORK_SECONDS_PER_GIB
        return CapturePlan("fork", disks_first=False, predicted_pause_seconds=predicted, reason="the only way it has")

    def _root_with_room(self, memory_bytes: int) -> Path:
        budget = self.context.memory_budget_bytes
        taken = sum(duplicate.copied_bytes() for duplicate, _ in duplicates_in(self.context.memory_dir))
        free = _free_bytes(self.context.memory_dir)
        if memory_bytes <= free and (budget is None or memory_bytes <= budget - taken):
            return self.context.memory_dir
        spool = self.context.spool_dir
        if spool is not None and memory_bytes <= _free_bytes(spool):
            return spool
        raise StorageFull(
            f"{self.vm}: no room for {memory_bytes} bytes of RAM in {self.context.memory_dir}",
            cure="discard duplicates, raise the memory budget, or allow a spool folder",
        )

    def prepare(self, request: CaptureRequest, plan: CapturePlan) -> None:
        """Make the duplicate's folder, and flush the disks so that the pause has little to flush."""
        status = self._call("status")
        root = self._root_with_room(int(status["memory_bytes"]))
        DuplicateFolder(root / check_name(request.duplicate, "duplicate name")).create(self.vm)
        self._request = request
        self._pause_timeout = min(self._timeout, request.max_pause_seconds)
        self._call("flush")

    def pause(self) -> Moment:
        """Stop the vCPU; see the role."""
        self._epoch = None
        try:
            reply = self._call("pause", self._pause_timeout)
        except NoAnswer as e:
            self._resume_if_paused()
            raise PauseExceeded(f"{self.vm} did not stop within {self._pause_timeout:g} s; it runs") from e
        self._epoch = int(reply["epoch"])
        return _moment(reply, "PAUSE")

    def _resume_if_paused(self) -> None:
        # a pause that came too late for its answer; one that is still waiting was dropped with the connection
        if self._call("status")["paused"]:
            self._call("resume")

    def duplicate(self) -> Duplicate:
        """Fork the VM; see the role."""
        if self._request is None or self._epoch is None:
            raise HypervisorError(f"{self.vm}: duplicate without prepare and pause")
        place = self._find(self._request.duplicate)
        reply = self._call("duplicate", self._pause_timeout, folder=str(place.path), epoch=self._epoch)
        return Duplicate(
            name=self._request.duplicate,
            folder=place.path,
            capture="fork",
            instant=_moment(reply, "FORK"),
            images=(RamImage(REGION, int(reply["memory_bytes"]), place.ram_image),),
            device_state=place.device_state,
            details={"epoch": self._epoch},
        )

    def resume(self) -> Moment:
        """Let the vCPU run; see the role.

        :raises HypervisorError: it runs, but did so in between as well: what was captured is not of one instant
        """
        epoch, self._epoch = self._epoch, None
        reply = self._call("resume")
        if epoch is not None and int(reply["epoch"]) != epoch:
            raise HypervisorError(f"{self.vm} was resumed by somebody else while it was being captured")
        return _moment(reply, "RESUME")

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        """Wait for the fork that copies; gives up when it makes no progress for as long as a call may take."""
        place = DuplicateFolder(duplicate.folder)
        copied, since = -1, time.monotonic()
        # until the process that copies has ended too, so that nothing of it is left
        while place.filling() or not place.device_state.exists():
            now_copied = place.copied_bytes()
            if now_copied != copied:
                copied, since = now_copied, time.monotonic()
                progress(copied)
            if not place.filling() and not place.device_state.exists():
                raise HypervisorError(f"duplicate {duplicate.name!r} was not copied: {place.failure()}")
            if time.monotonic() - since > self._timeout:
                raise HypervisorError(f"duplicate {duplicate.name!r}: no progress for {self._timeout:g} s")
            time.sleep(_POLL_SECONDS)
        place.finish()
        copied = place.copied_bytes()
        progress(copied)
        self._request = None
        return dataclasses.replace(duplicate, details={**(duplicate.details or {}), "copied_bytes": copied})

    def abandon(self) -> None:
        """Drop what waits in the VM, and remove this VM's unfinished duplicates; see the role."""
        self._request, self._epoch = None, None
        # one that cannot answer has forgotten the capture when it can: its folder is gone then
        with contextlib.suppress(VmGone, NoAnswer):
            self._call("abandon")
        for root in self._roots():
            for duplicate, vm in duplicates_in(root):
                if vm == self.vm and not duplicate.finished:
                    duplicate.remove(self._timeout)

    def discard_duplicate(self, name: str) -> None:
        """Remove the duplicate of that name; see the role."""
        check_name(name, "duplicate name")
        for root in self._roots():
            DuplicateFolder(root / name).remove(self._timeout)

    def _roots(self) -> Sequence[Path]:
        spool = self.context.spool_dir
        return [self.context.memory_dir] if spool is None else [self.context.memory_dir, spool]

    def _find(self, name: str) -> DuplicateFolder:
        places = [DuplicateFolder(root / name) for root in self._roots()]
        found = [place for place in places if place.marker() is not None]
        if not found:
            raise HypervisorError(f"duplicate {name!r} was not prepared")
        return found[0]

    # -- holding disks

    def plan_freeze(self, disks: Sequence[Disk], tag: str) -> FreezePlan:
        """An overlay beside each disk; see the role."""
        return freezing.plan(self.vm, disks, tag, self._freezes)

    def prepare_freeze(self, plan: FreezePlan) -> None:
        """Make the overlays; see the role."""
        freezing.prepare(plan)

    def freeze_disks(self, plan: FreezePlan) -> Moment:
        """Let the guest write to them; see the role."""
        return freezing.freeze(plan, self._call)

    def check_frozen(self, plan: FreezePlan) -> None:
        """Ask the VM; see the role."""
        freezing.check(plan, self._call)

    def thaw_disks(self, plan: FreezePlan) -> None:
        """Put the overlays back, with or without the VM; see the role."""
        freezing.thaw(plan, self._call, self.socket)

    def thaw_owned(self, owned: OwnedResource) -> None:
        """Thaw by the record of the plan; its VM is the one that has the disks. See the role."""
        plan = freezing.plan_of(owned, self._freezes)
        if plan is not None:
            SimulatedHypervisor(plan.vm, self.context, {"socket": self._socket_of(plan.vm)}).thaw_disks(plan)

    def _socket_of(self, vm: str) -> str:
        places = record.records_in(lifecycle.run_folder(self.context.state_dir))
        found = [path for path, entry in places if entry.vm == vm]
        return str(found[0] if found else lifecycle.socket_of(self.context.state_dir, vm))

    @property
    def _freezes(self) -> Path:
        return self.context.state_dir / self.name / freezing.FOLDER

    # -- bringing back

    def duplicate_options(self) -> Mapping[str, str]:
        """How long an answer is waited for."""
        return {"timeout": f"{self._timeout:g}"}

    def load(self, request: LoadRequest) -> LoadedVm:
        """Start a new process from the images; see the role. What a dead VM left at the socket is replaced always."""
        if record.alive(self.socket):
            raise AlreadyExists(f"a simulated VM {self.vm!r} exists at {self.socket}")
        start_process(plan_loading(self.vm, self.socket, self.context.state_dir, request))
        return LoadedVm(self.vm, {"socket": str(self.socket)})

    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        """Connect other images, and ask afterwards; see the role."""
        wanted = [{"device": disk.device, "path": disk.address, "read_only": disk.read_only} for disk in disks]
        self._call("switch_disks", disks=wanted)
        have = tuple(_disk(disk) for disk in self._call("status")["disks"])
        allowed = {(disk.device, disk.address) for disk in disks}
        for disk in have:
            if not disk.read_only and (disk.device, disk.address) not in allowed:
                raise HypervisorError(f"{self.vm} still has {disk.address} as {disk.device}")
        return have

    def cut_network(self) -> tuple[Nic, ...]:
        """Unplug the network interface, and ask afterwards; see the role."""
        self._call("cut_network")
        nic = _nic(self._call("status")["nic"])
        if nic.connected:
            raise HypervisorError(f"{self.vm}: {nic.device} is still connected to {nic.network}")
        return (nic,)

    def shut_down(self, timeout_seconds: float) -> None:
        """Press the power button and wait; see the role."""
        lifecycle.wait_for_shut_down(self.socket, timeout_seconds)

    def fence(self, *, kill: bool = False) -> str:
        """Ask the kernel who holds the lock of the VM's record: a simulated VM has it as long as it lives."""
        if kill:
            self.close()
            lifecycle.kill_process(self.socket, self._timeout)
        found = record.read(self.socket)
        if record.alive(self.socket):
            who = f"process {found.pid}" if found is not None else "its process"
            raise Busy(f"VM {self.vm!r} lives: {who} holds its record", cure="end it first")
        was = f", process {found.pid} is gone" if found is not None else ""
        return f"nobody holds the record of {self.vm} at {self.socket}{was}"

    def await_life(self, seconds: float) -> str:
        """See the guest count on twice, its RAM and disks in agreement; see the role."""
        deadline = time.monotonic() + seconds
        first = status = self._call("status")
        while status["counter"] < first["counter"] + _BEATS:
            if status["state"] != "executing":
                raise HypervisorError(f"{self.vm} is {status['state']}: {status['fault'] or 'it does not execute'}")
            if time.monotonic() > deadline:
                raise HypervisorError(f"the guest of {self.vm} did not count on within {seconds:g} s")
            time.sleep(_POLL_SECONDS)
            status = self._call("status")
        fault = self._call("check")["fault"]
        if fault:
            raise HypervisorError(f"the guest of {self.vm} has faulted: {fault}")
        return f"it counted on from {first['counter']} to {status['counter']}, its RAM and disks agree"

    def destroy(self) -> None:
        """End the process of a loaded VM; see the role."""
        self.close()
        found = record.read(self.socket)
        if found is not None and not found.loaded:
            raise HypervisorError(f"{self.vm} was not loaded by vmsnap", cure=f"end it: vmsnap-sim stop {self.vm}")
        if found is not None or record.alive(self.socket):
            lifecycle.end_process(self.socket, self._timeout)

    def list_owned(self) -> Sequence[OwnedResource]:
        """Duplicates and loaded VMs; both carry their own name as the tag."""
        owned = [
            OwnedResource("duplicate", duplicate.path.name, duplicate.path.name, self.name)
            for root in self._roots()
            for duplicate, _ in duplicates_in(root)
        ]
        entries = dict(record.records_in(lifecycle.run_folder(self.context.state_dir)))
        here = record.read(self.socket)
        if here is not None:
            entries[self.socket] = here
        owned += [OwnedResource("vm", entry.vm, entry.vm, self.name) for entry in entries.values() if entry.loaded]
        return owned + freezing.list_owned(self.name, self._freezes)

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._control.close()


def _disk(disk: Reply) -> Disk:
    # "plain_file" tells mechanisms that the file holds everything while the VM is paused, and may be copied then
    return Disk(
        device=disk["device"],
        address=disk["path"],
        size_bytes=disk["size_bytes"],
        format="raw",
        read_only=disk["read_only"],
        handle={"plain_file": "yes"},
    )


def _nic(nic: Reply) -> Nic:
    return Nic(NIC, nic["mac"], f"bridge:{nic['bridge']}", nic["connected"])


def _refusals(status: Reply) -> tuple[str, ...]:
    if status["fault"]:
        return (f"the guest has faulted: {status['fault']}",)
    if status["state"] == "ended":
        return ("the guest has shut down",)
    return ()


def _moment(reply: Reply, event: str) -> Moment:
    return Moment(event.lower(), reply["wall_ns"], reply["monotonic_ns"], f"simulated:{event}")


def _free_bytes(folder: Path) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize
