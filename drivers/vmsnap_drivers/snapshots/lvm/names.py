"""What a plan of this mechanism names, as it stands in the journal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from vmsnap.errors import SnapshotError
from vmsnap.model import ClonePlan, DiskSnapshot, SnapshotPlan, check_name
from vmsnap_drivers.snapshots.lvm.commands import device_name
from vmsnap_drivers.snapshots.lvm.volumes import Volume

_TAG: Final = re.compile(r"vmsnap-[A-Za-z0-9._-]+")
_GROUP: Final = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]*")
# lvm(8), "Reserved names"
_RESERVED: Final = re.compile(
    r"_(cdata|cmeta|corig|iorig|mimage|mlog|pmspare|rimage|rmeta|tdata|tmeta|vdata|vorigin|wcorig)"
)
_LONGEST_DEVICE: Final = 127 - len("-real")


@dataclass(frozen=True)
class VolumeNames:
    """One disk of a plan: its origin, and the snapshot to be made. `pool` is empty for a thick volume, whose snapshot
    gets `room_bytes` for what the guest overwrites.
    """

    group: str
    origin: str
    origin_uuid: str
    snapshot: str
    device: str
    pool: str
    room_bytes: int

    @property
    def thin(self) -> bool:
        """It lies in a thin pool."""
        return bool(self.pool)


def choose_name(group: str, tag: str, index: int, *more: str) -> str:
    """The name of a volume of ours for disk number `index` of the plan `tag`.

    :raises SnapshotError: LVM would not take it
    """
    name = ".".join((tag, str(index), *more))
    if not _TAG.fullmatch(tag):
        raise SnapshotError(f"{tag!r} is no tag")
    if _RESERVED.search(name):
        raise SnapshotError(f"LVM keeps names like {name!r} for itself", cure="give the VM another name")
    if len(device_name(group, name)) > _LONGEST_DEVICE:
        raise SnapshotError(f"{group}/{name} is too long a name for a volume", cure="give the VM a shorter name")
    return name


def names_of(plan: SnapshotPlan) -> tuple[VolumeNames, ...]:
    """What the plan names; refuses a plan that names others than ours, since they will be removed.

    :raises SnapshotError: it is no plan of this mechanism
    """
    try:
        found = tuple(VolumeNames(**entry) for entry in plan.data["volumes"])
    except (KeyError, TypeError) as e:
        raise SnapshotError(f"the plan {plan.tag!r} is none of the mechanism lvm: {e}") from e
    for index, names in enumerate(found):
        if not _GROUP.fullmatch(names.group) or names.snapshot != choose_name(names.group, plan.tag, index):
            raise SnapshotError(f"the plan {plan.tag!r} names {names.group}/{names.snapshot}, no snapshot of it")
    return found


def to_data(volumes: tuple[VolumeNames, ...]) -> Mapping[str, Any]:
    """The same for `SnapshotPlan.data`."""
    return {"volumes": [asdict(names) for names in volumes]}


def names_of_snapshot(snapshot: DiskSnapshot) -> VolumeNames:
    """The names of one disk of a plan."""
    return names_of(snapshot.plan)[snapshot.plan.disks.index(snapshot.disk)]


@dataclass(frozen=True)
class CloneNames:
    """A writable volume for a duplicate."""

    group: str
    name: str
    device: str


def choose_clone(snapshot: DiskSnapshot, duplicate: str) -> CloneNames:
    """The clone's names.

    :raises SnapshotError: LVM would not take them
    """
    source = names_of_snapshot(snapshot)
    index = snapshot.plan.disks.index(snapshot.disk)
    check_name(duplicate, "duplicate name")
    name = choose_name(source.group, snapshot.plan.tag, index, duplicate, "clone")
    return CloneNames(source.group, name, f"/dev/{source.group}/{name}")


def clone_names_of(plan: ClonePlan) -> CloneNames:
    """What the plan names; refuses another than ours, since it will be removed.

    :raises SnapshotError: it is no plan of this mechanism
    """
    try:
        found = CloneNames(**plan.data)
    except TypeError as e:
        raise SnapshotError(f"the plan of a clone for {plan.name!r} is none of the mechanism lvm: {e}") from e
    middle = found.name.removeprefix(f"{plan.snapshot.tag}.").removesuffix(f".{plan.name}.clone")
    if not _GROUP.fullmatch(found.group) or not middle.isdecimal():
        raise SnapshotError(f"the plan of a clone for {plan.name!r} names {found.group}/{found.name}, no clone of it")
    return found


def is_made_for(volume: Volume, tag: str, kind: str) -> bool:
    """Whether we have made it, for that plan: its name alone does not say so."""
    return volume.ours and volume.plan == tag and volume.kind == kind
