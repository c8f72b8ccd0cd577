"""Duplicates in host memory after their backup: kept, listed, discarded when told to or when their time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmsnap.controller.capture import Capture
from vmsnap.controller.clones import Clones
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.recovery import Recovery
from vmsnap.controller.results import DuplicateInfo
from vmsnap.errors import Busy, StorageFull, VmsnapError
from vmsnap.heldduplicates import HELD, SPENT, HeldDuplicate, HeldDuplicates
from vmsnap.host import boot_id
from vmsnap.journal import Journal, Operation
from vmsnap.locks import vm_lock
from vmsnap.vmtable import DiskRow, VmTable


class Holding:
    """The duplicates that are held on this host."""

    def __init__(self, drivers: Drivers, journal: Journal, table: VmTable) -> None:
        self.held = HeldDuplicates(table.database)
        self._drivers = drivers
        self._recovery = Recovery(drivers, journal, table)

    def list(self) -> list[DuplicateInfo]:
        """All of them, the oldest first."""
        return [
            DuplicateInfo(
                duplicate=held.name,
                vm=held.vm,
                backup=held.backup,
                state=SPENT if self.held.spent(held.name) else HELD,
                memory_bytes=held.used_bytes(),
                disks=tuple(DiskRow(each.disk.device, each.disk.address, each.plan.mechanism) for each in held.disks),
                held=held.held_ns / 1e9,
                expires=None if held.expires_ns is None else held.expires_ns / 1e9,
            )
            for held in self.held.all()
        ]

    def discard(self, held: HeldDuplicate) -> None:
        """Remove one: its memory, its disks, its row. The lock of its VM is held by the caller. All of it is in the
        journal first: what cannot be removed now is removed by `recover`.

        :raises VmsnapError: something could not be removed yet
        """
        result = self._recovery.finish(self.held.give_up(held))
        if result.kept:
            raise VmsnapError(
                f"duplicate {held.name!r} is given up, but not all of it is removed: {result.kept[0]}",
                cure="vmsnap recover tries again",
            )

    def discard_ended(self, tell: Callable[[str], None]) -> None:
        """Discard those whose time is over, and what a restart of the host has left of those before it; says one line
        of each. Those of a VM that is worked on are left for the next time.
        """
        now_ns = time.time_ns()
        for held in self.held.all():
            if held.in_memory and not held.expired(now_ns):
                continue
            why = "its time was over" if held.in_memory else "the host was restarted, its memory is gone"
            try:
                with vm_lock(self._drivers.context.state_dir, held.vm, "discard of a duplicate"):
                    if not self.held.is_held(held.name):
                        continue
                    self.discard(held)
            except Busy:
                continue
            except VmsnapError as e:
                tell(str(e))
            else:
                tell(f"duplicate {held.name} of VM {held.vm} is discarded: {why}")


def keep(
    capture: Capture,
    backup: str,
    clones: Clones,
    operation: Operation,
    held: HeldDuplicates,
    *,
    keep_seconds: float | None,
) -> None:
    """Make lasting disks for the captured duplicate, and hold it. Blocks as long as copying takes.

    :raises SnapshotError: a disk could not be cloned
    """
    clones.make(capture.snapshots, lasting=True)
    now_ns = time.time_ns()
    duplicate = HeldDuplicate(
        name=capture.duplicate_name,
        vm=capture.row.vm,
        hypervisor=capture.row.hypervisor,
        options=capture.row.options,
        backup=backup,
        definition=capture.description.definition,
        capture=capture.duplicate,
        disks=tuple(made for _, made in clones.made),
        folder=clones.folder,
        memory_bytes=capture.description.memory_bytes,
        held_ns=now_ns,
        boot=boot_id(),
        expires_ns=None if keep_seconds is None else now_ns + int(keep_seconds * 1e9),
    )
    held.hold(duplicate, operation.name, [*clones.positions, capture.duplicate_position])


@contextmanager
def tell_of_held(held: HeldDuplicates, vm: str) -> Iterator[None]:
    """Where there is no room for another duplicate, name those that take it: a VM's old one makes room for the new one
    only when that is whole, so that there is one at every moment.
    """
    try:
        yield
    except StorageFull as e:
        there = held.all()
        if not there:
            raise
        mine = sorted(there, key=lambda each: each.vm != vm)
        names = ", ".join(f"{each.name} of {each.vm} ({each.used_bytes() >> 20} MiB)" for each in mine)
        raise StorageFull(
            f"{e.message}; duplicates are held there: {names}", cure=f"vmsnap duplicate discard {mine[0].name}"
        ) from e
