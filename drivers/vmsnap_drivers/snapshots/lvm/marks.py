"""Records of changes: thin snapshots that are kept when their backup is done, to be compared with later ones.

They stand nowhere but in the volume group: their tags say what they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap.model import DiskSnapshot
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.names import VolumeNames, choose_name, names_of_snapshot
from vmsnap_drivers.snapshots.lvm.volumes import OF, Volume, named, tags_of

_VM: Final = "vmsnap.vm="
_ORIGIN: Final = "vmsnap.origin="
_TIME: Final = "vmsnap.time="


def mark_of(tag: str, index: int, names: VolumeNames) -> str:
    """The mark of a snapshot: the name of the volume that will be kept for it."""
    return f"{names.group}/{choose_name(names.group, tag, index, 'mark')}"


def keep(lvm: Lvm, snapshot: DiskSnapshot, instead_of: str, most: int) -> None:
    """Keep the snapshot's mark, and at most so many of this disk. Idempotent.

    :raises SnapshotError: it cannot be
    """
    names = names_of_snapshot(snapshot)
    group, _, name = snapshot.mark.partition("/")
    if named(lvm.volumes([group]), group, name) is None:
        about = (
            f"{_VM}{snapshot.plan.vm}",
            f"{_ORIGIN}{names.origin_uuid}",
            f"{_TIME}{time.time_ns()}",
            f"{OF}{names.device}",
        )
        lvm.change(
            "lvcreate", "--snapshot", "--setactivationskip", "y", "--permission", "r",
            *tags_of("mark", snapshot.plan.tag, *about), "--name", name, f"{group}/{names.snapshot}",
        )  # fmt: skip
    kept = _marks(lvm.volumes([group]), names.origin_uuid)
    given_up = [mark for mark in kept if mark.full_name == instead_of and mark.full_name != snapshot.mark]
    left = [mark for mark in kept if mark not in given_up]
    lvm.remove([*given_up, *left[: max(0, len(left) - most)]])


def find(volumes: Sequence[Volume], mark: str, origin_uuid: str, present: Volume) -> Volume:
    """The kept snapshot that bears the mark, to be compared with the present one.

    :raises SnapshotError: it is no mark of this disk, it is gone, or the disk had another size then, or another pool
    """
    found = next((volume for volume in _marks(volumes, origin_uuid) if volume.full_name == mark), None)
    if found is None:
        raise SnapshotError(f"no snapshot {mark!r} of this disk was kept to compare with")
    if found.size_bytes != present.size_bytes:
        raise SnapshotError(f"the disk had {found.size_bytes} bytes at {mark}, now {present.size_bytes}")
    if found.pool != present.pool:
        raise SnapshotError(f"the disk was in the thin pool {found.pool} at {mark}, now in {present.pool}")
    return found


def forget(lvm: Lvm, vm: str) -> None:
    """Remove all that are kept for this VM.

    :raises SnapshotError: one cannot be removed
    """
    lvm.remove([volume for volume in lvm.volumes() if _is_mark(volume) and volume.tag_value(_VM) == vm])


def _marks(volumes: Sequence[Volume], origin_uuid: str) -> list[Volume]:
    """Those of one disk, the oldest first."""
    kept = [volume for volume in volumes if _is_mark(volume) and volume.tag_value(_ORIGIN) == origin_uuid]
    return sorted(kept, key=lambda volume: int(volume.tag_value(_TIME) or 0))


def _is_mark(volume: Volume) -> bool:
    return volume.ours and volume.kind == "mark"
