"""Starting, stopping and listing simulated VMs; what ``vmsnap-sim`` offers."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import AlreadyExists, HypervisorError, UnknownVm, UsageError, VmGone
from vmsnap.model import check_name
from vmsnap.roles import LoadedVm
from vmsnap_drivers.hypervisors.simulated import record
from vmsnap_drivers.hypervisors.simulated.control import NoAnswer, ask
from vmsnap_drivers.hypervisors.simulated.disks import DiskImage
from vmsnap_drivers.hypervisors.simulated.guest import Guest
from vmsnap_drivers.hypervisors.simulated.layout import MAX_DISKS, MIN_DISK_BYTES, MIN_MEMORY_BYTES, PAGE
from vmsnap_drivers.hypervisors.simulated.machine import anonymous_ram
from vmsnap_drivers.hypervisors.simulated.process import MachinePlan, start_process

DEFAULT_TICKS_PER_SECOND = 100.0
DEFAULT_BRIDGE = "br0"
_POLL_SECONDS = 0.001


@dataclass(frozen=True)
class ListedVm:
    """One simulated VM: its state is a `Machine` state, or ``dead`` when its process was killed."""

    vm: str
    state: str
    socket: Path
    loaded: bool


def run_folder(state_dir: Path) -> Path:
    """Where the sockets and records of the VMs of this state folder lie."""
    return state_dir / "simulated" / "vmsnap-sim"


def socket_of(state_dir: Path, vm: str) -> Path:
    """Where a VM's socket lies when nothing else was said."""
    return run_folder(state_dir) / (check_name(vm, "VM name") + record.SOCKET_SUFFIX)


def bridge_folder(state_dir: Path, bridge: str) -> Path:
    """Where a bridge of this state folder lies."""
    return state_dir / "simulated" / "bridges" / check_name(bridge, "bridge name")


def start(
    name: str,
    memory_bytes: int,
    disks: Sequence[int | Path],
    folder: Path,
    *,
    state_dir: Path,
    socket: Path | None = None,
    bridge: str = DEFAULT_BRIDGE,
    ticks_per_second: float = DEFAULT_TICKS_PER_SECOND,
    deaf: bool = False,
) -> LoadedVm:
    """Start a simulated VM as a process of its own and let it execute.

    Each disk is a size in bytes (a sparse image ``NAME-diskN.img`` is made in `folder`) or the path of an image,
    blank or a simulated guest's. The VM is found by its name, or by `socket`. A `deaf` guest ignores its power button.

    :raises UsageError: a size that cannot be
    :raises AlreadyExists: a VM of that name, or an image to be made
    :raises HypervisorError: it did not come up; nothing of it is left
    """
    socket_path = socket.absolute() if socket is not None else socket_of(state_dir, name)
    _check_sizes(check_name(name, "VM name"), memory_bytes, disks, ticks_per_second)
    if record.alive(socket_path):
        raise AlreadyExists(f"a simulated VM exists at {socket_path}")
    made: list[Path] = []
    try:
        images = []
        for index, disk in enumerate(disks):
            path = (folder / f"{name}-disk{index}.img" if isinstance(disk, int) else disk).absolute()
            if isinstance(disk, int):
                _make_image(path, disk)
                made.append(path)
            images.append(DiskImage(f"disk{index}", str(path)))
        plan = MachinePlan(
            vm=name,
            socket_path=socket_path,
            disks=tuple(images),
            guest=lambda opened: Guest.boot(anonymous_ram(memory_bytes), opened, deaf=deaf),
            mac=_random_mac(),
            bridge=bridge_folder(state_dir, bridge).absolute(),
            connected=True,
            ticks_per_second=ticks_per_second,
            loaded=False,
        )
        start_process(plan)
    except (HypervisorError, AlreadyExists, UsageError):
        for path in made:
            path.unlink()
        raise
    return LoadedVm(name, {"socket": str(socket_path)})


def _check_sizes(name: str, memory_bytes: int, disks: Sequence[int | Path], ticks_per_second: float) -> None:
    if memory_bytes < MIN_MEMORY_BYTES or memory_bytes % PAGE:
        raise UsageError(f"memory of {name}: a multiple of {PAGE} bytes, at least {MIN_MEMORY_BYTES}")
    if not 1 <= len(disks) <= MAX_DISKS:
        raise UsageError(f"disks of {name}: 1 to {MAX_DISKS}")
    for disk in disks:
        if isinstance(disk, int) and (disk < MIN_DISK_BYTES or disk % PAGE):
            raise UsageError(f"disks of {name}: a multiple of {PAGE} bytes each, at least {MIN_DISK_BYTES}")
    if not 0 < ticks_per_second <= 10000:
        raise UsageError(f"ticks of {name}: more than 0 and at most 10000 a second")


def _make_image(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"{path} exists", cure="give its path as the disk to use it") from None
    except OSError as e:
        raise HypervisorError(f"cannot make {path}: {e.strerror}") from e
    os.ftruncate(descriptor, size_bytes)
    os.close(descriptor)


def _random_mac() -> str:
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in os.urandom(3))


def stop(socket_path: Path, timeout_seconds: float = 10.0, *, force: bool = False) -> None:
    """Shut a VM's guest down in order, and end its process; at once with `force`. Its images stay.

    :raises UnknownVm: there is none
    :raises HypervisorError: the guest does not shut down; it goes on
    """
    if not record.alive(socket_path):
        if not clean_up(socket_path):
            raise UnknownVm(f"no simulated VM is at {socket_path}")
        return
    if not force:
        wait_for_shut_down(socket_path, timeout_seconds)
    end_process(socket_path, timeout_seconds)


def wait_for_shut_down(socket_path: Path, timeout_seconds: float) -> None:
    """Press the power button and wait until the guest has shut itself down.

    :raises HypervisorError: it did not in time, or ended in another way
    """
    deadline = time.monotonic() + timeout_seconds
    status = ask(socket_path, "status", timeout_seconds)
    if status["state"] in ("executing", "stopped"):
        ask(socket_path, "shut_down", timeout_seconds)
    while status["state"] in ("executing", "stopped"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise HypervisorError(f"the guest of {status['vm']!r} did not shut down within {timeout_seconds:g} s")
        time.sleep(_POLL_SECONDS)
        status = ask(socket_path, "status", left)
    if not status["clean"]:
        raise HypervisorError(f"the guest of {status['vm']!r} ended in another way: {status['fault']}")


def end_process(socket_path: Path, timeout_seconds: float) -> None:
    """End a VM's process, by a signal where it does not answer, and remove what it leaves; idempotent.

    :raises HypervisorError: it does not end
    """
    with contextlib.suppress(VmGone, HypervisorError):
        ask(socket_path, "quit", min(1.0, timeout_seconds))
    deadline = time.monotonic() + timeout_seconds
    polite = time.monotonic() + min(0.2, timeout_seconds)
    while record.alive(socket_path):
        found = record.read(socket_path)
        if found is not None and time.monotonic() > polite and record.alive(socket_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise HypervisorError(f"the process of the VM at {socket_path} does not end")
        time.sleep(_POLL_SECONDS)
    clean_up(socket_path)


def kill_process(socket_path: Path, timeout_seconds: float) -> None:
    """Kill a VM's process, whatever it does, and wait until it is gone; what it leaves stays. Idempotent.

    :raises HypervisorError: it does not end
    """
    deadline = time.monotonic() + timeout_seconds
    while record.alive(socket_path):
        found = record.read(socket_path)
        if found is not None and record.alive(socket_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise HypervisorError(f"the process of the VM at {socket_path} does not end")
        time.sleep(_POLL_SECONDS)


def clean_up(socket_path: Path) -> bool:
    """Remove what a VM that was killed left; returns whether there was anything."""
    found = record.read(socket_path)
    if record.alive(socket_path):
        return False
    left = found is not None or socket_path.exists()
    record.remove(socket_path, found.port if found is not None else "")
    return left


def list_vms(state_dir: Path) -> list[ListedVm]:
    """The simulated VMs of this state folder, in the order of their names."""
    found = []
    for socket_path, entry in record.records_in(run_folder(state_dir)):
        state = "dead"
        if record.alive(socket_path):
            try:
                state = str(ask(socket_path, "status", 1.0)["state"])
            except (NoAnswer, VmGone):
                state = "unreachable"
        found.append(ListedVm(entry.vm, state, socket_path, entry.loaded))
    return found
