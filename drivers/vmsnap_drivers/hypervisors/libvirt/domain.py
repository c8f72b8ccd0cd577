"""libvirt's domains: found by name or UUID, asked for their XML and state. Each call ends in time."""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from vmsnap.errors import HypervisorError, UnknownVm, UsageError, VmsnapError
from vmsnap.model import VmState
from vmsnap_drivers.qemu.libvirt.calls import CALL_SECONDS, binding, within
from vmsnap_drivers.qemu.libvirt.link import OPEN_SECONDS, open_connection

T = TypeVar("T")
_OPERATIONS: Final = {
    1: "start", 2: "save", 3: "restore", 4: "incoming migration", 5: "migration", 6: "snapshot", 7: "revert",
    8: "dump", 9: "backup", 10: "deletion of a snapshot",
}  # fmt: skip
"""``virDomainJobOperation`` (``include/libvirt/libvirt-domain.h``)."""
_QEMU: Final = "QEMU"


class Domains:
    """The domains of one libvirt, over a connection of its own. Made by `reached`."""

    def __init__(self, connection: Any, uri: str) -> None:
        self._connection = connection
        self.uri = uri

    def find(self, name: str) -> Domain:
        """The domain of that name, or of that UUID.

        :raises UnknownVm: there is none
        """
        lookups: list[Callable[[], Any]] = [lambda: self._connection.lookupByName(name)]
        try:
            identity = str(uuid.UUID(name))
            lookups.append(lambda: self._connection.lookupByUUIDString(identity))
        except ValueError:
            pass
        for lookup in lookups[:-1]:
            try:
                return Domain(within(CALL_SECONDS, f"domain {name!r} at {self.uri}", lookup), name, self.uri)
            except UnknownVm:
                continue
        return Domain(within(CALL_SECONDS, f"domain {name!r} at {self.uri}", lookups[-1]), name, self.uri)

    def kind(self) -> str:
        """Which hypervisor this libvirt drives: ``QEMU`` (KVM too), ``TEST``, …"""
        return self.call("its kind", lambda connection: str(connection.getType()))

    def check_kind(self) -> None:
        """See that its domains are QEMU's, which alone can be captured.

        :raises UsageError: they are another hypervisor's
        """
        if (kind := self.kind()) != _QEMU:
            raise UsageError(
                f"libvirt at {self.uri} drives {kind} and not QEMU, whose domains alone can be captured",
                cure="see -o uri=…, such as qemu:///system",
            )

    def all(self) -> list[Domain]:
        """All that are defined or run."""
        found = within(CALL_SECONDS, f"domains at {self.uri}", lambda: self._connection.listAllDomains(0))
        return [Domain(domain, str(domain.name()), self.uri) for domain in found]

    def call(self, what: str, call: Callable[[Any], T], seconds: float = CALL_SECONDS) -> T:
        """Make a call on the connection.

        :raises VmsnapError: as `calls.within`
        """
        return within(seconds, what, lambda: call(self._connection))


class Domain:
    """One domain."""

    def __init__(self, handle: Any, name: str, uri: str) -> None:
        self.handle = handle
        self.name = name
        self._what = f"domain {name!r} at {uri}"

    @property
    def uuid(self) -> str:
        """Its UUID."""
        return str(self.handle.UUIDString())

    def call(self, what: str, call: Callable[[Any], T], seconds: float = CALL_SECONDS) -> T:
        """Make a call on it.

        :raises VmsnapError: as `calls.within`
        """
        return within(seconds, f"{self._what}: {what}", lambda: call(self.handle))

    def is_active(self) -> bool:
        """Whether it runs, its guest stopped or not."""
        return bool(self.call("whether it runs", lambda domain: domain.isActive()))

    def is_persistent(self) -> bool:
        """Whether libvirt knows it when it does not run."""
        return bool(self.call("whether it is persistent", lambda domain: domain.isPersistent()))

    def was_migrated(self) -> bool:
        """Whether it does not run here because it was migrated away."""
        lib = binding()
        state, reason = self.call("its state", lambda domain: domain.state(0))
        return bool(state == lib.VIR_DOMAIN_SHUTOFF and reason == lib.VIR_DOMAIN_SHUTOFF_MIGRATED)

    def why_shut_off(self) -> str:
        """Why it does not run, in a word or two."""
        lib = binding()
        words = {
            lib.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "shut down",
            lib.VIR_DOMAIN_SHUTOFF_DESTROYED: "destroyed",
            lib.VIR_DOMAIN_SHUTOFF_CRASHED: "crashed",
            lib.VIR_DOMAIN_SHUTOFF_MIGRATED: "migrated",
            lib.VIR_DOMAIN_SHUTOFF_SAVED: "saved",
            lib.VIR_DOMAIN_SHUTOFF_FAILED: "failed",
        }
        return words.get(self.call("its state", lambda domain: domain.state(0))[1], "for an unknown reason")

    def xml(self, flags: int = 0) -> str:
        """Its XML; secrets are not in it."""
        return str(self.call("its XML", lambda domain: domain.XMLDesc(flags)))

    def tree(self) -> ET.Element:
        """The XML of the running domain, parsed."""
        return ET.fromstring(self.xml())

    def job(self) -> str:
        """The job that is going on, by somebody; empty where there is none."""
        kind = self.call("its job", lambda domain: domain.jobInfo())[0]
        if kind == binding().VIR_DOMAIN_JOB_NONE:
            return ""
        stats = self.call("its job", lambda domain: domain.jobStats())
        return f"libvirt's job {_OPERATIONS.get(stats.get('operation'), 'of an unknown kind')!r} of somebody else"

    def has_block_job(self, device: str) -> bool:
        """Whether libvirt knows of a block job on a disk, named by its target."""
        try:
            return bool(self.call(f"the block job of {device}", lambda domain: domain.blockJobInfo(device, 0)))
        except HypervisorError:
            # An empty drive, or a domain that has just ended.
            return False

    def disk_bytes(self, device: str) -> int:
        """What the guest sees as the size of a disk, named by its target; 0 where libvirt cannot tell."""
        try:
            return int(self.call(f"the size of {device}", lambda domain: domain.blockInfo(device, 0))[0])
        except HypervisorError:
            return 0

    def life(self) -> VmState:
        """What libvirt says that it does."""
        lib = binding()
        state = self.call("its state", lambda domain: domain.state(0))[0]
        if state in (lib.VIR_DOMAIN_SHUTOFF, lib.VIR_DOMAIN_NOSTATE):
            return VmState.ABSENT
        if state in (lib.VIR_DOMAIN_SHUTDOWN, lib.VIR_DOMAIN_CRASHED):
            return VmState.ENDED
        return VmState.EXECUTING if state in (lib.VIR_DOMAIN_RUNNING, lib.VIR_DOMAIN_BLOCKED) else VmState.STOPPED


@contextmanager
def reached(uri: str) -> Iterator[Domains]:
    """A connection, closed afterwards.

    :raises VmsnapError: what `link.open_connection` raises
    """
    connection = open_connection(uri)
    try:
        yield Domains(connection, uri)
    finally:
        with suppress(VmsnapError):  # libvirtd hangs or is gone: there is nothing to close
            within(OPEN_SECONDS, f"closing {uri}", connection.close)


def disks_of(tree: ET.Element) -> Iterator[ET.Element]:
    """The disks, CD-ROM drives and floppies of a domain, in its order."""
    yield from tree.iterfind("devices/disk")


def address_of(disk: ET.Element) -> str:
    """The file or device of a disk; of one on the network, what names it (``iscsi://HOST:PORT/IQN/LUN``), of one in a
    storage pool the volume. Empty where there is no medium.
    """
    source = disk.find("source")
    if source is None:
        return ""
    if address := source.get("file") or source.get("dev"):
        return address
    protocol, name = source.get("protocol"), source.get("name")
    host = source.find("host")
    if protocol is None:
        return source.get("volume") or ""
    where = "" if host is None else host.get("name", "") + (f":{host.get('port')}" if host.get("port") else "")
    return f"{protocol}://{where}/{name}"
