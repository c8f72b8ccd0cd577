"""What ``vmsnap doctor`` says of ZFS on this host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding
from vmsnap_drivers.snapshots.zfs import room
from vmsnap_drivers.snapshots.zfs.commands import Zfs
from vmsnap_drivers.snapshots.zfs.names import is_named_as_ours

_OLDEST: Final = (2, 1)
OF_LUNS: Final = "vmsnap-iscsi:kind"
"""Marks what the mechanism ``iscsi`` has made of volumes behind LUNs: it is vmsnap's too, and that one's to tell of."""


def examine(zfs: Zfs, limit_percent: int) -> Sequence[Finding]:
    """ZFS itself, its pools and how full they are, and what looks like ours and is not. Changes nothing."""
    try:
        zfs.check_usable()
        found = [_version(zfs)]
        if os.geteuid():
            found.append(Finding("zfs", "note", "only root can mount, so image files are out of reach", "run as root"))
        pools = zfs.pools()
        fills = {fill.what: fill for fill in room.fills(zfs, sorted(pools))} if pools else {}
        found += [_pool(name, health, fills[f"pool {name}"], limit_percent) for name, health in pools.items()]
        ours = {each.name for each in zfs.ours()} | zfs.bearing(OF_LUNS) if pools else set()
        names = zfs.names() if pools else []
    except VmsnapError as e:
        return [Finding("zfs", "missing", e.message, e.cure)]
    for name in names:
        if is_named_as_ours(name) and name not in ours:
            found.append(Finding(name, "note", "it is named as ours are, and vmsnap has not made it: it is left alone"))
    return found


def _version(zfs: Zfs) -> Finding:
    flavour = zfs.flavour()
    if flavour.fuse:
        return Finding("zfs", "ok", "zfs-fuse: image files alone, no volumes, and nothing tells what has changed")
    if flavour.numbers < _OLDEST:
        return Finding("zfs", "note", f"OpenZFS {flavour.version}: nobody has tried this one", "use OpenZFS 2.1")
    return Finding("zfs", "ok", f"OpenZFS {flavour.version}")


def _pool(name: str, health: str, fill: room.Fill, limit_percent: int) -> Finding:
    used = f"{health.lower()}, {fill.used:.0%} is used"
    if fill.used * 100 >= limit_percent:
        return Finding(f"pool {name}", "missing", f"{used}: too full for snapshots", "free room, or add a disk to it")
    if health != "ONLINE":
        return Finding(f"pool {name}", "note", used, f"zpool status {name}")
    return Finding(f"pool {name}", "ok", used)
