"""Writes onto a LUN that somebody else made and named, through QEMU's own initiator, as long as nobody else uses it."""

from __future__ import annotations

from vmsnap.errors import Busy, DriverUnavailable, NotFound, SnapshotError, UsageError, VmsnapError
from vmsnap.nbdtarget import NbdTarget, tool
from vmsnap_drivers.snapshots.iscsi.address import LunAddress
from vmsnap_drivers.snapshots.iscsi.initiator import PACKAGES, Account, check_module
from vmsnap_drivers.snapshots.iscsi.places import Place, no_lun
from vmsnap_drivers.snapshots.iscsi.stores import is_on_ours
from vmsnap_drivers.snapshots.iscsi.targets import Lun


class LunTarget(NbdTarget):
    """One LUN. CHAP's secret is a file that qemu-nbd reads itself."""

    def __init__(self, lun: LunAddress, account: Account) -> None:
        """Connect; changes nothing. Blocks.

        :raises SnapshotError: the target cannot be reached, or does not let us in
        :raises DriverUnavailable: qemu-nbd is not installed
        """
        image = account.image_options(lun, "discard=unmap")
        program = tool("qemu-nbd", "writing over iSCSI", PACKAGES)
        super().__init__(f"the LUN {lun}", str(lun), program, [*account.arguments(), "--image-opts", image])

    def refusal(self, said: str) -> VmsnapError:
        """See `NbdTarget.refusal`."""
        try:
            check_module(said)
        except DriverUnavailable as e:
            return e
        return SnapshotError(f"{self.label} cannot be reached: {said.removeprefix('qemu-nbd: ')}")

    def cure_of_size(self, size_bytes: int) -> str:
        """See `NbdTarget.cure_of_size`."""
        return f"name one that has {size_bytes} bytes"


def open_lun(place: Place, lun: LunAddress, account: Account) -> LunTarget:
    """Connect to a LUN that nobody else uses, to write onto it; changes nothing. Blocks.

    What serves it is asked who is connected, to it and to whatever else it serves of the same backing store: before,
    and again when we are, since both of two that come at once are seen then. (LIO shows one of several connections of
    the same initiator.)

    :raises NotFound: there is none
    :raises UsageError: it is read-only, or vmsnap's own
    :raises Busy: somebody uses it
    :raises SnapshotError: it cannot be reached, or what serves it cannot be asked
    """
    disk = _disk(place, lun)
    _refuse(lun, place, _users(place, disk))
    target = LunTarget(lun, account)
    try:
        users = _users(place, disk)
        if not users:
            raise SnapshotError(f"{place.name} does not show that we use {lun}, and so not who else does")
        _refuse(lun, place, users[1:])
    except VmsnapError:
        target.close()
        raise
    return target


def _disk(place: Place, lun: LunAddress) -> Lun:
    served = place.serving(lun)
    disk = served[1].disk(lun.lun) if served else None
    if disk is None:
        raise NotFound(no_lun(place, lun), cure="make it first: it is only filled")
    if disk.read_only:
        raise UsageError(f"{lun} is read-only")
    if is_on_ours(disk.path):
        raise UsageError(f"{lun} is a snapshot or a duplicate's disk of vmsnap's own", cure="name another LUN")
    return disk


def _users(place: Place, disk: Lun) -> list[str]:
    """Who is connected, by any target, to what lies behind a LUN."""
    return [
        session
        for _, target in place.all_targets()
        if any(each.path == disk.path for each in target.disks)
        for session in target.sessions
    ]


def _refuse(lun: LunAddress, place: Place, users: list[str]) -> None:
    if users:
        who = ", ".join(sorted(set(users)))
        raise Busy(f"{lun} on {place.name} is in use by {who}", cure="end the VM that uses it, or name another LUN")
