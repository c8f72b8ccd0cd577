"""Brings a captured machine back as a domain: libvirt restores it from an image that is written while it reads.

The image goes through a FIFO, so that nothing of the guest's RAM is written anywhere; its domain stays stopped
(``VIR_DOMAIN_SAVE_PAUSED``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import AlreadyExists, HypervisorError, UnknownVm, VmsnapError
from vmsnap.roles import LoadRequest
from vmsnap_drivers.hypervisors.libvirt.agent import place_of
from vmsnap_drivers.hypervisors.libvirt.definition import DefinedDisk, Definition
from vmsnap_drivers.hypervisors.libvirt.domain import Domain, Domains, reached
from vmsnap_drivers.hypervisors.libvirt.freezing import DETAIL, FrozenFileSystems
from vmsnap_drivers.hypervisors.libvirt.newdomain import NewDomain, rewrite
from vmsnap_drivers.hypervisors.libvirt.reach import let_through, qemu_user
from vmsnap_drivers.hypervisors.libvirt.run import LoadedMark, write_mark
from vmsnap_drivers.hypervisors.libvirt.saveimage import head
from vmsnap_drivers.qemu import network
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress
from vmsnap_drivers.qemu.libvirt.calls import CALL_SECONDS, Unreachable, binding
from vmsnap_drivers.qemu.libvirt.process import find_qemu
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.stream_format import CapturedMemory, StreamError
from vmsnap_drivers.qemu.synthesis import gather_images, write_stream

_FIFO_NAME: Final = "image.fifo"
_LOAD_SECONDS: Final = 600.0
_PIPE_BYTES: Final = 1024 * 1024
_LOOK_EACH_SECONDS: Final = 0.005


def load(
    vm: str,
    uri: str,
    name: str,
    folder: Path,
    request: LoadRequest,
    ours: Sequence[Path],
    *,
    define: bool,
    frozen: FrozenFileSystems,
) -> LoadedMark:
    """Make the domain, stopped. All or nothing. Folders in `ours` are vmsnap's, in which QEMU's user may be let through
    to the disks. With `define` libvirt knows the domain also when it does not run. Where the guest was captured
    frozen, that is noted in `frozen`.

    :raises AlreadyExists: there is a domain of that name; with `takeover` one that runs
    :raises HypervisorError: it did not come up
    """
    definition = Definition.from_json(request.definition)
    captured = CapturedMemory.from_json(request.details["memory"], device_state=request.device_state)
    for disk in definition.disks:
        if disk.read_only:
            _find_read_only(vm, disk)
    with reached(uri) as domains:
        old = _find(domains, name)
        if old is not None and (not request.takeover or old.is_active()):
            raise AlreadyExists(f"there is a domain {name!r} at {uri} already", cure="choose another name")
        written = tuple(disk.address for disk in request.disks if not disk.read_only)
        identity = old.uuid if old is not None else str(uuid.uuid4())
        mark = LoadedMark(vm, uri, name, identity, request.takeover and old is not None, written)
        new = NewDomain(
            name,
            identity,
            folder,
            {disk.device: disk for disk in request.disks},
            isolated=request.isolated,
            takeover=request.takeover,
        )
        xml = rewrite(definition.xml, definition, new)
        user = qemu_user(domains.call("its capabilities", lambda connection: str(connection.getCapabilities())))
        if user is not None and os.geteuid() == 0:
            let_through(user, written, ours)
        if folder.exists():
            shutil.rmtree(folder)
        write_mark(folder, mark)
        try:
            _restore(domains, name, folder, head(xml, definition.cpu), captured, request)
            if request.isolated:
                # What libvirt has set down is the card's link, of which the guest's state may say otherwise.
                with Monitor.borrow(LibvirtAddress(uri, identity).text()) as monitor:
                    network.cut(monitor)
            if request.details.get(DETAIL):
                place = place_of(vm, uri, identity, domains.find(identity).tree())
                frozen.note_loaded(place, find_qemu(identity))
            if define or (mark.takeover and definition.inactive_xml):
                # Started again one day, it shall find its own disks.
                text = rewrite(definition.inactive_xml or definition.xml, definition, new)
                domains.call(f"defining domain {name!r}", lambda connection: connection.defineXML(text))
        except BaseException as e:
            with contextlib.suppress(VmsnapError):  # what failed is what must be told; recovery finds the mark
                destroy(folder, mark)
                frozen.forget()
            if isinstance(e, VmsnapError) and not isinstance(e, AlreadyExists):
                raise HypervisorError(f"VM {vm!r} did not come up: {e.message}", cure=e.cure) from e
            raise
    return mark


def destroy(folder: Path, mark: LoadedMark) -> None:
    """End the domain of the mark, have libvirt forget it unless it knew it before, and remove the folder. Idempotent.

    :raises HypervisorError: libvirt refuses, or is not there
    """
    lib = binding()
    _let_go(folder / _FIFO_NAME)
    with reached(mark.uri) as domains:
        domain = _find(domains, mark.uuid)
        if domain is not None and domain.is_active():
            _end(domain)
        if not mark.takeover and (domain := _find(domains, mark.uuid)) is not None:
            flags = lib.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | lib.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            flags |= lib.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            domain.call("undefining it", lambda handle: handle.undefineFlags(flags))
    shutil.rmtree(folder, ignore_errors=True)


def _end(domain: Domain) -> None:
    """End a domain, which may end by itself meanwhile."""
    try:
        domain.call("ending it", lambda handle: handle.destroyFlags(0))
    except VmsnapError:
        with contextlib.suppress(UnknownVm):  # it has: what was wanted
            if domain.is_active():
                raise


def _find(domains: Domains, name: str) -> Domain | None:
    try:
        return domains.find(name)
    except UnknownVm:
        return None


def _find_read_only(vm: str, disk: DefinedDisk) -> None:
    """See whether a disk that is not in the backup is where it was."""
    if disk.address.startswith("/") and not Path(disk.address).exists():
        raise HypervisorError(
            f"the read-only disk {disk.device!r} of VM {vm!r} lies at {disk.address}, which is not there",
            cure="it was not copied: put it there",
        )


def _restore(
    domains: Domains, name: str, folder: Path, begin: bytes, captured: CapturedMemory, request: LoadRequest
) -> None:
    """Let libvirt read the image, and write it."""
    # Beside the images themselves, in memory.
    place = request.images[0].path.parent / f".{folder.name}.images"
    shutil.rmtree(place, ignore_errors=True)
    fifo = folder / _FIFO_NAME
    try:
        images = gather_images(place, request.images, [block.name for block in captured.blocks])
        os.mkfifo(fifo, 0o600)
    except OSError as e:
        shutil.rmtree(place, ignore_errors=True)
        raise HypervisorError(f"the RAM images cannot be had: {e.strerror}") from e
    flags = binding().VIR_DOMAIN_SAVE_PAUSED
    failures: list[VmsnapError] = []
    ended = threading.Event()

    def restore() -> None:
        try:
            domains.call(
                f"restoring domain {name!r}",
                lambda connection: connection.restoreFlags(str(fifo), None, flags),
                _LOAD_SECONDS,
            )
        except VmsnapError as e:
            failures.append(e)
        finally:
            ended.set()

    thread = threading.Thread(target=restore, name="vmsnap-restore", daemon=True)
    thread.start()
    try:
        written = _write(fifo, ended, begin, captured, images)
    finally:
        _let_go(fifo)
        if not ended.wait(_LOAD_SECONDS):
            raise Unreachable(f"libvirt does not end restoring domain {name!r}")
        fifo.unlink()
        shutil.rmtree(images)
    if failures:
        raise failures[0]
    if not written:
        raise HypervisorError("libvirt did not read the image")


def _let_go(fifo: Path) -> None:
    """Whoever waits for somebody to write shall not wait for ever."""
    with contextlib.suppress(FileNotFoundError):  # then nobody waits at it
        os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))


def _write(fifo: Path, ended: threading.Event, begin: bytes, captured: CapturedMemory, images: Path) -> bool:
    """Write the whole image; False where its reader went away, which says itself why."""
    deadline = time.monotonic() + CALL_SECONDS
    while True:
        try:
            descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as e:
            if e.errno != errno.ENXIO:  # nobody reads yet
                raise HypervisorError(f"{fifo} cannot be written: {e.strerror}") from e
        if ended.is_set() or time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EACH_SECONDS)
    with contextlib.suppress(OSError):  # as large as a user may have it is well enough
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    try:
        left = memoryview(begin)
        while left:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll(CALL_SECONDS * 1000)
            left = left[os.write(descriptor, left) :]
        write_stream(descriptor, captured, images)
    except (StreamError, OSError):
        return False
    finally:
        os.close(descriptor)
    return True
