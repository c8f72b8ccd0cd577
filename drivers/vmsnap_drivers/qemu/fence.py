"""Proves that a VM does not run, so that another machine may take its place.

Three things are looked at, and all must be so: the process that the VM was has ended (all its threads; a zombie whose
threads still write has not), nobody listens on its QMP socket, and nobody holds QEMU's lock for writing on any of its
disks (``block/file-posix.c``: byte 100 + permission; writing is permission 1). A host that was started again since is
as good as the first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import Busy, HypervisorError, VmGone
from vmsnap_drivers.qemu.peer import boot_id, listener, look_at, start_time
from vmsnap_drivers.qemu.process import Process, ProcessRecord, held

_KILL_SECONDS: Final = 30.0
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_WRITING_BYTE: Final = 101
_CURE: Final = "let it run, or kill it with --fence"


def fence(vm: str, socket: Path, known: Sequence[ProcessRecord], *, kill: bool) -> str:
    """Prove it; `known` is what was written down of the VM's processes. See `Hypervisor.fence`.

    :raises Busy: it lives, and `kill` is not set
    :raises HypervisorError: it cannot be shown
    """
    # What was written down of another VM, that had the name before, tells nothing of this one.
    records = {record.pid: record for record in known if record.socket == str(socket.absolute())}
    proofs = [show_ended(vm, record, kill=kill) for record in records.values()]
    listening = listener(socket)
    if listening is not None:
        proofs.append(_end_listener(vm, socket, listening, kill=kill))
    if not proofs:
        raise HypervisorError(
            f"it cannot be shown that VM {vm!r} does not run: nobody listens on {socket}, and it was never captured",
            cure="a VM whose process vmsnap has never seen could run all the same",
        )
    if listener(socket) is not None:
        raise Busy(f"somebody listens on {socket}: VM {vm!r} was started again", cure=_CURE)
    proofs.append(f"nobody listens on {socket}")
    disks = {disk for record in records.values() for disk in record.disks if disk.startswith("/")}
    for disk in sorted(disks):
        if is_written(Path(disk)):
            raise Busy(f"another process has {disk} of VM {vm!r} open for writing", cure="end it first")
    if disks:
        proofs.append(f"nobody writes to its {len(disks)} disk{'s' if len(disks) > 1 else ''}")
    return ", ".join(proofs)


def is_written(path: Path) -> bool:
    """Whether a QEMU, or one of its tools, has an image open for writing. One that is gone is written by nobody that
    another could meet there.

    :raises HypervisorError: it cannot be looked at
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise HypervisorError(f"{path} cannot be looked at: {e.strerror}") from e
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WRITING_BYTE, 1, 0))
    except OSError as e:
        raise HypervisorError(f"the locks of {path} cannot be looked at: {e.strerror}") from e
    finally:
        os.close(fd)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def show_ended(vm: str, known: ProcessRecord, *, kill: bool) -> str:
    """Show that a process that was written down has ended, and say how; with `kill` end it.

    :raises Busy: it lives, and `kill` is not set
    """
    if known.boot != boot_id():
        return "the host was started again since it ran"
    with held(known.pid) as process:
        if process is None or _started(known.pid) != known.pid_started or process.has_ended():
            return f"its process {known.pid} has ended"
        if not kill:
            raise Busy(f"VM {vm!r} is running: its process {known.pid} lives", cure=_CURE)
        process.kill(_KILL_SECONDS)
    return f"its process {known.pid} was killed and has ended"


def _started(pid: int) -> int | None:
    """As `start_time`, and of a zombie too, whose threads may live on."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


def _end_listener(vm: str, socket: Path, pid: int, *, kill: bool) -> str:
    """The socket's listener is a QEMU that we have not seen before, or one that somebody handed the socket to."""
    if not kill:
        raise Busy(f"VM {vm!r} is running: process {pid} listens on {socket}", cure=_CURE)
    with held(pid) as process:
        # It is the one that listens only if it does so still, while we hold it.
        if process is not None and listener(socket) == pid and start_time(pid) is not None:
            _check_is_qemu(process, socket)
            process.kill(_KILL_SECONDS)
    return f"process {pid} was killed and has ended"


def _check_is_qemu(process: Process, socket: Path) -> None:
    try:
        program = Path(look_at(process.pid).exe).name
    except VmGone:
        return
    if not program.startswith(("qemu", "kvm")):
        raise HypervisorError(
            f"the socket {socket} was opened by {program!r} (process {process.pid}), no QEMU, which is not killed",
            cure="end the VM by the program that manages it",
        )
