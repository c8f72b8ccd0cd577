"""What ``vmsnap doctor`` says of the places that serve targets."""

from __future__ import annotations

from collections.abc import Sequence

from vmsnap.errors import DriverUnavailable, VmsnapError
from vmsnap.model import Finding
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.snapshots.iscsi.address import is_for_every_network
from vmsnap_drivers.snapshots.iscsi.initiator import check_tools
from vmsnap_drivers.snapshots.iscsi.kernel import all_sessions
from vmsnap_drivers.snapshots.iscsi.names import is_name_of_ours
from vmsnap_drivers.snapshots.iscsi.places import HERE, Place, Places
from vmsnap_drivers.snapshots.iscsi.sessions import KernelSessions
from vmsnap_drivers.snapshots.iscsi.stores import is_on_ours
from vmsnap_drivers.snapshots.iscsi.targets import NotRunning, Target, Targets


def examine(places: Places) -> Sequence[Finding]:
    """Each tgtd and LIO, where it listens, and what looks like ours and is not. Changes nothing."""
    told = list(places.all())
    found = [Finding(HERE, "note" if told else "missing", e.message, e.cure) for e in places.refusals()]
    for place in told:
        found += _examine_place(place)
    if not found:
        found.append(
            Finding("target", "note", "nothing serves here, and no appliance is configured", "see docs: iscsi")
        )
    try:
        check_tools()
    except DriverUnavailable as e:
        severity = "missing" if told else "note"
        found.append(Finding("qemu-nbd", severity, f"{e.message}: LUNs of appliances cannot be read", e.cure))
    if any(all_sessions()):
        try:
            KernelSessions(LocalRunner()).check()
        except DriverUnavailable as e:
            found.append(Finding("iscsiadm", "missing", e.message, e.cure))
    return found


def _examine_place(place: Place) -> list[Finding]:
    found: list[Finding] = []
    silent: list[VmsnapError] = []
    servers = place.allowed()
    try:
        for server in servers:
            try:
                found += _look_at(place, server)
            except (NotRunning, DriverUnavailable) as e:
                silent.append(e)
        if len(silent) < len(servers):
            return [*found, *_foreign_stores(place)]
    except VmsnapError as e:
        return [*found, Finding(place.name, "missing", e.message, e.cure)]
    said = "; ".join(dict.fromkeys(e.message for e in silent))
    return [Finding(place.name, "missing", said, silent[0].cure)]


def _look_at(place: Place, server: Targets) -> list[Finding]:
    portals, targets = server.portals(), server.targets()
    where = f" at {', '.join(portals)}" if portals else ""
    open_ones = filter(is_for_every_network, portals)
    return [
        Finding(place.name, "ok", f"{server.label} serves {len(targets)} targets{where}"),
        *(
            Finding(
                place.name,
                "note",
                f"{server.label} listens at {portal}, for every network, and so does what vmsnap exports beside"
                f" {_beside(targets, portal)}, though for none but whom that admits",
                server.cure_of_listening,
            )
            for portal in open_ones
        ),
        *_foreign(place, targets),
    ]


def _beside(targets: Sequence[Target], portal: str) -> str:
    """The targets that have a portal; a server may not tell, as all of its have all."""
    return ", ".join(target.name for target in targets if portal in target.portals) or "its targets"


def _foreign(place: Place, targets: Sequence[Target]) -> list[Finding]:
    return [
        _left_alone(place, f"target {target.name}")
        for target in targets
        if is_name_of_ours(target.name) and not any(is_on_ours(lun.path) for lun in target.disks)
    ]


def _foreign_stores(place: Place) -> list[Finding]:
    """What lies where snapshots would."""
    origins = place.origins()
    return [_left_alone(place, path) for stores in place.kinds.values() for path in stores.foreign(origins)]


def _left_alone(place: Place, what: str) -> Finding:
    return Finding(place.name, "note", f"{what} is named as ours are, and vmsnap has not made it: left alone")
