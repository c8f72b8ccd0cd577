"""What ``vmsnap doctor`` says of the places that serve targets."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding
from vmsnap_drivers.snapshots.iscsi.initiator import INSTALL
from vmsnap_drivers.snapshots.iscsi.names import is_name_of_ours
from vmsnap_drivers.snapshots.iscsi.places import Place, Places
from vmsnap_drivers.snapshots.iscsi.stores import TAG
from vmsnap_drivers.snapshots.iscsi.tgt import Target

_EVERYWHERE = ("0.0.0.0:", "[::]:")


def examine(places: Places) -> Sequence[Finding]:
    """Each tgtd, where it listens, and what looks like ours and is not. Changes nothing."""
    found = []
    for place in places.all():
        try:
            portals, targets = place.tgt.portals(), place.tgt.targets()
        except VmsnapError as e:
            found.append(Finding(place.name, "missing", e.message, e.cure))
            continue
        found.append(Finding(place.name, "ok", f"tgtd serves {len(targets)} targets at {', '.join(portals)}"))
        found += [
            Finding(
                place.name, "note", f"tgtd listens at {portal}, for every network", "start it with --iscsi portal=…"
            )
            for portal in portals
            if portal.startswith(_EVERYWHERE)
        ]
        found += _foreign(place, targets)
    if not found:
        found.append(Finding("tgtd", "note", "none runs here, and no appliance is configured", "see docs: iscsi"))
    if shutil.which("qemu-nbd") is None:
        found.append(Finding("qemu-nbd", "missing", "it is not installed: LUNs of appliances cannot be read", INSTALL))
    return found


def _foreign(place: Place, targets: Sequence[Target]) -> list[Finding]:
    return [
        Finding(
            place.name, "note", f"target {target.name} is named as ours are, and vmsnap has not made it: left alone"
        )
        for target in targets
        if is_name_of_ours(target.name) and not any(TAG.search(lun.path) for lun in target.disks)
    ]
