"""Capture by libvirt's own external memory snapshot, which its makers support: ``virDomainSnapshotCreateXML`` with
memory in a file, and no disk, for which the mechanisms are there.

The guest stands still while libvirt has QEMU write its memory into a file in the duplicate's folder, in the host's
memory; after the pause the file is taken apart into RAM images. So the pause grows with the guest's memory. libvirt
could copy beside the running guest (``VIR_DOMAIN_SNAPSHOT_CREATE_LIVE``), but that has its instant at the end of the
copy, when QEMU has given up its disks already, so that they could not be fixed at the same one.
"""

from __future__ import annotations

import contextlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from vmsnap.errors import CannotCapture, HypervisorError, PauseExceeded, VmsnapError
from vmsnap.model import CapturePlan, Moment, VmDescription, VmState, Window
from vmsnap_drivers.hypervisors.libvirt.domain import Domain, disks_of, reached
from vmsnap_drivers.hypervisors.libvirt.saveimage import stream_begin
from vmsnap_drivers.qemu.capture.session import STALL_TIMEOUT_SECONDS, Capture, Session
from vmsnap_drivers.qemu.libvirt.calls import Unreachable, binding
from vmsnap_drivers.qemu.peer import MappedMemory
from vmsnap_drivers.qemu.stream import MigrationStreamReader
from vmsnap_drivers.qemu.stream_format import CapturedMemory

NAME: Final = "libvirt"
"""How plans and manifests call this way."""
_FILE_NAME: Final = "libvirt-snapshot"
_FIXED_SECONDS: Final = 0.2
_SECONDS_PER_BYTE: Final = 1.2 / (1 << 30)


def plan_snapshot(
    description: VmDescription, mapped: MappedMemory, max_pause_seconds: float, factor: float
) -> CapturePlan:
    """Predict the pause, by what is touched of the guest's memory.

    :raises CannotCapture: the guest stands still, or would for too long
    """
    if description.state is not VmState.EXECUTING:
        raise CannotCapture(
            f"VM {description.vm!r} stands still, and QEMU would give up its disks",
            cure="resume it and back it up live",
        )
    seconds = (_FIXED_SECONDS + (mapped.small_bytes + mapped.huge_bytes) * _SECONDS_PER_BYTE) * factor
    if seconds > max_pause_seconds:
        raise CannotCapture(
            f"VM {description.vm!r} would stand still for about {seconds:.1f} s while libvirt saves its memory, longer"
            f" than the {max_pause_seconds:g} s that are allowed",
            cure="allow more with --max-pause, or leave -o memory=supported out",
        )
    reason = "libvirt's external memory snapshot, the guest standing still; asked for by -o memory=supported"
    return CapturePlan(NAME, Window.NO_BLOCK_JOBS, True, seconds, reason)


class SnapshotCapture(Capture):
    """Capture by libvirt's snapshot."""

    name = NAME

    def __init__(self, session: Session, uri: str, domain: str) -> None:
        """No I/O."""
        super().__init__(session)
        self._uri, self._name = uri, domain
        self._open = ExitStack()
        self._domain: Domain | None = None
        self._file = session.folder / _FILE_NAME

    def prepare(self) -> None:
        self._domain = self._open.enter_context(reached(self._uri)).find(self._name)
        self._xml = _snapshot_xml(self._domain, self._file)

    def pause(self) -> Moment:
        """Stop the guest by libvirt's word, which then knows of it."""
        session = self.session
        session.mark = session.monitor.mark()
        self._reached.call("pausing it", lambda handle: handle.suspend(), session.max_pause_seconds)
        stopped = [event for event in session.monitor.events_since(session.mark) if event.name == "STOP"]
        if not stopped:
            raise HypervisorError("somebody stopped the guest before its capture")
        session.stopped_at = stopped[0]
        return stopped[0].moment("pause")

    def duplicate(self) -> Moment:
        session = self.session
        session.check_stood_still(["STOP"])
        flags = binding().VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        instant = Moment.now("duplicate")
        try:
            self._reached.call(
                "its snapshot", lambda handle: handle.snapshotCreateXML(self._xml, flags), session.left_seconds()
            )
        except Unreachable as e:
            with contextlib.suppress(VmsnapError):  # what failed is what must be told
                self._reached.call("ending its snapshot", lambda handle: handle.abortJob())
            raise PauseExceeded(
                f"the guest would have stood still longer than {session.max_pause_seconds:g} s",
                cure="allow more with --max-pause, or leave -o memory=supported out",
            ) from e
        session.check_stood_still(["STOP"])
        return instant

    def collect(self, progress: Callable[[int], None]) -> CapturedMemory:
        """Take the file apart.

        :raises HypervisorError: it is damaged, or compressed
        """
        self.give_up()
        try:
            with self._file.open("rb") as file:
                file.seek(stream_begin(file))
                os.lseek(file.fileno(), file.tell(), os.SEEK_SET)
                reader = MigrationStreamReader(
                    file.fileno(),
                    self.session.folder,
                    stall_timeout_seconds=STALL_TIMEOUT_SECONDS,
                    on_progress=progress,
                )
                return reader.run()
        except OSError as e:
            raise HypervisorError(f"libvirt's snapshot cannot be read: {e.strerror}") from e
        finally:
            self._file.unlink(missing_ok=True)

    def give_up(self) -> None:
        super().give_up()
        self._open.close()

    @property
    def _reached(self) -> Domain:
        if self._domain is None:
            raise HypervisorError("the capture was not prepared")
        return self._domain

    def _go_on(self) -> None:
        """By libvirt's word, which takes up again what it let go of when it stopped the guest."""
        try:
            self._reached.call("resuming it", lambda handle: handle.resume())
        except VmsnapError:
            super()._go_on()


def _snapshot_xml(domain: Domain, file: Path) -> str:
    """A snapshot of the memory, and of no disk."""
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "memory", {"snapshot": "external", "file": str(file)})
    disks = ET.SubElement(root, "disks")
    for disk in disks_of(domain.tree()):
        target = disk.find("target")
        if target is not None:
            ET.SubElement(disks, "disk", {"name": target.get("dev", ""), "snapshot": "no"})
    return ET.tostring(root, encoding="unicode")
