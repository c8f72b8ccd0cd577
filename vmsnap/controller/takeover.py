"""How a takeover that did not come to its end is settled: after a failure in its own process, and after a crash."""

from __future__ import annotations

from dataclasses import dataclass

from vmsnap.errors import HypervisorError, VmsnapError
from vmsnap.heldduplicates import HeldDuplicate, HeldDuplicates
from vmsnap.journal import Operation
from vmsnap.model import Disk, VmState
from vmsnap.protocol import Instruction
from vmsnap.roles import Hypervisor
from vmsnap.vmtable import VmTable


@dataclass(frozen=True)
class Settled:
    """Whether the duplicate runs in its VM's place, and one line about it."""

    runs: bool
    line: str


def settle_takeover(name: str, operation: Operation, hypervisor: Hypervisor, table: VmTable) -> Settled:
    """Put the held duplicate `name` back, or let it go on in its VM's place.

    As long as it was not told to run it has written nothing: the VM that was loaded for it is destroyed, the duplicate
    stays as it was held. From then on its disks move on, and memory and disks are of one instant nowhere but in that
    VM: it is made to run and is the VM from now on. If it is dead, the duplicate is spent; its disks stay. `hypervisor`
    is the driver of the VM whose place is taken. Idempotent.

    :raises VmsnapError: it cannot be settled now; nothing was removed
    """
    duplicates = HeldDuplicates(table.database)
    if not duplicates.is_held(name):
        return Settled(False, "")
    held = duplicates.get(name)
    begun = {entry.instruction for entry in operation.entries()}
    if Instruction.RESUME_DUPLICATE.value not in begun:
        _destroy(hypervisor)
        table.set_state(held.vm, VmState.ABSENT.value, resume_flag=False)
        return Settled(False, f"duplicate {name} is held as before")
    state = hypervisor.state()
    if state in (VmState.STOPPED, VmState.EXECUTING):
        # One that executes may lack what comes with being let run.
        hypervisor.resume()
        state = hypervisor.state()
    if state is VmState.EXECUTING:
        take_place(held, operation, hypervisor, duplicates)
        return Settled(True, f"duplicate {name} runs as VM {held.vm} all the same")
    if state is VmState.STOPPED:
        raise VmsnapError(f"duplicate {name!r} was to run as VM {held.vm!r} and stands still", cure="vmsnap recover")
    duplicates.spend(held, operation.name)
    return Settled(False, f"duplicate {name} ran as VM {held.vm} and is {state.value}: it is spent, its disks stay")


def _destroy(hypervisor: Hypervisor) -> None:
    try:
        hypervisor.destroy()
    except HypervisorError:
        # Where nothing was loaded yet, what lies there is what the failed VM left, which is not ours.
        if hypervisor.state() is not VmState.ABSENT:
            raise


def take_place(
    held: HeldDuplicate, operation: Operation, hypervisor: Hypervisor, duplicates: HeldDuplicates
) -> tuple[Disk, ...]:
    """Enter the VM that runs on a held duplicate's disks as the VM whose place it took, and give up the names of its
    images: it has them mapped, so their pages stay as long as it lives. Returns its disks.

    :raises VmsnapError: the names could not be removed; they stand in the journal, all else is done
    """
    disks = hypervisor.describe().disks
    position = duplicates.take_place(held, disks, VmState.EXECUTING.value, operation.name)
    hypervisor.discard_duplicate(held.name)
    operation.is_gone(position)
    return disks
