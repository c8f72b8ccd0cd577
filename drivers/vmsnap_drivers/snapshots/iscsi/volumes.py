"""Backing stores that are thin logical volumes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, ClassVar, Final

from vmsnap.errors import SnapshotError, SnapshotInUse
from vmsnap_drivers.snapshots.iscsi.stores import VOLUME_PREFIX, Fill, Origin, Owned, Stores

_FIELDS: Final = (
    "lv_path,lv_size,lv_tags,lv_layout,origin,pool_lv,vg_name,vg_free,vg_extent_size,data_percent,metadata_percent"
)
_OURS: Final = "vmsnap-iscsi"
"""The tag of every volume that we have made. The mechanism lvm has another, and leaves ours alone."""
_PLAN: Final = "vmsnap.plan="
_KIND: Final = "vmsnap.kind="
_ALWAYS: Final = "activation{monitoring=0}"
_WITHOUT_UDEV: Final = "activation{udev_sync=0 udev_rules=0}"
_UDEV: Final = "/run/udev/control"
_FULL_PERCENT: Final = 90.0
_IN_USE: Final = re.compile(r"in use|is used by")
"""``lv_check_not_in_use`` in LVM's ``lib/activate/activate.c``."""
_NOT_IN_A_TAG: Final = re.compile(r"[^A-Za-z0-9_+.\-/=!:#&]")


class Volumes(Stores):
    """Thin snapshots of thin volumes, in their pool."""

    kind: ClassVar[str] = "volume"
    _has_udev: bool | None = None

    def look(self, path: str) -> Origin | None:
        """See `Stores.look`."""
        (found,) = self._lvs(path)
        if not found["pool_lv"]:
            return None
        (pool,) = self._lvs(f"{found['vg_name']}/{found['pool_lv'].strip('[]')}")
        for what in ("data", "metadata"):
            used = float(pool[f"{what}_percent"] or 0)
            if used >= _FULL_PERCENT:
                raise SnapshotError(
                    f"the thin pool of {path} is too full for a snapshot: {used:g}% of its {what} is used",
                    cure="extend the pool (lvextend), or remove volumes from it",
                )
        return Origin(self.kind, found["lv_path"], int(found["lv_size"]))

    def exists(self, path: str) -> bool:
        """See `Stores.exists`."""
        return any(row["lv_path"] == path for row in self._lvs())

    def snapshot(self, origin: str, path: str, tag: str, seconds: float) -> None:
        """See `Stores.snapshot`. It is not activated yet."""
        self._create(origin, path, "snapshot", tag, "--setactivationskip", "y", "--permission", "r", seconds=seconds)

    def settle(self, path: str) -> None:
        """See `Stores.settle`."""
        self._lvm("lvchange", "--activate", "y", "--ignoreactivationskip", path)

    def fill(self, origin: str) -> Fill | None:
        """See `Stores.fill`: the thin pool's data or metadata."""
        (found,) = self._lvs(origin)
        pool = f"{found['vg_name']}/{found['pool_lv'].strip('[]')}"
        (row,) = self._lvs(pool)
        used = max(float(row[f"{what}_percent"] or 0) for what in ("data", "metadata"))
        return Fill(f"the thin pool {pool}", used / 100)

    def clone(self, source: str, path: str, tag: str) -> None:
        """See `Stores.clone`."""
        self._create(source, path, "clone", tag, "--setactivationskip", "n", "--permission", "rw")

    def remove(self, path: str, tag: str) -> None:
        """See `Stores.remove`. Its tags are what makes it ours."""
        if any(row["lv_path"] == path and self._plan_of(row) == tag for row in self._lvs()):
            try:
                self._lvm("lvremove", "--force", path)
            except SnapshotError as e:
                if not _IN_USE.search(e.message):
                    raise
                raise SnapshotInUse(e.message, cure="end what has it open, then: vmsnap recover") from e

    def owned(self, origins: Iterable[str]) -> list[Owned]:
        """See `Stores.owned`: in all groups."""
        if self._runner.find("lvm") is None:
            return []
        rows = [row for row in self._lvs() if _OURS in row["lv_tags"].split(",")]
        return [Owned(_value(row, _KIND), row["lv_path"], self._plan_of(row)) for row in rows]

    def foreign(self, origins: Iterable[str]) -> list[str]:
        """See `Stores.foreign`: in all groups."""
        if self._runner.find("lvm") is None:
            return []
        paths = [row["lv_path"] for row in self._lvs() if _OURS not in row["lv_tags"].split(",")]
        return [path for path in paths if path.rpartition("/")[2].startswith(VOLUME_PREFIX)]

    def _plan_of(self, row: dict[str, Any]) -> str:
        return _value(row, _PLAN) if _OURS in row["lv_tags"].split(",") else ""

    def _create(self, origin: str, path: str, kind: str, tag: str, *more: str, seconds: float = 120.0) -> None:
        words = self._tags(kind, tag)
        self._lvm("lvcreate", "--snapshot", *more, *words, "--name", path.rpartition("/")[2], origin, seconds=seconds)

    def _tags(self, kind: str, tag: str) -> list[str]:
        tags = (_OURS, f"{_KIND}{kind}", f"{_PLAN}{tag}")
        return [word for each in tags for word in ("--addtag", _NOT_IN_A_TAG.sub("&", each))]

    def _lvs(self, *names: str) -> list[dict[str, Any]]:
        options = ["--reportformat", "json", "--units", "b", "--nosuffix", "--options", _FIELDS]
        text = self._lvm("lvs", *options, *names, changes=False)
        try:
            return [row for report in json.loads(text)["report"] for row in report["lv"]]
        except (ValueError, KeyError, TypeError) as e:
            raise SnapshotError(f"lvs does not report as expected: {e}") from e

    def _lvm(self, command: str, *words: str, seconds: float = 120.0, changes: bool = True) -> str:
        if self._has_udev is None:
            self._has_udev = self._ask(["test", "-e", _UDEV]).status == 0
        configuration = _ALWAYS if self._has_udev else f"{_ALWAYS} {_WITHOUT_UDEV}"
        return self._run(["lvm", command, "--config", configuration, *words], seconds, changes=changes)


def _value(row: dict[str, Any], key: str) -> str:
    return next((tag.removeprefix(key) for tag in row["lv_tags"].split(",") if tag.startswith(key)), "")
