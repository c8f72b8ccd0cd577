"""Logical volumes as ``lvs`` tells of them (lvs(8), LVM 2.03.16)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmsnap.errors import SnapshotError

FIELDS: Final = (
    "vg_name,vg_uuid,vg_free,vg_extent_size,lv_name,lv_uuid,lv_attr,lv_size,lv_tags,origin,pool_lv,data_percent,"
    "metadata_percent,thin_id,lv_dm_path,lv_layout,lv_suspended,chunk_size"
)
OURS: Final = "vmsnap"
"""The tag of every volume that we have made."""
_PLAN: Final = "vmsnap.plan="
_KIND: Final = "vmsnap.kind="
OF: Final = "vmsnap.of="
"""Begins the tag that holds the address of the disk whose record of changes a volume is."""
_NOT_IN_A_TAG: Final = re.compile(r"[^A-Za-z0-9_+.\-/=!:#&]")


@dataclass(frozen=True)
class Volume:
    """One logical volume. `used_percent` is how full a thick snapshot or a thin pool's data is."""

    group: str
    name: str
    group_uuid: str
    uuid: str
    attributes: str
    size_bytes: int
    tags: frozenset[str]
    origin: str
    pool: str
    used_percent: float
    metadata_percent: float
    thin_id: int | None
    device: str
    layout: frozenset[str]
    suspended: bool
    chunk_bytes: int
    group_free_bytes: int
    extent_bytes: int

    @property
    def full_name(self) -> str:
        """As commands take it: ``vg/lv``."""
        return f"{self.group}/{self.name}"

    @property
    def thin(self) -> bool:
        """It lies in a thin pool."""
        return bool(self.pool)

    @property
    def overflowed(self) -> bool:
        """A thick snapshot that ran full and is lost: attribute 5 is ``I`` (lvs(8))."""
        return self.attributes[4:5] in ("I", "S")

    @property
    def ours(self) -> bool:
        """We have made it."""
        return OURS in self.tags

    @property
    def plan(self) -> str:
        """The tag of the snapshot plan for which we have made it."""
        return self.tag_value(_PLAN)

    @property
    def kind(self) -> str:
        """What we have made it for: ``snapshot``, ``clone`` or ``mark``."""
        return self.tag_value(_KIND)

    @property
    def owned_name(self) -> str:
        """As `OwnedResource` has it: what lies in a disk that the host knows is nobody's stray."""
        address = self.tag_value(OF)
        return f"{self.full_name} of {address}" if address else self.full_name

    def tag_value(self, key: str) -> str:
        """What stands behind `key` in a tag; empty where no tag begins so."""
        return next((tag.removeprefix(key) for tag in self.tags if tag.startswith(key)), "")


def tags_of(kind: str, plan: str, *more: str) -> tuple[str, ...]:
    """The arguments that give a volume its tags when it is made."""
    tags = (OURS, f"{_KIND}{kind}", f"{_PLAN}{plan}", *more)
    return tuple(word for tag in tags for word in ("--addtag", _NOT_IN_A_TAG.sub("&", tag)))


def parse(text: str) -> list[Volume]:
    """The volumes in ``lvs --reportformat json``. A volume of several segments is told of several times, and is one.

    :raises SnapshotError: it is no such report
    """
    try:
        rows = [row for report in json.loads(text)["report"] for row in report["lv"]]
        return list({row["lv_uuid"]: _volume(row) for row in rows}.values())
    except (ValueError, KeyError, TypeError) as e:
        raise SnapshotError(f"lvs does not report as expected: {e}") from e


def named(volumes: Sequence[Volume], group: str, name: str) -> Volume | None:
    """The volume of that name."""
    return next((volume for volume in volumes if (volume.group, volume.name) == (group, name)), None)


def foreign(volumes: Sequence[Volume]) -> Iterator[Volume]:
    """Those that bear a name as ours do, and that we have not made."""
    return (volume for volume in volumes if volume.name.startswith("vmsnap-") and not volume.ours)


def _volume(row: dict[str, Any]) -> Volume:
    return Volume(
        group=row["vg_name"],
        name=row["lv_name"].strip("[]"),
        group_uuid=row["vg_uuid"].replace("-", ""),
        uuid=row["lv_uuid"].replace("-", ""),
        attributes=row["lv_attr"],
        size_bytes=int(row["lv_size"]),
        tags=frozenset(filter(None, row["lv_tags"].split(","))),
        origin=row["origin"].strip("[]"),
        pool=row["pool_lv"].strip("[]"),
        used_percent=float(row["data_percent"] or 0),
        metadata_percent=float(row["metadata_percent"] or 0),
        thin_id=int(row["thin_id"]) if row["thin_id"] else None,
        device=row["lv_dm_path"],
        layout=frozenset(row["lv_layout"].split(",")),
        suspended=row["lv_suspended"] == "suspended",
        chunk_bytes=int(row["chunk_size"] or 0),
        group_free_bytes=int(row["vg_free"]),
        extent_bytes=int(row["vg_extent_size"]),
    )
