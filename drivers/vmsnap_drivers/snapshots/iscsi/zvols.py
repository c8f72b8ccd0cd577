"""Backing stores that are volumes of OpenZFS."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Final

from vmsnap.errors import SnapshotError, SnapshotInUse, VmsnapError
from vmsnap_drivers.runner import one_line
from vmsnap_drivers.snapshots.iscsi.stores import VOLUME_PREFIX, Fill, Origin, Owned, Stores

_NODES: Final = "/dev/zvol/"
_NUMBERED: Final = re.compile(r"/dev/zd\d+")
_LONGEST: Final = 255
"""``ZFS_MAX_DATASET_NAME_LEN`` without its NUL (``include/sys/fs/zfs.h`` of OpenZFS 2.1)."""
# What makes something ours. The mechanism zfs has other properties, and leaves these alone.
KIND: Final = "vmsnap-iscsi:kind"
_PLAN: Final = "vmsnap-iscsi:plan"
_NAME: Final = "vmsnap-iscsi:name"
_SPACE: Final = ("volsize", "refreservation", "usedbydataset", "used", "available", "quota")
_FULL: Final = 0.9
"""How full a pool, or a quota, may be for a snapshot to be made."""
# Of the file system beside which they lie they would inherit others. A guest's partitions are no devices there.
_VOLUME: Final = ("-o", "volmode=dev", "-o", "com.sun:auto-snapshot=false")
_BUSY_SECONDS: Final = 10.0
_NODE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True)
class _Ours:
    """A volume or a snapshot that we have made: a ``snapshot`` (that itself, or the volume by which it is read) or a
    ``clone``, for the plan `plan`; `path` is where that volume is, or would be. `waits`: it goes with its last clone.
    """

    dataset: str
    kind: str
    plan: str
    path: str
    waits: bool

    @property
    def is_volume(self) -> bool:
        """It has a device."""
        return "@" not in self.dataset


class Zvols(Stores):
    """Snapshots of volumes, each read through a read-only clone of it: a snapshot itself has no device by default."""

    kind: ClassVar[str] = "zvol"

    def look(self, path: str) -> Origin | None:
        """See `Stores.look`."""
        if _NUMBERED.fullmatch(path):
            raise SnapshotError(
                f"{path} is a volume of ZFS by a number that may be another's tomorrow",
                cure="let the target have it as /dev/zvol/POOL/VOLUME",
            )
        if not path.startswith(_NODES):
            return None
        volume = _dataset(path)
        has = self._space(*_lineage(volume))
        fill = _fullest(volume, has)
        if fill.used >= _FULL:
            raise SnapshotError(
                f"{fill.what} is too full for a snapshot: {fill.used:.0%} is used",
                cure="free room, add a disk to the pool or raise the quota",
            )
        # A volume that has its room for sure must have it beside the snapshot (dsl_dataset_snapshot_reserve_space).
        needed = min(has[volume, "refreservation"], has[volume, "usedbydataset"])
        for what, (used, size) in _limits(volume, has).items():
            if needed > size - used:
                raise SnapshotError(
                    f"no room in {what.removeprefix('the ')} for a snapshot of {volume}: {needed} bytes are needed to"
                    f" keep what it has reserved, {max(0, size - used)} are free",
                    cure="free room, or make the volume sparse (zfs set refreservation=none)",
                )
        return Origin(self.kind, path, has[volume, "volsize"])

    def beside(self, origin: str, tag: str, index: int, clone: str = "") -> str:
        """See `Stores.beside`."""
        path = super().beside(origin, tag, index, clone)
        if len(path) - len(_NODES) > _LONGEST:
            raise SnapshotError(
                f"{_dataset(path)} is longer than the names that ZFS takes", cure="shorten the volume's"
            )
        return path

    def exists(self, path: str) -> bool:
        """See `Stores.exists`."""
        return self._ask(["zfs", "get", "-H", "-o", "value", "type", _dataset(path)]).status == 0

    def prepare(self, origin: str, path: str, tag: str) -> None:
        """See `Stores.prepare`: little is left to be written back in the pause."""
        self._run(["sync", origin])

    def snapshot(self, origin: str, path: str, tag: str, seconds: float) -> None:
        """See `Stores.snapshot`. ZFS does not know what of a volume is in the page cache of its host, where tgt leaves
        what nobody has flushed: that is written back before.
        """
        deadline = time.monotonic() + seconds
        self._run(["sync", origin], seconds)
        seconds = max(0.0, deadline - time.monotonic())
        argv = ["zfs", "snapshot", *_marked("snapshot", tag, path), f"{_dataset(origin)}@{tag}"]
        self._run(argv, seconds, changes=True)

    def settle(self, path: str) -> None:
        """See `Stores.settle`."""
        if not self.exists(path):
            taken = self._taken(path)
            argv = ["zfs", "clone", "-o", "readonly=on", *_VOLUME, *_marked("snapshot", taken.plan, path)]
            self._run([*argv, taken.dataset, _dataset(path)], changes=True)
        self._await_node(path)

    def fill(self, origin: str) -> Fill | None:
        """See `Stores.fill`: the pool, or a quota of what the volume lies in, whichever is fuller."""
        volume = _dataset(origin)
        return _fullest(volume, self._space(*_lineage(volume)))

    def clone(self, source: str, path: str, tag: str) -> None:
        """See `Stores.clone`. The snapshot stays in the pool until it goes too."""
        argv = ["zfs", "clone", "-o", "readonly=off", *_VOLUME, *_marked("clone", tag, path)]
        self._run([*argv, self._taken(source).dataset, _dataset(path)], changes=True)
        self._await_node(path)

    def remove(self, path: str, tag: str) -> None:
        """See `Stores.remove`. Its properties are what makes it ours."""
        ours = self._made(path, tag)
        if not ours:
            # It may just be made, by a command that has outlived whoever gave it. (Of a pool that is gone: not.)
            with suppress(VmsnapError):  # it is not allowed, or not installed: what is there now counts
                self._ask(["zpool", "sync", _lineage(_dataset(path))[0]], changes=True)
            ours = self._made(path, tag)
        for each in sorted(ours, key=lambda each: not each.is_volume):
            self._destroy(*([] if each.is_volume else ["-d"]), each.dataset)

    def owned(self, origins: Iterable[str]) -> list[Owned]:
        """See `Stores.owned`: in all pools, where some origin is a volume."""
        if not any(origin.startswith(_NODES) for origin in origins):
            return []
        found = {each.path: Owned(each.kind, each.path, each.plan) for each in self._ours() if not each.waits}
        return list(found.values())

    def foreign(self, origins: Iterable[str]) -> list[str]:
        """See `Stores.foreign`: volumes in all pools, where some origin is one."""
        if not any(origin.startswith(_NODES) for origin in origins):
            return []
        ours = {each.dataset for each in self._ours()}
        names = self._run(["zfs", "list", "-H", "-t", "volume", "-o", "name"]).splitlines()
        return [
            f"{_NODES}{name}"
            for name in names
            if name.rpartition("/")[2].startswith(VOLUME_PREFIX) and name not in ours
        ]

    def _made(self, path: str, tag: str) -> list[_Ours]:
        return [each for each in self._ours() if (each.path, each.plan) == (path, tag)]

    def _taken(self, path: str) -> _Ours:
        found = [each for each in self._ours() if each.path == path and not each.is_volume]
        if not found:
            raise SnapshotError(f"the snapshot that was to be read at {path} is not there any more")
        return found[0]

    def _ours(self) -> list[_Ours]:
        asked = ",".join((KIND, _PLAN, _NAME, "defer_destroy"))
        argv = ["zfs", "get", "-H", "-t", "volume,snapshot", "-o", "name,property,value,source", asked]
        found: dict[str, dict[str, str]] = {}
        for row in (line.split("\t") for line in self._run(argv).splitlines()):
            # What was made by others of ours or below it may inherit properties.
            if len(row) == 4 and (row[3] == "local" or row[1] == "defer_destroy"):
                found.setdefault(row[0], {})[row[1]] = row[2]
        return [
            _Ours(dataset, has[KIND], has[_PLAN], _beside(dataset, has[_NAME]), has.get("defer_destroy") == "on")
            for dataset, has in found.items()
            if {KIND, _PLAN, _NAME} <= has.keys()
        ]

    def _space(self, *datasets: str) -> dict[tuple[str, str], int]:
        text = self._run(["zfs", "get", "-Hp", "-o", "name,property,value", ",".join(_SPACE), *datasets])
        rows = (line.split("\t") for line in text.splitlines())
        return {(row[0], row[1]): int(row[2]) if row[2].isdecimal() else 0 for row in rows if len(row) == 3}

    def _await_node(self, path: str) -> None:
        deadline = time.monotonic() + _NODE_SECONDS
        while self._ask(["test", "-b", path]).status:
            if time.monotonic() > deadline:
                raise SnapshotError(
                    f"{path} does not appear within {_NODE_SECONDS:g} s", cure="see that udev runs there"
                )
            time.sleep(_POLL_SECONDS)

    def _destroy(self, *words: str) -> None:
        deadline = time.monotonic() + _BUSY_SECONDS
        while (done := self._ask(["zfs", "destroy", *words], changes=True)).status:
            # udev looks at a volume that is new, whoever read it has closed it just now
            busy = "busy" in done.stderr
            if not busy or time.monotonic() > deadline:
                kind = SnapshotInUse if busy else SnapshotError
                raise kind(f"zfs destroy failed: {one_line(done.stderr) or f'status {done.status}'}")
            time.sleep(_POLL_SECONDS)


def _dataset(path: str) -> str:
    return path.removeprefix(_NODES)


def _lineage(dataset: str) -> list[str]:
    """A data set and all that it lies in, from its pool on."""
    words = dataset.split("/")
    return ["/".join(words[:count]) for count in range(1, len(words) + 1)]


def _limits(volume: str, has: Mapping[tuple[str, str], int]) -> Mapping[str, tuple[int, int]]:
    """What bounds a volume, as messages call it: how much is used, and how much there is in all."""
    pool, *above = _lineage(volume)
    used, available = has[pool, "used"], has[pool, "available"]
    quotas = {f"the quota of {name}": (has[name, "used"], has.get((name, "quota"), 0)) for name in (pool, *above)}
    return {f"the pool {pool}": (used, used + available), **{what: of for what, of in quotas.items() if of[1]}}


def _fullest(volume: str, has: Mapping[tuple[str, str], int]) -> Fill:
    fills = [Fill(what, used / max(1, size)) for what, (used, size) in _limits(volume, has).items()]
    return max(fills, key=lambda fill: fill.used)


def _marked(kind: str, plan: str, path: str) -> list[str]:
    has = {KIND: kind, _PLAN: plan, _NAME: path.rpartition("/")[2]}
    return [word for key, value in has.items() for word in ("-o", f"{key}={value}")]


def _beside(dataset: str, name: str) -> str:
    """Where the volume `name` lies beside a volume, or beside that of which `dataset` is a snapshot."""
    return f"{_NODES}{dataset.partition('@')[0].rpartition('/')[0]}/{name}"
