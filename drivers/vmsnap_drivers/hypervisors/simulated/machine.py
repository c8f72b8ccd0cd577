"""The process of a simulated VM: one loop that runs the guest's cycles and answers its control socket."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsnap.errors import HypervisorError, VmGone
from vmsnap_drivers.hypervisors.simulated import record
from vmsnap_drivers.hypervisors.simulated.bridge import BridgePort
from vmsnap_drivers.hypervisors.simulated.disks import DiskImage, Disks
from vmsnap_drivers.hypervisors.simulated.duplicates import (
    FAILURE,
    DuplicateFolder,
    announce,
    copy_into,
    lock_for_copying,
)
from vmsnap_drivers.hypervisors.simulated.guest import Guest
from vmsnap_drivers.hypervisors.simulated.injection import Effect, Fault
from vmsnap_drivers.hypervisors.simulated.serving import ControlServer

EXECUTING, STOPPED, ENDED, FAULT = "executing", "stopped", "ended", "fault"


@dataclass
class Hardware:
    """What a machine is made of."""

    vm: str
    guest: Guest
    disks: Disks
    port: BridgePort
    ticks_per_second: float
    loaded: bool
    socket_path: Path
    server: ControlServer
    record_descriptor: int


@dataclass
class Machine:
    """A running simulated VM. Single-threaded, so that a fork of it is a whole copy."""

    hardware: Hardware
    state: str
    fault: str = ""
    clean: bool = False
    epoch: int = 0
    """Counts how often it began to execute: what was fixed in one epoch is of one instant."""
    paused: bool = False
    """It stands still because of a `pause` call."""
    just_resumed: bool = False
    powering_down: bool = False
    children: dict[int, str] = field(default_factory=dict)
    quitting: bool = False
    next_cycle: float = 0.0

    # -- the loop

    def run(self) -> None:
        """Live until told to quit."""
        # frozen, so that a later collection does not touch (and so copy) every page that a fork shares
        gc.collect()
        gc.freeze()
        gc.disable()
        while not self.quitting:
            self._wait_and_serve()
            self.hardware.server.answer_delayed(self.perform)
            self._reap()
            if self.state == EXECUTING and time.monotonic() >= self.next_cycle:
                self._cycle()
        self.hardware.port.cut()
        self.hardware.disks.close()
        record.remove(self.hardware.socket_path, "")

    def _cycle_seconds(self) -> float:
        return 1.0 / (self.hardware.ticks_per_second * (len(self.hardware.disks.all) + 1))

    def _timeout(self) -> float | None:
        now = time.monotonic()
        times = self.hardware.server.due()
        if self.state == EXECUTING:
            times.append(self.next_cycle)
        if self.children:
            times.append(now + 0.01)
        return max(0.0, min(times) - now) if times else None

    def _wait_and_serve(self) -> None:
        port = self.hardware.port.socket
        waiting: list[int] = self.hardware.server.descriptors()
        # a stopped machine's card takes nothing in, as its driver does not run
        if port is not None and self.state == EXECUTING:
            waiting.append(port.fileno())
        readable, _, _ = select.select(waiting, [], [], self._timeout())
        if port is not None and port.fileno() in readable:
            self.hardware.port.receive()
        self.hardware.server.serve(readable, self.perform)

    def _cycle(self) -> None:
        guest = self.hardware.guest
        now = time.monotonic()
        self.next_cycle = max(self.next_cycle + self._cycle_seconds(), now)
        try:
            if guest.step == 0 or self.just_resumed:
                self.just_resumed = False
                self.fault = guest.quick_check() if guest.fully_checked else guest.full_check()
                if self.fault:
                    self.state = FAULT
                    return
            if guest.step == 0 and self.powering_down:
                guest.power_down()
                self._end()
                return
            if guest.cycle():
                self.hardware.port.broadcast(guest.counter)
        except OSError as e:
            self.fault, self.state = f"I/O error: {e}", FAULT

    def _end(self) -> None:
        self.clean, self.state = True, ENDED
        self.hardware.port.cut()
        self.hardware.disks.unlock()

    def _reap(self) -> None:
        for pid in list(self.children):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self.children[pid]

    # -- answering

    def perform(self, call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command; returns the reply."""
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "status": self.status,
            "check": self.check,
            "flush": self.flush,
            "pause": self.pause,
            "resume": self.resume,
            "duplicate": self.duplicate,
            "abandon": self.abandon,
            "freeze": self.freeze,
            "thaw": self.thaw,
            "switch_disks": self.switch_disks,
            "cut_network": self.cut_network,
            "shut_down": self.shut_down,
            "inject": self.inject,
            "quit": self.quit,
        }
        if call not in commands:
            return {"error": f"unknown command {call!r}"}
        try:
            return {"ok": commands[call](**arguments)}
        except HypervisorError as e:
            return {"error": e.message, "gone": isinstance(e, VmGone)}
        except OSError as e:
            return {"error": str(e)}
        except TypeError as e:
            return {"error": f"wrong arguments: {e}"}

    # -- commands

    def status(self) -> dict[str, Any]:
        """Say everything about this VM."""
        hardware, guest = self.hardware, self.hardware.guest
        return {
            "vm": hardware.vm,
            "pid": os.getpid(),
            "state": self.state,
            "paused": self.paused,
            "fault": self.fault,
            "clean": self.clean,
            "loaded": hardware.loaded,
            "epoch": self.epoch,
            "counter": guest.counter,
            "cycles": guest.cycles,
            "completed": guest.completed(),
            "machine": guest.machine.hex(),
            "memory_bytes": len(guest.ram),
            "ticks_per_second": hardware.ticks_per_second,
            "disks": self._disks(),
            "nic": self._nic(),
        }

    def _disks(self) -> list[dict[str, Any]]:
        return [
            {
                "device": disk.image.device,
                "path": disk.image.path,
                "read_only": disk.image.read_only,
                "size_bytes": disk.size_bytes,
                "overlay": str(disk.overlay.path) if disk.overlay is not None else "",
            }
            for disk in self.hardware.disks.all
        ]

    def _nic(self) -> dict[str, Any]:
        port = self.hardware.port
        return {
            "mac": port.mac,
            "bridge": port.bridge.name,
            "connected": port.connected,
            "sent": port.sent,
            "received": port.received,
        }

    def check(self) -> dict[str, Any]:
        """Let the guest compare all of its RAM and disks now."""
        if self.state in (EXECUTING, STOPPED) and not self.fault:
            self.fault = self.hardware.guest.full_check()
            if self.fault:
                self.state = FAULT
        return {"fault": self.fault}

    def flush(self) -> dict[str, Any]:
        """Flush the disks while the guest runs, so that the flush of a pause has little left to do."""
        self.hardware.disks.flush()
        return {}

    def pause(self) -> dict[str, Any]:
        """Stop the vCPU, complete its writes, flush its disks."""
        was = self.state
        if was not in (EXECUTING, STOPPED):
            raise VmGone(f"the guest has ended ({self.fault or 'shut down'})")
        self.state = STOPPED
        moment = _moment()
        self.paused = self.paused or was == EXECUTING
        try:
            self.hardware.guest.drain()
        except OSError:
            if was == EXECUTING:
                self._execute()
            raise
        return {"was": was, "epoch": self.epoch, **moment}

    def resume(self) -> dict[str, Any]:
        """Let the vCPU run; says in which epoch it stood still before."""
        if self.state not in (EXECUTING, STOPPED):
            raise VmGone(f"the guest has ended ({self.fault or 'shut down'})")
        epoch = self.epoch
        was = self.state
        if was == STOPPED:
            self._execute()
        return {"was": was, "epoch": epoch, **_moment()}

    def _execute(self) -> None:
        self.epoch += 1
        self.paused = False
        self.state = EXECUTING
        # before it writes anything: its next record would hide what was done to the disks meanwhile
        self.just_resumed = True
        self.next_cycle = time.monotonic() + self._cycle_seconds()

    def duplicate(self, folder: str, epoch: int) -> dict[str, Any]:
        """Fork; the fork copies this instant's RAM into `folder` while this process goes on."""
        if self.state != STOPPED or self.epoch != epoch:
            raise HypervisorError("the VM did not stand still since it was paused")
        copying = self.hardware.server.injection.take("copy")
        place = DuplicateFolder(Path(folder))
        marker = lock_for_copying(place)
        moment = _moment()
        try:
            pid = os.fork()
        except OSError:
            os.close(marker)
            raise
        if pid == 0:
            self._copy_and_exit(place, marker, copying)
        os.close(marker)
        self.children[pid] = folder
        return {"memory_bytes": len(self.hardware.guest.ram), **moment}

    def _copy_and_exit(self, place: DuplicateFolder, marker: int, fault: Fault | None) -> None:
        try:
            announce(marker)
            # disks, sockets and the VM's record are the VM's alone: their locks must end with it
            os.dup2(marker, 3)
            os.closerange(4, os.sysconf("SC_OPEN_MAX"))
            if fault is not None and fault.effect in (Effect.HANG, Effect.SLOW):
                time.sleep(fault.seconds or 3600)
            if fault is not None and fault.effect in (Effect.FAIL, Effect.FAIL_AFTER, Effect.DIE):
                raise OSError("injected fault")
            copy_into(place, self.hardware.guest.ram, self._device_state())
            os._exit(0)
        except OSError as e:
            with contextlib.suppress(OSError):
                (place.path / FAILURE).write_text(str(e))
        finally:
            os._exit(1)

    def _device_state(self) -> dict[str, Any]:
        guest = self.hardware.guest
        return {
            "format": 1,
            "machine": guest.machine.hex(),
            "registers": {"cycles": guest.cycles, "step": guest.step},
            "memory_bytes": len(guest.ram),
            "ticks_per_second": self.hardware.ticks_per_second,
            "disks": [disk.image.device for disk in self.hardware.disks.all],
            "nic": {"mac": self.hardware.port.mac, "bridge": self.hardware.port.bridge.name},
        }

    def abandon(self) -> dict[str, Any]:
        """Forget what a capture left waiting here; the execution state stays."""
        return {}

    def freeze(self, overlays: list[dict[str, str]]) -> dict[str, Any]:
        """Hold the disks as they are: the guest writes to overlays from now on."""
        if self.state != STOPPED:
            raise HypervisorError("disks can be frozen only while the VM is stopped")
        moment = _moment()
        self.hardware.disks.freeze(_by_device(overlays))
        return moment

    def thaw(self, overlays: list[dict[str, str]]) -> dict[str, Any]:
        """Put the overlays back, between two cycles of the guest."""
        self.hardware.disks.thaw(_by_device(overlays))
        return {}

    def switch_disks(self, disks: list[dict[str, Any]]) -> dict[str, Any]:
        """Connect other images."""
        if self.state != STOPPED:
            raise HypervisorError("disks can be switched only while the VM is stopped")
        self.hardware.guest.fully_checked = False
        self.hardware.disks.switch([DiskImage(**disk) for disk in disks])
        return {"disks": self._disks()}

    def cut_network(self) -> dict[str, Any]:
        """Unplug the network interface."""
        self.hardware.port.cut()
        return self._nic()

    def shut_down(self) -> dict[str, Any]:
        """Press the power button: the guest shuts itself down at its next tick, unless it is deaf."""
        self.powering_down = not self.hardware.guest.deaf
        return {}

    def inject(self, **fault: Any) -> dict[str, Any]:
        """Arm a fault; see `Injection.arm`."""
        self.hardware.server.injection.arm(**fault)
        return {}

    def quit(self) -> dict[str, Any]:
        """End the process after the answer; what the guest did not flush is lost."""
        self.quitting = True
        return {}


def _by_device(overlays: list[dict[str, str]]) -> dict[str, Path]:
    return {overlay["device"]: Path(overlay["path"]) for overlay in overlays}


def _moment() -> dict[str, int]:
    return {"wall_ns": time.time_ns(), "monotonic_ns": time.monotonic_ns()}


def anonymous_ram(size_bytes: int) -> mmap.mmap:
    """RAM of its own, zeroed."""
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
