"""The names of all that a snapshot makes, chosen by `plan` before anything exists.

They are the mechanism's part of a `SnapshotPlan` and are enough to find everything again: the nodes in QEMU's block
graph, the files, the socket. QEMU takes node names of 31 bytes at most, so they carry a digest of the tag; files carry
the tag itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.errors import ProtocolError, SnapshotError, UsageError
from vmsnap.model import Disk, Json, SnapshotPlan, check_name, from_json, to_json
from vmsnap_drivers.qemu.blocks.overlay import OverlayNames

MECHANISM: Final = "qcow2"
TAG_PREFIX: Final = "vmsnap-"
COPY_SUFFIX: Final = ".plan.json"


@dataclass(frozen=True)
class DiskNames(OverlayNames):
    """What is made for one disk. All paths are absolute.

    `filter`, `target` and `access` are names of block nodes; `access` and `target` are exports too. `bitmap` records
    what changes from the instant on, empty where nothing is to; `changes` is a copy of an older one, and its export.
    """

    target: str
    access: str
    target_file: str
    bitmap: str
    changes: str


@dataclass(frozen=True)
class PlanNames:
    """What is made for one plan: the monitor through which, per disk, and for all disks together a socket and a
    record of the plan in vmsnap's state folder.
    """

    monitor: str
    disks: tuple[DiskNames, ...]
    socket: str
    record: str

    @property
    def records(self) -> tuple[str, ...]:
        """Where the plan is written down: in the state folder, and beside its files, should that be lost."""
        tag, state = Path(self.record).stem, Path(self.record).parent
        folders = dict.fromkeys(Path(disk.target_file).parent for disk in self.disks)
        return (self.record, *(str(folder / f"{tag}{COPY_SUFFIX}") for folder in folders if folder != state))

    def to_data(self) -> Json:
        """As the `data` of a `SnapshotPlan`."""
        return {
            "monitor": self.monitor,
            "socket": self.socket,
            "record": self.record,
            "disks": [vars(disk) for disk in self.disks],
        }

    @classmethod
    def of(cls, plan: SnapshotPlan) -> PlanNames:
        """Read the names from a plan of this mechanism.

        :raises ProtocolError: it is another's, or not whole
        """
        if plan.mechanism != MECHANISM:
            raise ProtocolError(f"a plan of mechanism {plan.mechanism!r} was given to {MECHANISM!r}")
        try:
            names = from_json(to_json(plan.data), cls)
        except ValueError as e:
            raise ProtocolError(f"the plan {plan.tag} has lost its names: {e}") from e
        if len(names.disks) != len(plan.disks):
            raise ProtocolError(f"the plan {plan.tag} names {len(names.disks)} of {len(plan.disks)} disks")
        return names


def choose_names(
    tag: str,
    disks: tuple[Disk, ...],
    folders: tuple[Path, ...],
    state_folder: Path,
    *,
    overlays: bool,
    bitmaps: tuple[str, ...],
) -> PlanNames:
    """Choose names for `disks`, the files of each in its folder of `folders`, its bitmap's name in `bitmaps`.

    :raises SnapshotError: the tag is none, or the disks belong to different VMs
    """
    try:
        check_name(tag, "tag")
    except UsageError as e:
        raise SnapshotError(e.message, cure=e.cure) from e
    if not tag.startswith(TAG_PREFIX):
        raise SnapshotError(f"the tag {tag!r} does not begin with {TAG_PREFIX!r}")
    monitors = {disk.handle["qmp"] for disk in disks}
    if len(monitors) != 1:
        raise SnapshotError("the disks of a snapshot must be those of one VM")
    short = TAG_PREFIX + hashlib.blake2s(tag.encode(), digest_size=6).hexdigest()
    chosen = []
    for number, (folder, bitmap) in enumerate(zip(folders, bitmaps, strict=True)):
        node = f"{short}-{number}"
        chosen.append(
            DiskNames(
                filter=f"{node}-filter",
                target=f"{node}-target",
                access=f"{node}-access",
                overlay=f"{node}-overlay",
                image=f"{node}-image",
                commit_job=f"{node}-commit",
                target_file=str(folder / f"{tag}.{number}.before.qcow2"),
                overlay_file=str(folder / f"{tag}.{number}.overlay.qcow2") if overlays else "",
                bitmap=bitmap,
                changes=f"{node}-changes",
            )
        )
    return PlanNames(
        monitor=monitors.pop(),
        disks=tuple(chosen),
        socket=str(state_folder / f"{tag}.nbd"),
        record=str(state_folder / f"{tag}.json"),
    )
