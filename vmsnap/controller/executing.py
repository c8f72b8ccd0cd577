"""That a VM which was let run does run."""

from __future__ import annotations

from vmsnap.errors import HypervisorError, VmsnapError
from vmsnap.model import VmState
from vmsnap.roles import Hypervisor


def see_it_execute(hypervisor: Hypervisor) -> None:
    """Ask whether the VM of this driver executes.

    :raises HypervisorError: it does not; the message says why, where its hypervisor knows
    """
    state = hypervisor.state()
    if state is not VmState.EXECUTING:
        why = "".join(f": {reason}" for reason in _reasons(hypervisor, state))
        raise HypervisorError(f"VM {hypervisor.vm!r} is {state.value} instead of executing{why}")


def _reasons(hypervisor: Hypervisor, state: VmState) -> tuple[str, ...]:
    """What stands in the way of its capture is what ended it, too."""
    if state is VmState.ABSENT:
        return ()
    try:
        return hypervisor.describe().refusals
    except VmsnapError as e:
        return (e.message,)
