"""Which snapshot mechanism takes which disk of a VM."""

from __future__ import annotations

from collections.abc import Sequence

from vmsnap.controller.drivers import Drivers
from vmsnap.errors import CannotCapture
from vmsnap.model import Disk
from vmsnap.roles import SnapshotMechanism
from vmsnap.vmtable import DiskRow


def by_mechanism(disks: Sequence[Disk], rows: Sequence[DiskRow]) -> dict[str, list[Disk]]:
    """The disks that each mechanism of their rows takes, in order; those without one are read-only."""
    chosen = {row.device: row.mechanism for row in rows}
    found: dict[str, list[Disk]] = {}
    for disk in disks:
        name = chosen[disk.device]
        if name is not None:
            found.setdefault(name, []).append(disk)
    return found


def choose_mechanisms(
    drivers: Drivers, disks: tuple[Disk, ...], chosen: tuple[DiskRow, ...] = ()
) -> tuple[DiskRow, ...]:
    """For each disk the mechanism that was `chosen` for it before, else the first that handles it; none for
    read-only disks.

    :raises CannotCapture: no installed mechanism handles a disk, or the chosen one does not
    """
    before = {row.device: row.mechanism for row in chosen}
    known: dict[str, SnapshotMechanism] = {}

    def mechanism(name: str) -> SnapshotMechanism:
        if name not in known:
            known[name] = drivers.mechanism(name)
        return known[name]

    rows = []
    try:
        for disk in disks:
            name = before.get(disk.device)
            if disk.read_only:
                name = None
            elif name is None:
                names = drivers.mechanism_names()
                name = next((name for name in names if mechanism(name).handles(disk)), None)
                if name is None:
                    raise CannotCapture(
                        f"no snapshot mechanism handles disk {disk.device} at {disk.address}",
                        cure=f"installed mechanisms: {', '.join(names)}; see: vmsnap doctor",
                    )
            elif not mechanism(name).handles(disk):
                raise CannotCapture(
                    f"snapshot mechanism {name!r} does not handle disk {disk.device} at {disk.address}",
                    cure="register the VM again, with another --mechanism",
                )
            rows.append(DiskRow(disk.device, disk.address, name))
    finally:
        for instance in known.values():
            instance.close()
    return tuple(rows)


def check_cloneable(vm: str, disks: tuple[DiskRow, ...], drivers: Drivers) -> None:
    """See, before anything is touched, that the disks of a VM can be cloned for a duplicate.

    :raises CannotCapture: the mechanism of one cannot clone
    """
    for disk in disks:
        if disk.mechanism is None:
            continue
        mechanism = drivers.mechanism(disk.mechanism)
        mechanism.close()
        if not mechanism.clones:
            raise CannotCapture(
                f"snapshot mechanism {disk.mechanism!r} of disk {disk.device} makes no writable disks,"
                f" so no duplicate of VM {vm!r} can run",
                cure="back it up without --mode consistent and --keep-duplicate, or choose another --mechanism",
            )
