"""Which process a VM was when it was last captured, written down so that it can be shown to be gone."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk, check_name, to_json
from vmsnap_drivers.qemu.peer import boot_id, start_time
from vmsnap_drivers.qemu.smallfile import read_whole, write_whole


@dataclass(frozen=True)
class ProcessRecord:
    """The QEMU process of a VM.

    :ivar boot: the start of the host in which it ran
    :ivar disks: the image files that it wrote to
    """

    vm: str
    boot: str
    pid: int
    pid_started: int
    socket: str
    disks: tuple[str, ...]


def note(folder: Path, vm: str, pid: int, socket: str, disks: Sequence[Disk]) -> None:
    """Write down that the process `pid` is the VM, in place of what was written before; `folder` is what the driver has
    for its state.

    :raises HypervisorError: it cannot be written
    """
    written = tuple(disk.address for disk in disks if not disk.read_only and disk.address.startswith("/"))
    record = ProcessRecord(vm, boot_id(), pid, start_time(pid) or 0, socket, written)
    path = _place(folder, vm)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, to_json(record))
    except OSError as e:
        raise HypervisorError(f"{path} cannot be written: {e.strerror}") from e


def read(folder: Path, vm: str) -> ProcessRecord | None:
    """What was written down of the VM; None where nothing was.

    :raises HypervisorError: it is damaged
    """
    return read_whole(_place(folder, vm), ProcessRecord, "the record of a VM's process")


def read_all(state_dir: Path) -> list[ProcessRecord]:
    """What was written down of the VMs of all drivers.

    :raises HypervisorError: something is damaged
    """
    found = [read(path.parent.parent, path.stem) for path in sorted(state_dir.glob("*/processes/*.json"))]
    return [record for record in found if record is not None]


def _place(folder: Path, vm: str) -> Path:
    return folder / "processes" / f"{check_name(vm, 'VM name')}.json"


class Process:
    """A process held by a descriptor (pidfd_open(2)): it cannot be taken for another one of the same number later."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor

    def has_ended(self, timeout_seconds: float = 0.0) -> bool:
        """Wait for its end; says whether all of its threads have ended."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(timeout_seconds * 1000))

    def kill(self, timeout_seconds: float) -> None:
        """Kill it and wait until it has ended.

        :raises HypervisorError: it may not be killed, or does not end
        """
        try:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError as e:
            raise HypervisorError(f"process {self.pid} cannot be killed by this user", cure="run vmsnap as root") from e
        if not self.has_ended(timeout_seconds):
            raise HypervisorError(
                f"process {self.pid} was killed and does not end: most likely it waits for its storage",
                cure="see what its disks hang on, or start the host anew",
            )


@contextmanager
def held(pid: int) -> Iterator[Process | None]:
    """The process of that number, held; None where there is none.

    :raises HypervisorError: the host's kernel cannot hold processes (Linux before 5.3)
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    except OSError as e:
        raise HypervisorError(f"process {pid} cannot be looked at: {e.strerror}") from e
    try:
        yield Process(pid, descriptor)
    finally:
        os.close(descriptor)
