"""What changes on a disk from an instant on: QEMU's dirty bitmaps, of which a disk bears one for each mark.

A bitmap stands on the disk's own node, below filter and overlay, and so sees whatever reaches the disk: the guest's
writes, zeros and discards, and what is committed from an overlay. In the pause it begins *pending*; when the backup is
committed it is *kept*, under the name that the mark bears. The one before goes on recording until then, so that a
backup that fails loses nothing, and each repository has one of its own. A bitmap answers for everything since its
instant: asked later, it names more than it must, never less.

In a qcow2 image a kept one is persistent: QEMU stores it when it ends orderly, and finds it inconsistent after it did
not. In a pre-copy QEMU would store it within the pause, when it hands its disks over, and a guest that ends with an
overlay has its last writes committed by another program. So, while an overlay may be there, it is *held* as a
transient one instead.

No QMP command renames a bitmap. A new one is added, which records at once, and the old one's content merged into it.

Sources: ``block/dirty-bitmap.c``, ``block/qcow2-bitmap.c``, ``block/monitor/bitmap-qmp-cmds.c`` of QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap_drivers.qemu.blocks.graph import CALL_SECONDS, PAUSE_CALL_SECONDS, BlockGraph
from vmsnap_drivers.snapshots.qcow2.names import DiskNames

_GRANULARITY_BYTES: Final = 64 * 1024
"""2 MiB of bitmap a TiB of disk; the repository's chunks are larger."""
_KEPT: Final = re.compile(r"vmsnap-since-[0-9a-f]{11}-[0-9a-f]{16}")
_HELD_SUFFIX: Final = ".held"
_PENDING_SUFFIX: Final = ".pending"


@dataclass(frozen=True)
class Bitmap:
    """One of our bitmaps as QEMU has it; `kept_as` is the name in its mark."""

    name: str
    kept_as: str
    persistent: bool
    whole: bool
    """It has recorded all the time: QEMU ended orderly since, and nobody switched it off."""


def choose_name() -> str:
    """A name for a bitmap that nobody has; those of later instants are greater."""
    return f"vmsnap-since-{time.time_ns() // 10**6:011x}-{secrets.token_hex(8)}"


def mark_of(disk: Disk, names: DiskNames) -> str:
    """The mark of the instant at which `names.bitmap` begins; empty where none does."""
    return f"{names.bitmap}/{disk.size_bytes}" if names.bitmap and not disk.read_only else ""


def parse_mark(mark: str) -> tuple[str, int]:
    """The bitmap's name, and the disk's size at the instant.

    :raises SnapshotError: it is none of our marks
    """
    name, _, size = mark.partition("/")
    if not _KEPT.fullmatch(name) or not size.isascii() or not size.isdecimal():
        raise SnapshotError("the older backup bears no mark of the mechanism qcow2")
    return name, int(size)


def find_all(graph: BlockGraph, disk: Disk) -> list[Bitmap]:
    """Our kept bitmaps of the disk, the oldest first.

    :raises SnapshotError: QEMU refused
    """
    return _kept_of(graph.node(disk.handle["node"]) or {})


def find(graph: BlockGraph, disk: Disk, kept_as: str) -> Bitmap | None:
    """The bitmap of that mark, held or not."""
    return next((found for found in find_all(graph, disk) if found.kept_as == kept_as), None)


def begin(graph: BlockGraph, disks: Iterable[tuple[Disk, DiskNames]]) -> None:
    """Let the pending bitmaps of all disks record from now on. One round trip; the guest is paused.

    :raises SnapshotError: QEMU refused; none was added
    """
    actions = [_add(disk, names.bitmap + _PENDING_SUFFIX) for disk, names in disks if mark_of(disk, names)]
    if actions:
        _transact(graph, actions, PAUSE_CALL_SECONDS)


def keep(graph: BlockGraph, disk: Disk, names: DiskNames) -> None:
    """Turn the pending bitmap into a kept one, a persistent one where the image can hold it. Idempotent.

    :raises SnapshotError: it is gone, or QEMU refused
    """
    present = _names_on(graph, disk)
    pending = names.bitmap + _PENDING_SUFFIX
    if names.bitmap not in present:
        if pending not in present:
            raise SnapshotError(f"the record of what changes on disk {disk.device} is gone")
        _rename(graph, disk, pending, names.bitmap, persistent=disk.format == "qcow2")
    elif pending in present:
        _remove(graph, disk, pending)


def remove_pending(graph: BlockGraph, disk: Disk, names: DiskNames) -> None:
    """Remove the pending bitmap; succeeds where there is none."""
    if names.bitmap + _PENDING_SUFFIX in _names_on(graph, disk):
        _remove(graph, disk, names.bitmap + _PENDING_SUFFIX)


def remove(graph: BlockGraph, disk: Disk, kept_as: str) -> None:
    """Remove the bitmap of a mark; succeeds where there is none."""
    for name in _names_on(graph, disk) & {kept_as, kept_as + _HELD_SUFFIX}:
        _remove(graph, disk, name)


def remove_broken(graph: BlockGraph, disk: Disk) -> None:
    """Remove bitmaps of ours that QEMU found inconsistent: they are of no use, and forbid to resize the disk."""
    for found in find_all(graph, disk):
        if not found.whole:
            _remove(graph, disk, found.name)


def remove_beyond(graph: BlockGraph, disk: Disk, count: int) -> None:
    """Remove the oldest until there are `count`."""
    kept = sorted({found.kept_as for found in find_all(graph, disk)})
    for kept_as in kept[: max(0, len(kept) - count)]:
        remove(graph, disk, kept_as)


def remove_everywhere(graph: BlockGraph, kept_as: Iterable[str]) -> None:
    """Remove these bitmaps from whatever nodes they are on."""
    wanted = set(kept_as)
    for node in graph.call("query-named-block-nodes", {"flat": True}):
        for found in _kept_of(node):
            if found.kept_as in wanted:
                graph.call("block-dirty-bitmap-remove", {"node": node["node-name"], "name": found.name})


def hold(graph: BlockGraph, disk: Disk) -> None:
    """Turn persistent bitmaps into transient ones for a while; see `let_go`. Idempotent.

    :raises SnapshotError: QEMU refused; each is there, as the one or the other
    """
    for found in find_all(graph, disk):
        if found.persistent:
            _rename(graph, disk, found.name, found.kept_as + _HELD_SUFFIX, persistent=False)


def let_go(graph: BlockGraph, disk: Disk) -> None:
    """Make held bitmaps persistent again. Idempotent.

    :raises SnapshotError: QEMU refused; each is there, as the one or the other
    """
    for found in find_all(graph, disk):
        if found.name != found.kept_as:
            _rename(graph, disk, found.name, found.kept_as, persistent=True)


def freeze(graph: BlockGraph, disk: Disk, names: DiskNames, found: Bitmap) -> None:
    """Copy a bitmap into `names.changes`, which records nothing and so can be exported.

    :raises SnapshotError: QEMU refused
    """
    _transact(graph, [_add(disk, names.changes, disabled=True), _merge(disk, names.changes, found.name)])


def remove_frozen(graph: BlockGraph, disk: Disk, names: DiskNames) -> None:
    """Remove that copy; succeeds where there is none."""
    if names.changes in _names_on(graph, disk):
        _remove(graph, disk, names.changes)


def _kept_of(node: Mapping[str, Any]) -> list[Bitmap]:
    found = []
    for bitmap in node.get("dirty-bitmaps", ()):
        name = str(bitmap.get("name", ""))
        kept_as = name.removesuffix(_HELD_SUFFIX)
        if _KEPT.fullmatch(kept_as):
            whole = bool(bitmap["recording"]) and not bitmap.get("inconsistent", False)
            found.append(Bitmap(name, kept_as, bool(bitmap["persistent"]), whole))
    return sorted(found, key=lambda one: one.name)


def _names_on(graph: BlockGraph, disk: Disk) -> set[str]:
    node = graph.node(disk.handle["node"]) or {}
    return {str(bitmap.get("name", "")) for bitmap in node.get("dirty-bitmaps", ())}


def _rename(graph: BlockGraph, disk: Disk, old: str, new: str, *, persistent: bool) -> None:
    merge = _merge(disk, new, old)
    if new in _names_on(graph, disk):
        _transact(graph, [merge])
    elif persistent:
        try:
            _transact(graph, [_add(disk, new, persistent=True), merge])
        except SnapshotError:
            # An image of the old qcow2 version, or one that holds as many as it can.
            _transact(graph, [_add(disk, new), merge])
    else:
        _transact(graph, [_add(disk, new), merge])
    _remove(graph, disk, old)


def _add(disk: Disk, name: str, *, persistent: bool = False, disabled: bool = False) -> dict[str, object]:
    bitmap = {"node": disk.handle["node"], "name": name, "granularity": _GRANULARITY_BYTES}
    return {
        "type": "block-dirty-bitmap-add",
        "data": {**bitmap, "persistent": persistent, "disabled": disabled},
    }


def _merge(disk: Disk, target: str, source: str) -> dict[str, object]:
    return {
        "type": "block-dirty-bitmap-merge",
        "data": {"node": disk.handle["node"], "target": target, "bitmaps": [source]},
    }


def _transact(
    graph: BlockGraph, actions: Sequence[Mapping[str, object]], timeout_seconds: float = CALL_SECONDS
) -> None:
    graph.call("transaction", {"actions": list(actions)}, timeout_seconds=timeout_seconds)


def _remove(graph: BlockGraph, disk: Disk, name: str) -> None:
    graph.call("block-dirty-bitmap-remove", {"node": disk.handle["node"], "name": name})
