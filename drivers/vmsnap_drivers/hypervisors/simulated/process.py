"""How the process of a simulated VM comes into being: forked off twice, so that it outlives whoever asked for it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmsnap import errors
from vmsnap.errors import HypervisorError, VmsnapError
from vmsnap_drivers.hypervisors.simulated import record
from vmsnap_drivers.hypervisors.simulated.bridge import BridgePort
from vmsnap_drivers.hypervisors.simulated.control import bind_in_folder
from vmsnap_drivers.hypervisors.simulated.disks import DiskImage, Disks
from vmsnap_drivers.hypervisors.simulated.guest import Guest
from vmsnap_drivers.hypervisors.simulated.machine import EXECUTING, STOPPED, Hardware, Machine
from vmsnap_drivers.hypervisors.simulated.serving import ControlServer

START_SECONDS = 10.0


@dataclass(frozen=True)
class MachinePlan:
    """What a new machine is to be. `guest` puts the guest into the machine: boots it, or loads its RAM."""

    vm: str
    socket_path: Path
    disks: tuple[DiskImage, ...]
    guest: Callable[[Disks], Guest]
    mac: str
    bridge: Path
    connected: bool
    ticks_per_second: float
    loaded: bool


def start_process(plan: MachinePlan) -> None:
    """Start the machine as a process of its own; it answers on its socket when this returns.

    A booted machine executes, a loaded one is stopped.

    :raises AlreadyExists: a VM has that name
    :raises HypervisorError: it did not come up; nothing of it is left
    """
    plan.socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    news, report = os.pipe2(os.O_CLOEXEC)
    with warnings.catch_warnings():
        # the fork uses nothing that another thread of ours could hold: it never logs, imports or prints
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _detach_and_run(plan, report)
    os.close(report)
    try:
        os.waitpid(child, 0)
        text = _read_all(news, START_SECONDS)
    finally:
        os.close(news)
    if not text:
        raise HypervisorError(f"the process of simulated VM {plan.vm!r} ended while it started")
    answer = json.loads(text)
    if "error" in answer:
        kind = getattr(errors, answer["error"], HypervisorError)
        raise kind(answer["message"])


def _read_all(descriptor: int, timeout_seconds: float) -> bytes:
    deadline = time.monotonic() + timeout_seconds
    text = b""
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(descriptor, 65536)
        if not data:
            return text
        text += data
    raise HypervisorError(f"the simulated VM did not come up within {timeout_seconds:g} s")


def _detach_and_run(plan: MachinePlan, report: int) -> None:
    # whatever happens, this copy of the caller never returns into the caller's code
    try:
        os.setsid()
        if os.fork() == 0:
            _run(plan, _leave_everything(report))
        os._exit(0)
    finally:
        os._exit(1)


def _leave_everything(report: int) -> int:
    """Let go of everything that was the caller's, but the pipe; returns where that is now."""
    # Of the caller's objects none is ever collected here: a socket among them would close whatever has its number now.
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.set_wakeup_fd(-1)
    os.chdir("/")
    os.umask(0o077)
    os.dup2(report, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    os.set_inheritable(3, False)
    return 3


def _run(plan: MachinePlan, report: int) -> None:
    try:
        try:
            machine = _build(plan)
        except VmsnapError as e:
            os.write(report, json.dumps({"error": type(e).__name__, "message": str(e)}).encode())
            os._exit(1)
        except (OSError, ValueError) as e:
            message = f"simulated VM {plan.vm!r} did not come up: {e}"
            os.write(report, json.dumps({"error": "HypervisorError", "message": message}).encode())
            os._exit(1)
        os.write(report, b"{}")
        os.close(report)
        machine.run()
        os._exit(0)
    finally:
        with contextlib.suppress(OSError):
            record.log_path(plan.socket_path).write_text(traceback.format_exc())
        os._exit(1)


def _build(plan: MachinePlan) -> Machine:
    descriptor = record.claim(plan.socket_path)
    port: BridgePort | None = None
    try:
        disks = Disks(plan.disks)
        guest = plan.guest(disks)
        port = BridgePort(plan.vm, plan.mac, plan.bridge, connected=plan.connected)
        plan.socket_path.unlink(missing_ok=True)
        listener = bind_in_folder(plan.socket_path, socket.SOCK_STREAM)
        listener.listen(16)
        own = record.Record(plan.vm, os.getpid(), plan.loaded, str(plan.bridge / plan.vm))
        record.write(descriptor, own)
    except (VmsnapError, OSError, ValueError):
        if port is not None:
            port.cut()
        record.remove(plan.socket_path, "")
        raise
    hardware = Hardware(
        plan.vm,
        guest,
        disks,
        port,
        plan.ticks_per_second,
        plan.loaded,
        plan.socket_path,
        ControlServer(listener),
        descriptor,
    )
    return Machine(hardware, STOPPED if plan.loaded else EXECUTING)
