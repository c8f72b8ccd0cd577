"""What a plan of this mechanism names, as it stands in the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmsnap.errors import SnapshotError
from vmsnap.model import ClonePlan, DiskSnapshot, SnapshotPlan, check_name
from vmsnap_drivers.snapshots.iscsi.address import LunAddress, is_iqn, name_beside, parse
from vmsnap_drivers.snapshots.iscsi.stores import Stores

SERVERS = ("tgt", "lio")
"""The names of what can serve targets."""


@dataclass(frozen=True)
class LunNames:
    """One disk of a plan: its LUN (`address`), what serves it (`server`), the backing store of that (`origin`, of the
    kind `kind`), the snapshot to be made of it, and the target by which that is exported.
    """

    address: str
    server: str
    kind: str
    origin: str
    snapshot: str
    target: str

    @property
    def lun(self) -> LunAddress:
        """Where the disk is.

        :raises SnapshotError: the plan names no LUN
        """
        found = parse(self.address)
        if found is None:
            raise SnapshotError(f"{self.address!r} is no LUN")
        return found

    @property
    def exported(self) -> LunAddress:
        """Where the snapshot is."""
        return self.lun.beside(self.target)


@dataclass(frozen=True)
class CloneNames:
    """A writable disk for a duplicate: disk number `index` of its plan, its backing store, its target; `log_in` where
    Linux' own initiator is to bring it to this host.
    """

    index: int
    path: str
    target: str
    log_in: bool = False


def target_of(lun: LunAddress, tag: str, index: int) -> str:
    """The name of the target that exports a snapshot."""
    return name_beside(lun.target, f"{tag}.{index}")


def clone_target_of(lun: LunAddress, name: str, index: int) -> str:
    """The name of the target that exports a clone for the duplicate `name`: of one disk its name alone."""
    check_name(name, "duplicate name")
    return name_beside(lun.target, f"{name}.{index}" if index else name)


def to_data(luns: Sequence[LunNames]) -> Mapping[str, Any]:
    """The names for `SnapshotPlan.data`."""
    return {"luns": [asdict(names) for names in luns]}


def names_of(plan: SnapshotPlan, kinds: Mapping[str, Stores]) -> tuple[LunNames, ...]:
    """What the plan names; refuses a plan that names others than ours, since they will be removed.

    :raises SnapshotError: it is no plan of this mechanism
    """
    try:
        found = tuple(LunNames(**entry) for entry in plan.data["luns"])
        for index, names in enumerate(found):
            ours = kinds[names.kind].beside(names.origin, plan.tag, index)
            if names.server not in SERVERS:
                raise SnapshotError(
                    f"the plan {plan.tag!r} is none of the mechanism iscsi: the server {names.server!r}"
                )
            absolute = names.origin.startswith("/") and ".." not in names.origin.split("/")
            if not absolute or names.snapshot != ours or names.target != target_of(names.lun, plan.tag, index):
                raise SnapshotError(f"the plan {plan.tag!r} names {names.snapshot}, no snapshot of it")
    except (KeyError, TypeError) as e:
        raise SnapshotError(f"the plan {plan.tag!r} is none of the mechanism iscsi: {e}") from e
    return found


def index_of(snapshot: DiskSnapshot) -> int:
    """Which disk of its plan that is."""
    return snapshot.plan.disks.index(snapshot.disk)


def clone_names_of(plan: ClonePlan, kinds: Mapping[str, Stores]) -> CloneNames:
    """What the plan names; refuses another than ours, since it will be removed.

    :raises SnapshotError: it is no plan of this mechanism
    """
    all_names = names_of(plan.snapshot, kinds)
    try:
        found = CloneNames(**plan.data)
        source = all_names[found.index]
        wanted = kinds[source.kind].beside(source.origin, plan.snapshot.tag, found.index, plan.name)
    except (TypeError, IndexError) as e:
        raise SnapshotError(f"the plan of a clone for {plan.name!r} is none of the mechanism iscsi: {e}") from e
    if found.path != wanted or found.target != clone_target_of(source.lun, plan.name, found.index):
        raise SnapshotError(f"the plan of a clone for {plan.name!r} names {found.path}, no clone of it")
    return found


def is_name_of_ours(target: str) -> bool:
    """Whether a target is called as the exports of snapshots are, or as those of the disks of duplicates."""
    return is_iqn(target) and target.partition(":")[2].startswith(("vmsnap-", "bk-"))
