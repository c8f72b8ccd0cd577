"""The record of each plan in vmsnap's state folder: by it, files beside disks are found without asking any VM.

A copy lies beside the files. When the state folder is lost, that is found by way of the nodes in a running QEMU.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vmsnap import durable
from vmsnap.errors import ProtocolError, SnapshotError
from vmsnap.model import OwnedResource, SnapshotPlan, from_json, to_json
from vmsnap_drivers.snapshots.qcow2.names import COPY_SUFFIX, MECHANISM, PlanNames


def write(plan: SnapshotPlan, names: PlanNames) -> None:
    """Write the record and its copies, 0600, in this order; each is durable before the next. Blocks.

    :raises SnapshotError: there is one already, or one cannot be written
    """
    for path in names.records:
        _write(plan, Path(path))


def remove(names: PlanNames) -> None:
    """Remove copies and record; succeeds where there are none.

    :raises OSError: one cannot be removed
    """
    durable.remove(*map(Path, reversed(names.records)))


def _write(plan: SnapshotPlan, path: Path) -> None:
    try:
        durable.create(path, to_json(plan))
    except OSError as e:
        raise SnapshotError(f"the record {path} cannot be written: {e.strerror}") from e


def list_owned(folder: Path) -> Sequence[OwnedResource]:
    """List the files that exist of all plans recorded in `folder`, the records included."""
    found: list[OwnedResource] = []
    for path in sorted(folder.glob("*.json")):
        found.append(OwnedResource("record", str(path), path.stem, MECHANISM))
        try:
            plan = from_json(path.read_bytes(), SnapshotPlan)
            names = PlanNames.of(plan)
        except (OSError, ValueError, ProtocolError):
            continue  # it is listed itself, and says no more
        files = [("socket", names.socket), *(("record", copy) for copy in names.records[1:])]
        for own in names.disks:
            files.append(("old blocks", own.target_file))
            if own.overlay_file:
                overlays = (own.overlay_file, own.committing_file, own.pivoting_file)
                files += [("overlay", name) for name in overlays]
        found += [OwnedResource(kind, name, plan.tag, MECHANISM) for kind, name in files if Path(name).exists()]
    return found


def plan_of(owned: OwnedResource, folder: Path) -> SnapshotPlan | None:
    """The recorded plan in which something that `list_owned` named was made; None where it cannot be read."""
    try:
        return from_json((folder / f"{owned.tag}.json").read_bytes(), SnapshotPlan)
    except (OSError, ValueError):
        return None


def read_copy(path: Path) -> SnapshotPlan | None:
    """The plan in a copy of a record; None where there is none that this user wrote, and nobody else can have."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            plan = from_json(file.read(), SnapshotPlan)
            return plan if path.name == f"{plan.tag}{COPY_SUFFIX}" and str(path) in PlanNames.of(plan).records else None
    except (OSError, ValueError, ProtocolError):
        return None
