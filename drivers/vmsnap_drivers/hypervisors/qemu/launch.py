"""Brings a captured machine back: a new QEMU process with its own disks, RAM and files, stopped at the instant.

RAM is not sent: the new process maps the RAM images, and the stream holds what is not RAM. Where a block cannot
be mapped its pages are sent in the stream.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.errors import AlreadyExists, HypervisorError, VmGone, VmsnapError
from vmsnap.model import to_json
from vmsnap.roles import LoadRequest
from vmsnap_drivers.hypervisors.qemu import tpm
from vmsnap_drivers.hypervisors.qemu.definition import DefinedDisk, Definition
from vmsnap_drivers.qemu.device_state import slirp_instances
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import boot_id, listener, start_time
from vmsnap_drivers.qemu.process import ProcessRecord
from vmsnap_drivers.qemu.rewrite import PID_NAME, NewDisk, NewVm, rewrite
from vmsnap_drivers.qemu.smallfile import read_whole, write_whole
from vmsnap_drivers.qemu.stream_format import CapturedMemory
from vmsnap_drivers.qemu.synthesis import gather_images, write_stream

MARK_NAME: Final = "loaded.json"
LOG_NAME: Final = "qemu.log"
_ENVIRONMENT: Final = ("PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "LANG")
_START_SECONDS: Final = 30.0
_LOAD_SECONDS: Final = 600.0
_LOOK_EACH_SECONDS: Final = 0.005
_KILL_SECONDS: Final = 10.0
SMALLEST_MAPPED_BYTES: Final = 16 * 1024 * 1024
"""RAM blocks of this size and more are mapped from their images; smaller ones are sent."""


@dataclass(frozen=True)
class LoadedMark:
    """In the run folder of a VM that we loaded: which process it is, in which start of the host, on which disks."""

    vm: str
    pid: int
    pid_started: int
    socket: str
    notes: tuple[str, ...]
    boot: str = ""
    disks: tuple[str, ...] = ()


def run_folder(state_dir: Path, vm: str) -> Path:
    """The folder of a loaded VM: its sockets, logs and mark."""
    return state_dir / "qemu" / "run" / vm


def read_mark(folder: Path) -> LoadedMark | None:
    """Who lives in a run folder, or None where nobody was loaded into it."""
    return read_whole(folder / MARK_NAME, LoadedMark, "the mark of a loaded VM")


def record_of(mark: LoadedMark) -> ProcessRecord:
    """What is known of the process of a VM that was loaded."""
    return ProcessRecord(mark.vm, mark.boot or boot_id(), mark.pid, mark.pid_started, mark.socket, mark.disks)


def find_unmarked(vm: str, folder: Path, socket_path: str) -> LoadedMark | None:
    """The process of a VM whose loader died before it could leave its mark: its command line names a file of the
    folder, which is nobody else's (`rewrite` sees to that). None where there is none.
    """
    wanted = os.fsencode(folder / PID_NAME)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if wanted in words and int(process.name) != os.getpid():
            pid = int(process.name)
            return LoadedMark(vm, pid, start_time(pid) or 0, socket_path, ())
    return None


def is_alive(mark: LoadedMark) -> bool:
    """Whether the very process of the mark still runs."""
    return start_time(mark.pid) == mark.pid_started


def load(vm: str, folder: Path, qmp_socket: Path, request: LoadRequest) -> LoadedMark:
    """Start the VM, stopped. All or nothing. One that takes over replaces a socket on which nobody listens any more.

    :raises AlreadyExists: a VM of that name lives, or something is at the socket's path
    :raises HypervisorError: it did not come up
    """
    definition = Definition.from_json(request.definition)
    captured = CapturedMemory.from_json(request.details["memory"], device_state=request.device_state)
    old = read_mark(folder)
    if old is not None and is_alive(old):
        raise AlreadyExists(f"a VM {vm!r} runs already (process {old.pid})")
    if request.takeover:
        _remove_stale(qmp_socket)
    if qmp_socket.exists() and qmp_socket.parent != folder:
        raise AlreadyExists(f"there is something at {qmp_socket} already")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, mode=0o700)
    try:
        new = _new_vm(vm, folder, qmp_socket, definition, captured, request)
        rewritten = rewrite(definition.exe, definition.options(), new)
        emulator = tpm.start(definition.tpm, folder, _environment(definition)) if definition.tpm else None
        try:
            process = _start(definition, rewritten.argv, folder)
        except BaseException:
            _end(emulator)
            raise
        try:
            mark = LoadedMark(
                vm,
                process.pid,
                start_time(process.pid) or 0,
                str(qmp_socket),
                tuple(rewritten.notes),
                boot_id(),
                tuple(disk.address for disk in request.disks if not disk.read_only),
            )
            write_whole(folder / MARK_NAME, to_json(mark))
            _bring_in(
                process,
                folder,
                qmp_socket,
                captured,
                gather_images(folder / "images", request.images, list(new.block_sizes), new.images),
                new,
            )
        except BaseException:
            _end(process)
            _end(emulator)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        qmp_socket.unlink(missing_ok=True)
        raise
    # The processes outlive this one; nobody here waits for them any more.
    for child in (process, emulator):
        if child is not None:
            threading.Thread(target=child.wait, name="vmsnap-reaper", daemon=True).start()
    return mark


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()


def destroy(folder: Path, mark: LoadedMark) -> None:
    """End the process of the mark, if it is still that one, and remove the folder. Idempotent.

    :raises HypervisorError: it does not end
    """
    deadline = time.monotonic() + _KILL_SECONDS
    while is_alive(mark):
        try:
            os.kill(mark.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        if time.monotonic() > deadline:
            raise HypervisorError(f"the QEMU process {mark.pid} of VM {mark.vm!r} does not end")
        time.sleep(_LOOK_EACH_SECONDS)
    tpm.end(folder)
    Path(mark.socket).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _new_vm(
    vm: str, folder: Path, qmp_socket: Path, definition: Definition, captured: CapturedMemory, request: LoadRequest
) -> NewVm:
    given = {disk.device: disk for disk in request.disks}
    disks = []
    for disk in definition.disks:
        if disk.read_only:
            _find_read_only(vm, disk)
            continue
        if disk.device not in given:
            raise HypervisorError(f"VM {vm!r} was given no disk for {disk.device!r}")
        if disk.argument is None:
            raise HypervisorError(f"disk {disk.device!r} does not stand in the command line of the captured VM")
        new = given[disk.device]
        disks.append(NewDisk(disk.argument, disk.node, new.address, new.format))
    options = definition.options()
    backends = {a.properties.get("id") for a in options if a.name == "object"} | {definition.default_ram}
    sizes = {block.name: block.length_bytes for block in captured.blocks}
    mapped = {
        image.region: image.path
        for image in request.images
        if image.region.removeprefix("/objects/") in backends and sizes.get(image.region, 0) >= SMALLEST_MAPPED_BYTES
    }
    return NewVm(
        name=vm,
        run_folder=folder,
        qmp_socket=qmp_socket,
        machine=definition.machine,
        disks=tuple(disks),
        isolated=request.isolated,
        images=mapped,
        take_images=request.images_disposable,
        block_sizes=sizes,
        default_ram=definition.default_ram,
        takeover=request.takeover,
        slirp_instances=slirp_instances(request.device_state),
    )


def _find_read_only(vm: str, disk: DefinedDisk) -> None:
    """See whether a disk that is not in the backup is where it was."""
    if disk.address.startswith("/") and not Path(disk.address).exists():
        raise HypervisorError(
            f"the read-only disk {disk.device!r} of VM {vm!r} lies at {disk.address}, which is not there",
            cure="it was not copied: put it there",
        )


def _remove_stale(qmp_socket: Path) -> None:
    if not qmp_socket.is_socket():
        return
    pid = listener(qmp_socket)
    if pid is not None:
        raise AlreadyExists(f"process {pid} listens on {qmp_socket}", cure="fence the VM first")
    qmp_socket.unlink()


def _environment(definition: Definition) -> dict[str, str]:
    # Not all of ours: a QEMU lives long, runs strangers' guests, and has no use for our secrets.
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | dict(definition.environment)


def _start(definition: Definition, argv: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    cwd = definition.cwd if Path(definition.cwd).is_dir() else str(folder)
    log = os.open(folder / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            argv,
            env=_environment(definition),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as e:
        raise HypervisorError(f"QEMU {definition.exe} cannot be started: {e.strerror}") from e
    finally:
        os.close(log)


def _bring_in(
    process: subprocess.Popen[bytes],
    folder: Path,
    qmp_socket: Path,
    captured: CapturedMemory,
    images: Path,
    new: NewVm,
) -> None:
    """Send the state in and wait until QEMU has taken it."""
    try:
        with _connected(process, qmp_socket) as monitor:
            events = {"capability": "events", "state": True}
            monitor.execute("migrate-set-capabilities", {"capabilities": [events]})
            mark = monitor.mark()
            ours, theirs = socket.socketpair()
            with ours, theirs:
                monitor.send_descriptor("vmsnap-incoming", theirs.fileno())
                monitor.execute("migrate-incoming", {"uri": "fd:vmsnap-incoming"})
                theirs.close()
                write_stream(ours.fileno(), captured, images, frozenset(new.images))
                ours.shutdown(socket.SHUT_WR)
                monitor.wait_for_event(
                    "MIGRATION",
                    since=mark,
                    timeout_seconds=_LOAD_SECONDS,
                    match=lambda event: event.data["status"] in ("completed", "failed"),
                )
            if monitor.execute("query-migrate").get("status") != "completed":
                raise HypervisorError("QEMU did not take the state")
            events["state"] = False
            monitor.execute("migrate-set-capabilities", {"capabilities": [events]})
    except VmsnapError as e:
        raise HypervisorError(f"VM {new.name!r} did not come up: {_last_words(folder) or e.message}") from e
    shutil.rmtree(images)


def _connected(process: subprocess.Popen[bytes], qmp_socket: Path) -> Monitor:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if qmp_socket.exists():
            try:
                return Monitor.borrow(qmp_socket)
            except VmGone:
                # The socket is bound, and not yet listened on.
                pass
        time.sleep(_LOOK_EACH_SECONDS)
    raise HypervisorError(
        "its monitor did not answer" if process.poll() is None else f"it ended ({process.returncode})"
    )


def _last_words(folder: Path) -> str:
    """What QEMU said at last, warnings and the sentence that always comes last set aside."""
    lines = (folder / LOG_NAME).read_text(errors="replace").strip().splitlines()
    telling = [line for line in lines if "warning:" not in line and "load of migration failed" not in line]
    return (telling or lines or [""])[-1]
