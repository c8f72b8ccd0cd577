"""The value types that cross the borders between the core and the drivers: frozen, typed, no behaviour beyond
themselves.

Sizes are ``*_bytes``, durations ``*_seconds``. Whatever is kept (in the journal, in a manifest) is a value type that
:func:`to_json` and :func:`from_json` carry without loss; `from_json` is strict, so that damaged or foreign text is
refused.
"""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from vmsnap.errors import UsageError

Json = Any
"""What JSON can hold. Drivers keep their own definitions in it; the core passes it on unread."""

T = TypeVar("T")

_decoders: dict[type, Any] = {}
_decoders_lock = Lock()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SCHEDULE_TAG = "schedule:"
"""Begins the tag of the backups of a schedule, which it counts and removes."""


def check_name(name: str, what: str = "name") -> str:
    """Return `name` if it is safe as a VM, duplicate or backup name, and so as a file name.

    :raises UsageError: anything but 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter
        or digit
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid {what}",
            cure="use letters, digits, '.', '_' and '-', beginning with a letter or digit, 64 at most",
        )
    return name


class VmState(enum.Enum):
    """What a hypervisor says of a VM."""

    EXECUTING = "executing"
    """Its vCPUs run."""
    STOPPED = "stopped"
    """It exists, its vCPUs stand still: paused, or loaded and not yet resumed."""
    ENDED = "ended"
    """The guest has shut itself down; the hypervisor may still hold its shell."""
    ABSENT = "absent"
    """The hypervisor does not know it (any more)."""


@dataclass(frozen=True)
class Moment:
    """A point in time as evidence.

    `monotonic_ns` orders the moments of one host (CLOCK_MONOTONIC, the same clock in every process); `wall_ns` is
    for people and for comparison with the hypervisor's own events (nanoseconds since 1970 UTC). `source` says who
    looked at the clock: ``"vmsnap"`` or the hypervisor's own event, such as ``"qemu:STOP"``.
    """

    name: str
    wall_ns: int
    monotonic_ns: int
    source: str = "vmsnap"

    @classmethod
    def now(cls, name: str, source: str = "vmsnap") -> Moment:
        """The present moment by this host's clocks."""
        return cls(name, time.time_ns(), time.monotonic_ns(), source)


@dataclass(frozen=True)
class Disk:
    """One virtual disk of a VM.

    `device` is the virtual disk identifier (what the guest's host calls it, ``disk0``), `address` the physical disk
    address (where the bytes are: an absolute path, ``/dev/vg0/vm001``, ``iscsi://…``). `handle` is the hypervisor
    driver's own: what a mechanism that works through the hypervisor needs to find the disk there (a monitor socket,
    a block node); the core passes it on unread.
    """

    device: str
    address: str
    size_bytes: int
    format: str = "raw"
    read_only: bool = False
    handle: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryRegion:
    """One block of guest RAM. `backing` says what it lies on: ``anonymous``, ``memfd``, ``tmpfs:PATH``,
    ``hugetlbfs:PATH``, …
    """

    name: str
    size_bytes: int
    page_bytes: int = 4096
    backing: str = "anonymous"


@dataclass(frozen=True)
class Nic:
    """One network interface of a VM. `network` names what it is connected to (``user``, ``tap:vnet3``,
    ``bridge:br0``).
    """

    device: str
    mac: str = ""
    network: str = ""
    connected: bool = True


@dataclass(frozen=True)
class VmDescription:
    """What a hypervisor says of one VM, all that a later `load` needs included.

    `definition` is the driver's own, opaque to the core, and holds no secrets. `memory_bytes` is the guest's RAM;
    `memory` may list more regions than that (video memory, ROMs). `refusals` are the reasons, one line each, why
    the VM cannot be captured truthfully; a backup is refused with them before anything is paused.
    """

    vm: str
    hypervisor: str
    state: VmState
    memory_bytes: int
    vcpus: int
    memory: tuple[MemoryRegion, ...]
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...] = ()
    definition: Json = None
    refusals: tuple[str, ...] = ()
    hypervisor_version: str = ""


@dataclass(frozen=True)
class SeenVm:
    """A VM that a driver sees without having been told of it, and what could be done with it, as far as that can be
    said without touching it.

    `state` is None where the driver looks at nothing but names. `captures` are the ways in which its memory could be
    captured now, empty where it cannot be; `why_not` says why not, or why not in the other ways, one line each; `notes`
    are what else people should know. The disks' handles are good enough to ask mechanisms whether they handle them.
    """

    vm: str
    state: VmState | None = None
    captures: tuple[str, ...] = ()
    why_not: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    notes: tuple[str, ...] = ()


class Window(enum.Enum):
    """What a snapshot mechanism may do inside the pause window; the hypervisor's capture decides."""

    FREE = "free"
    """Anything; block jobs of the hypervisor included."""
    NO_BLOCK_JOBS = "no-block-jobs"
    """The hypervisor is about to hand its disks over (pre-copy): a block job may not start, overlays and storage-side
    snapshots may."""


@dataclass(frozen=True)
class CapturePlan:
    """How a hypervisor will capture the RAM, decided before anything is done.

    `capture` is the driver's name of the way (``cow``, ``precopy``, ``fork``), `predicted_pause_seconds` what it
    expects, `reason` one line for the manifest and for people. `disks_first` is set where disks must be snapshotted
    before memory is duplicated; else either order is right. `prepare_seconds` bounds what `prepare` takes, and
    `lead_seconds` what `pause` takes with the guest still running; the guardian allows for both. `needs_worker`
    is set where the guest depends on the copying process until the copy is complete, as write faults do that wait for
    their page. `otherwise_seconds` is the predicted pause of the best other way, None where there is none: a capture
    that turns out to be no better gives itself up with `DoesNotConverge`.
    """

    capture: str
    window: Window = Window.FREE
    disks_first: bool = True
    predicted_pause_seconds: float | None = None
    reason: str = ""
    prepare_seconds: float = 60.0
    lead_seconds: float = 0.0
    needs_worker: bool = False
    otherwise_seconds: float | None = None


@dataclass(frozen=True)
class RamImage:
    """The content of one memory region at the instant: a sparse file, byte N of the file is byte N of the region."""

    region: str
    size_bytes: int
    path: Path
    page_bytes: int = 4096


@dataclass(frozen=True)
class Duplicate:
    """The captured machine in host memory: one RAM image per region and the opaque device state, in a folder of its
    own.

    Everything lies under `folder` (0700, on tmpfs unless the user said otherwise), so that a name is enough to find and
    discard it. The files may still be filling until `Hypervisor.finish_duplicate` has returned. `details` is the
    driver's own and goes into the manifest; `instant` is the moment that the images show.
    """

    name: str
    folder: Path
    capture: str
    instant: Moment
    images: tuple[RamImage, ...]
    device_state: Path
    details: Json = None


@dataclass(frozen=True)
class Extent:
    """A range of a disk: `zero` where it reads as zeros and need not be read."""

    offset: int
    length: int
    zero: bool = False


@dataclass(frozen=True)
class SnapshotPlan:
    """What a mechanism is going to make for one backup, named before it exists, so that it can be found after a crash.

    Plain data: it is written to the journal before `SnapshotMechanism.prepare`, and is enough for
    `SnapshotMechanism.delete` in another process, another day. `data` is the mechanism's own.
    """

    mechanism: str
    tag: str
    vm: str
    disks: tuple[Disk, ...]
    window: Window
    data: Json = None


@dataclass(frozen=True)
class FreezePlan:
    """What a hypervisor is going to make to hold disks at one instant while the guest goes on, named before it exists.

    Plain data: it is written to the journal before `Hypervisor.prepare_freeze`, and is enough for
    `Hypervisor.thaw_disks` in another process, another day. `data` is the driver's own.
    """

    tag: str
    vm: str
    disks: tuple[Disk, ...]
    data: Json = None


@dataclass(frozen=True)
class DiskSnapshot:
    """The content of one disk at `instant`. `data` is the mechanism's own. `mark` names this instant of this disk for
    `SnapshotMechanism.changed_extents` of later snapshots; empty where the mechanism keeps no record of changes.
    """

    plan: SnapshotPlan
    disk: Disk
    instant: Moment
    data: Json = None
    mark: str = ""


@dataclass(frozen=True)
class ClonePlan:
    """Names a writable disk for a duplicate before it exists.

    Plain data: it is written to the journal before `SnapshotMechanism.clone`, and is enough for
    `SnapshotMechanism.delete_clone` in another process, another day. `name` is the duplicate's, `folder` where files
    of the clone lie (mechanisms without files leave it alone). `lasting` says that the clone must outlive the snapshot
    and the working VM. `data` is the mechanism's own.
    """

    mechanism: str
    snapshot: SnapshotPlan
    device: str
    name: str
    folder: Path
    lasting: bool
    data: Json = None


@dataclass(frozen=True)
class OwnedResource:
    """Something outside of vmsnap that carries our tag: a snapshot, an overlay, an export, a VM, a folder."""

    kind: str
    name: str
    tag: str
    driver: str


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`: what was looked at, whether it is as needed, and the cure where it is not.

    `severity` is ``ok``, ``note`` (works, with less) or ``missing`` (does not work).
    """

    subject: str
    severity: str
    message: str
    cure: str = ""


def to_json(value: object) -> str:
    """`value` (a value type of this module, or anything JSON holds) as JSON text."""
    import msgspec

    return msgspec.json.encode(value, enc_hook=_plain, order="deterministic").decode()


def from_json(text: str | bytes, kind: type[T]) -> T:
    """The value of type `kind` that `to_json` wrote.

    :raises ValueError: the text is no JSON or does not have the shape of `kind`
    """
    import msgspec

    # msgspec looks into a type when it meets it first, and crashes when several threads make it do so at once.
    with _decoders_lock:
        decoder = _decoders.get(kind)
        if decoder is None:
            decoder = _decoders[kind] = msgspec.json.Decoder(kind, dec_hook=_unplain)
    try:
        value: T = decoder.decode(text)
    except msgspec.MsgspecError as e:
        raise ValueError(f"not a {kind.__name__}: {e}") from e
    return value


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")


def _unplain(kind: type, value: object) -> object:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{kind.__name__} cannot be read from JSON")
