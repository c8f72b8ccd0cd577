"""What ``vmsnap doctor`` says of LVM on this host."""

from __future__ import annotations

from collections.abc import Sequence

from vmsnap.errors import SnapshotError, VmsnapError
from vmsnap.model import Finding
from vmsnap_drivers.snapshots.lvm import thinmap
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.volumes import Volume, foreign


def examine(lvm: Lvm, limit_percent: int) -> Sequence[Finding]:
    """LVM itself, the tools for thin pools, how full pools and our snapshots are, and what looks like ours and is not.
    Changes nothing.
    """
    try:
        lvm.check_usable()
        found = [Finding("lvm2", "ok", f"version {lvm.version()}")]
        volumes = lvm.volumes()
    except VmsnapError as e:
        return [Finding("lvm2", "missing", e.message, e.cure)]
    pools = [volume for volume in volumes if "pool" in volume.layout and "thin" in volume.layout]
    if pools and lvm.runner.find("thin_dump") is None:
        found.append(
            Finding("thin_dump", "missing", "it is not installed: all of each thin volume is read", thinmap.INSTALL)
        )
    found += [examine_pool(pool, limit_percent) for pool in pools]
    found += [_held(pool) for pool in pools if _is_held(lvm, pool)]
    found += [_snapshot(volume) for volume in volumes if volume.ours and volume.kind == "snapshot" and not volume.thin]
    for volume in foreign(volumes):
        found.append(
            Finding(volume.full_name, "note", "it is named as ours are, and vmsnap has not made it: it is left alone")
        )
    return found


def _held(pool: Volume) -> Finding:
    what = "somebody holds the snapshot of its metadata: meanwhile all of each thin volume is read"
    return Finding(pool.full_name, "note", what, thinmap.release_by_hand(pool.group, pool.name))


def _is_held(lvm: Lvm, pool: Volume) -> bool:
    try:
        return lvm.holds_metadata(pool.group, pool.name)
    except SnapshotError:
        return False  # it is not active


def examine_pool(pool: Volume, limit_percent: int) -> Finding:
    """How full a thin pool is."""
    used = f"thin pool, {pool.used_percent:g}% of its data and {pool.metadata_percent:g}% of its metadata are used"
    if max(pool.used_percent, pool.metadata_percent) >= limit_percent:
        return Finding(
            pool.full_name, "missing", f"{used}: too full for snapshots", "extend the pool, or remove volumes from it"
        )
    return Finding(pool.full_name, "ok", used)


def _snapshot(volume: Volume) -> Finding:
    if volume.overflowed:
        return Finding(volume.full_name, "note", "a snapshot of ours that has overflowed", "vmsnap recover")
    return Finding(volume.full_name, "ok", f"a snapshot of ours, {volume.used_percent:g}% full")
