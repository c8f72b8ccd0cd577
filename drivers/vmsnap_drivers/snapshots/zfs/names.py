"""What a plan of this mechanism names, as it stands in the journal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from vmsnap.errors import SnapshotError
from vmsnap.model import ClonePlan, DiskSnapshot, SnapshotPlan, check_name
from vmsnap_drivers.snapshots.zfs.commands import pool_of
from vmsnap_drivers.snapshots.zfs.lookup import NAME

_TAG: Final = re.compile(r"vmsnap-[A-Za-z0-9._-]+")
_LONGEST: Final = 255
"""``ZFS_MAX_DATASET_NAME_LEN`` without its NUL, for a name with that of a snapshot (``include/sys/fs/zfs.h``)."""


@dataclass(frozen=True)
class DiskNames:
    """One disk of a plan. `path` is that of an image file within the file system `dataset`, and empty for a volume.

    It is read through `reader`, a clone of the snapshot, which disks of one file system share; it is mounted at
    `mounted`, a volume nowhere.
    """

    dataset: str
    guid: str
    path: str
    snapshot: str
    reader: str
    mounted: str

    @property
    def is_file(self) -> bool:
        """An image file, not a volume."""
        return bool(self.path)


def beside(dataset: str, *words: str) -> str:
    """The name of something of ours beside a data set; below it where it is a pool's first."""
    return f"{dataset.rpartition('/')[0] or dataset}/{'.'.join(words)}"


def choose_names(places: Sequence[tuple[str, str, str]], tag: str, folder: Path) -> tuple[DiskNames, ...]:
    """The names for disks, given as data set, its guid, and path; file systems are mounted below `folder`.

    :raises SnapshotError: a name is too long, or the tag is none
    """
    if not _TAG.fullmatch(tag):
        raise SnapshotError(f"{tag!r} is no tag")
    first: dict[str, int] = {}
    found = []
    for index, (dataset, guid, path) in enumerate(places):
        own = f"{tag}.{first.setdefault(dataset, index)}"
        names = DiskNames(
            dataset, guid, path, f"{dataset}@{tag}", beside(dataset, own), str(folder / own) if path else ""
        )
        _check_length(names.snapshot, f"{names.reader}@{tag}")
        found.append(names)
    return tuple(found)


def names_of(plan: SnapshotPlan) -> tuple[DiskNames, ...]:
    """What the plan names; refuses a plan that names others than ours, since they will be removed.

    :raises SnapshotError: it is no plan of this mechanism
    """
    try:
        found = tuple(DiskNames(**entry) for entry in plan.data["disks"])
    except (KeyError, TypeError) as e:
        raise SnapshotError(f"the plan {plan.tag!r} is none of the mechanism zfs: {e}") from e
    for names in found:
        own = PurePosixPath(names.reader).name
        ours = own.startswith(f"{plan.tag}.") and own.removeprefix(f"{plan.tag}.").isdecimal()
        mounted = not names.mounted or PurePosixPath(names.mounted).name == own
        if (
            not (ours and mounted and NAME.fullmatch(names.dataset) and _TAG.fullmatch(plan.tag))
            or names.snapshot != f"{names.dataset}@{plan.tag}"
            or names.reader != beside(names.dataset, own)
        ):
            raise SnapshotError(f"the plan {plan.tag!r} names {names.snapshot} and {names.reader}, which are not its")
    return found


def to_data(names: Sequence[DiskNames]) -> Mapping[str, Any]:
    """The same for `SnapshotPlan.data`."""
    return {"disks": [asdict(each) for each in names]}


def pools_of(names: Sequence[DiskNames]) -> list[str]:
    """The pools in which they lie."""
    return sorted({pool_of(each.dataset) for each in names})


def index_of(snapshot: DiskSnapshot) -> int:
    """The number of its disk in the plan."""
    return snapshot.plan.disks.index(snapshot.disk)


def names_of_snapshot(snapshot: DiskSnapshot) -> DiskNames:
    """The names of one disk of a plan."""
    return names_of(snapshot.plan)[index_of(snapshot)]


@dataclass(frozen=True)
class CloneNames:
    """A writable clone for a duplicate, of a volume, or of a file system with all that is in it: then it is mounted at
    `mounted`, and `path` is the disk's file in it.
    """

    dataset: str
    path: str
    mounted: str


def choose_clone(snapshot: DiskSnapshot, duplicate: str, folder: Path) -> CloneNames:
    """The clone's names; a file system is mounted in `folder`.

    :raises SnapshotError: a name is too long
    """
    source = names_of_snapshot(snapshot)
    check_name(duplicate, "duplicate name")
    name = beside(source.dataset, snapshot.plan.tag, str(index_of(snapshot)), duplicate, "clone")
    _check_length(f"{name}@{snapshot.plan.tag}")
    mounted = str(folder.absolute() / PurePosixPath(name).name) if source.is_file else ""
    return CloneNames(name, source.path, mounted)


def clone_names_of(plan: ClonePlan) -> CloneNames:
    """What the plan names; refuses another than ours, since it will be removed.

    :raises SnapshotError: it is no plan of this mechanism
    """
    try:
        found = CloneNames(**plan.data)
    except TypeError as e:
        raise SnapshotError(f"the plan of a clone for {plan.name!r} is none of the mechanism zfs: {e}") from e
    own = PurePosixPath(found.dataset).name
    middle = own.removeprefix(f"{plan.snapshot.tag}.").removesuffix(f".{plan.name}.clone")
    mounted = not found.mounted or Path(found.mounted) == plan.folder.absolute() / own
    if not (NAME.fullmatch(found.dataset) and middle.isdecimal() and mounted):
        raise SnapshotError(f"the plan of a clone for {plan.name!r} names {found.dataset}, no clone of it")
    return found


def _check_length(*names: str) -> None:
    for name in names:
        if len(name) > _LONGEST:
            raise SnapshotError(f"{name} is too long a name for ZFS", cure="give the VM a shorter name")


def is_named_as_ours(name: str) -> bool:
    """Whether a data set or snapshot has a name as we give them; that alone does not make it ours."""
    dataset, _, snapshot = name.partition("@")
    return snapshot.startswith("vmsnap-") if snapshot else PurePosixPath(dataset).name.startswith("vmsnap-")
