"""Whether a registered VM uses a disk that somebody is going to write onto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmsnap.controller import Controller
from vmsnap.errors import Busy
from vmsnap.locks import vm_lock
from vmsnap.model import VmState

_AT_REST = {VmState.STOPPED.value, VmState.ENDED.value, VmState.ABSENT.value}


@contextmanager
def disk_at_rest(controller: Controller, target: Path, purpose: str) -> Iterator[None]:
    """Hold the locks of all registered VMs that have `target` for a disk, having seen that none of them executes.

    :raises Busy: one of them executes, or an operation works on it
    :raises VmsnapError: its hypervisor cannot be asked
    """
    with ExitStack() as locks:
        for row in controller.vms():
            if not any(_same(disk.address, target) for disk in row.disks):
                continue
            locks.enter_context(vm_lock(controller.folders.state_dir, row.vm, purpose))
            state = controller.vm(row.vm).state
            if state not in _AT_REST:
                raise Busy(f"{target} is a disk of VM {row.vm!r}, which is {state}", cure="stop the VM first")
        yield


def _same(address: str, target: Path) -> bool:
    if not address.startswith("/"):
        return False
    try:
        return Path(address).samefile(target)
    except OSError:  # one of them is not there
        return False
