"""What the author of a driver gives to a contract suite: real things to work on, and an oracle that sees them past
the driver.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmsnap.model import Disk, Duplicate
from vmsnap.roles import DiskReader, DriverContext, Hypervisor, SnapshotMechanism

_POLL_SECONDS = 0.002


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait until `condition` holds.

    :raises AssertionError: it does not in time; names `what`
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Packets:
    """How many frames a guest has sent and received so far."""

    sent: int
    received: int


class HypervisorRig(ABC):
    """A running VM of one hypervisor, and an oracle for it and for the VMs that are loaded from it.

    The guest counts, writes its count to its disks, and can tell whether its RAM and disks agree. `vm` and
    `foreign_vm` were started past the driver, and run when a scenario begins; `scratch` is an empty folder for
    disks. `watch_seconds` is how long nothing must happen for it to count as stopped: several beats of the guest.
    """

    context: DriverContext
    vm: str
    foreign_vm: str
    scratch: Path
    options: Mapping[str, str] = {}
    """The options under which `vm` is reached."""
    watch_seconds: float = 0.1
    patience_seconds: float = 20.0
    """How long something that must happen is waited for."""
    life_seconds: float = 20.0
    """How long `Hypervisor.await_life` may look for life; a driver without a better sign takes all of it."""
    examples: int = 10
    """How many random orders of calls are tried."""

    @abstractmethod
    def driver(self, vm: str, options: Mapping[str, str] | None = None) -> Hypervisor:
        """A new driver instance, as another process would make it: for a VM of the rig, for one that was loaded (with
        the options that `load` gave), or for a name that nobody has.
        """

    @abstractmethod
    def progress(self, vm: str) -> int:
        """The guest's count, asked past the driver."""

    @abstractmethod
    def image_progress(self, duplicate: Duplicate) -> int | None:
        """The count that the RAM images show; None where the rig cannot read it there."""

    @abstractmethod
    def verdict(self, vm: str) -> str:
        """What the guest finds wrong between its RAM and its disks, looking at all of both; empty when all agree."""

    @abstractmethod
    def undrained(self, vm: str) -> str:
        """What the guest knows to be written and a reader of the image files does not find; empty when nothing."""

    @abstractmethod
    def clean(self, disks: Sequence[Disk]) -> bool:
        """Whether the images show an orderly shutdown, with all that the guest had only in RAM before."""

    @abstractmethod
    def kill(self, vm: str) -> None:
        """Kill the VM's process, and wait until it is gone."""

    @abstractmethod
    def resume_past_driver(self, vm: str) -> None:
        """Let the VM execute, as another tool would."""

    @abstractmethod
    def ignore_shutdown(self, vm: str) -> None:
        """Make the guest deaf to its power button."""

    @abstractmethod
    def packets(self, vm: str) -> Packets | None:
        """The guest's traffic; None when it has no network. Guests on one network hear each other."""

    @abstractmethod
    def traces(self) -> frozenset[str]:
        """Everything that captures and loads could leave on this host: files, processes, settings of `vm`."""

    def eventually(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds; see the function of that name."""
        eventually(condition, what, self.patience_seconds)

    def copy_disks(self, disks: Sequence[Disk], folder: str) -> tuple[Disk, ...]:
        """Copies of the image files as they are now, in a folder of `scratch`, for a loaded VM."""
        place = self.scratch / folder
        place.mkdir()
        copies = []
        for index, disk in enumerate(disks):
            address = place / f"{index}-{Path(disk.address).name}"
            shutil.copyfile(disk.address, address)
            copies.append(replace(disk, address=str(address), handle={}))
        return tuple(copies)


def digest(path: str | Path) -> str:
    """A fingerprint of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


class SnapshotRig(ABC):
    """Disks that one mechanism handles, a writer that goes on writing to them, and an oracle that reads them past the
    mechanism.

    `scratch` is an empty folder; `pause` and `resume` stop and restart the writer, drained, as a hypervisor would.
    """

    context: DriverContext
    vm: str = "vm001"
    scratch: Path

    @abstractmethod
    def mechanism(self) -> SnapshotMechanism:
        """A new instance, as another process would make it."""

    @abstractmethod
    def disks(self) -> tuple[Disk, ...]:
        """At least two disks, partly written, partly never written."""

    @abstractmethod
    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        """Write as the guest would."""

    @abstractmethod
    def content(self, disk: Disk) -> bytes:
        """What the guest would read from the whole disk now; clones are disks too, here and in `write`."""

    @abstractmethod
    def pause(self) -> None:
        """Stop all writing and bring everything to the disks."""

    @abstractmethod
    def resume(self) -> None:
        """Let writing go on."""

    @abstractmethod
    def traces(self) -> frozenset[str]:
        """Everything that a snapshot could leave on this host."""

    @abstractmethod
    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        """Destroy, past the mechanism, what it keeps of this disk's snapshot."""

    def end_vm(self) -> None:
        """End the process that has the disks open, by kill -9; nothing where there is none."""


def read_all(reader: DiskReader) -> bytes:
    """The whole disk, read by extents, zero extents not read."""
    content = bytearray(reader.size_bytes)
    with memoryview(content) as view:
        for extent in reader.extents():
            if not extent.zero:
                reader.read_into(extent.offset, view[extent.offset : extent.offset + extent.length])
    return bytes(content)


def same(found: object, expected: object) -> bool:
    """Whether two contents are equal. Scenarios assert this instead of ``==``: pytest explains a difference between
    megabytes line by line where it does not shorten it, as on machines that set ``CI``, and that takes minutes."""
    return bool(found == expected)
