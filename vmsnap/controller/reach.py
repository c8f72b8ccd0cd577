"""Whether a VM that is about to run could touch what another one owns: a disk, or an address on the network.

Asked of the hypervisors, not assumed. Where another VM cannot be asked (it is gone, its monitor serves somebody else),
the VM table says what it had when it was last seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vmsnap.controller.drivers import Drivers
from vmsnap.errors import Busy, HypervisorError, VmGone, VmsnapError
from vmsnap.model import Disk, Nic, VmDescription, VmState
from vmsnap.roles import Hypervisor
from vmsnap.vmtable import DiskRow, VmRow, VmTable

WORKING = "working"


class Reach:
    """Looks at every registered VM but `name` (and `but`, the row of a duplicate whose disks `name` is to have).
    `known` are driver instances that are connected already: a monitor may take one client only. The others are asked
    once, when the first check needs it; an instance is made for one start of one VM.
    """

    def __init__(
        self,
        drivers: Drivers,
        table: VmTable,
        name: str,
        known: Mapping[str, Hypervisor] | None = None,
        but: str = "",
    ) -> None:
        self._but = but
        self._asked: list[tuple[VmRow, VmDescription | None]] | None = None
        self._drivers = drivers
        self._table = table
        self._name = name
        self._known = known or {}

    def check_disks(self, disks: Sequence[Disk]) -> None:
        """See that no writable one of `disks` is a disk of another VM or duplicate, or stands among them twice.

        :raises HypervisorError: one is; the message names both
        """
        own = [disk for disk in disks if not disk.read_only]
        for index, disk in enumerate(own):
            if any(same_place(disk.address, other.address) for other in own[:index]):
                raise HypervisorError(f"VM {self._name!r} has {disk.address} twice")
        for row, description in self._others():
            for other in row.disks if description is None else description.disks:
                for disk in own:
                    if same_place(disk.address, other.address):
                        raise HypervisorError(
                            f"{disk.address}, disk {disk.device} of {self._name!r}, is disk {other.device} of"
                            f" {row.vm!r} too",
                            cure="nothing was started",
                        )

    def check_nics(self, nics: Sequence[Nic]) -> None:
        """See that no other VM that exists has a MAC address of `nics` where the two could meet.

        :raises Busy: one is
        """
        for row, description in self._others():
            if description is None or description.state not in (VmState.EXECUTING, VmState.STOPPED):
                continue
            for other in description.nics:
                for nic in nics:
                    if other.connected and nic.mac and nic.mac == other.mac and _may_meet(nic.network, other.network):
                        raise Busy(
                            f"VM {row.vm!r} is on {other.network} with the address {other.mac}, which is that of"
                            f" {self._name!r}",
                            cure=f"end {row.vm}, or cut its network",
                        )

    def _others(self) -> Sequence[tuple[VmRow, VmDescription | None]]:
        if self._asked is None:
            self._asked = [
                (row, self._describe(row) if row.kind == WORKING else None)
                for row in self._table.rows()
                if row.vm not in (self._name, self._but)
            ]
        return self._asked

    def _describe(self, row: VmRow) -> VmDescription | None:
        driver = self._known.get(row.vm)
        if driver is not None:
            try:
                return driver.describe()
            except VmGone:
                return None
        try:
            driver = self._drivers.hypervisor(row.hypervisor, row.vm, row.options)
        except VmsnapError:
            return None
        try:
            return driver.describe()
        except VmsnapError:
            return None
        finally:
            driver.close()


def _may_meet(one: str, other: str) -> bool:
    """Whether two interfaces could be on one network: not by a network of one VM's own, nor by two named bridges."""
    if not one or not other or "user" in (one, other):
        return False
    return one == other or not (one.startswith("bridge:") and other.startswith("bridge:"))


def same_place(one: str, other: str) -> bool:
    """Whether two addresses mean the same bytes: equal, or paths of one file."""
    if one == other:
        return True
    if not (one.startswith("/") and other.startswith("/")):
        return False
    try:
        return Path(one).samefile(other)
    except OSError:  # one of them is not there
        return False


def rows_of(disks: Sequence[Disk]) -> tuple[DiskRow, ...]:
    """Disks as the VM table has them."""
    return tuple(DiskRow(disk.device, disk.address) for disk in disks)
