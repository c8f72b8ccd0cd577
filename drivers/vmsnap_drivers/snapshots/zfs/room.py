"""Whether there is room for snapshots: what guests overwrite stays in the pool, and in the quota, while they live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap_drivers.snapshots.zfs.commands import Zfs, lineage

_ASKED: Final = ("used", "available", "quota", "refreservation", "usedbydataset")


@dataclass(frozen=True)
class Fill:
    """How full a pool, or the quota of a data set, is: from 0 to 1."""

    what: str
    used: float


def fills(zfs: Zfs, datasets: Sequence[str]) -> list[Fill]:
    """How full the pools of these data sets are, and the quotas of them and of all that they lie in: a quota is not
    inherited, and counts all the same.

    :raises SnapshotError: one is not there
    """
    result = []
    for name, has in zfs.properties(_with_all_above(datasets), _ASKED).items():
        used, available, quota = (_number(has, key) for key in ("used", "available", "quota"))
        if "/" not in name:
            result.append(Fill(f"pool {name}", used / max(1, used + available)))
        if quota:
            result.append(Fill(f"the quota of {name}", used / quota))
    return result


def check(zfs: Zfs, datasets: Sequence[str], limit_percent: int) -> None:
    """See that snapshots of these data sets endanger nobody, and can be made.

    :raises SnapshotError: a pool or a quota is too full, or a volume's reservation cannot be made once more
    """
    for fill in fills(zfs, datasets):
        if fill.used * 100 >= limit_percent:
            raise SnapshotError(
                f"{fill.what} is too full for a snapshot: {fill.used:.0%} is used, {limit_percent}% is the limit",
                cure="free room, add a disk to the pool or raise the quota, or set pool_limit",
            )
    needed: dict[str, int] = {}
    found = zfs.properties(_with_all_above(datasets), _ASKED)
    for name in datasets:
        has = found[name]
        # A volume that has its room for sure must have it beside the snapshot (dsl_dataset_snapshot_reserve_space).
        reserved = min(_number(has, "refreservation"), _number(has, "usedbydataset"))
        for above in lineage(name):
            needed[above] = needed.get(above, 0) + reserved
    for name, size in needed.items():
        for what, free in _free(name, found[name]).items():
            if size > free:
                raise SnapshotError(
                    f"no room in {what}: {size} bytes are needed to keep what its volumes have reserved, {free} are"
                    " free",
                    cure="free room, or make the volumes sparse (zfs set refreservation=none)",
                )


def _free(name: str, has: Mapping[str, str]) -> Mapping[str, int]:
    """What is free in a pool, and in a quota, by what messages call it."""
    found = {} if "/" in name else {f"pool {name}": _number(has, "available")}
    if quota := _number(has, "quota"):
        found[f"the quota of {name}"] = max(0, quota - _number(has, "used"))
    return found


def _with_all_above(datasets: Sequence[str]) -> list[str]:
    return sorted({each for dataset in datasets for each in lineage(dataset)})


def _number(has: Mapping[str, str], key: str) -> int:
    text = has.get(key, "")
    return int(text) if text.isdecimal() else 0  # what has no such property has "-"
