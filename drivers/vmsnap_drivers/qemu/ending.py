"""Shuts a guest down in order, by its power button."""

from __future__ import annotations

from typing import Final

from vmsnap.errors import HypervisorError, VmGone
from vmsnap.model import VmState
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.process import held
from vmsnap_drivers.qemu.status import vm_state

_CLOSING_SECONDS: Final = 60.0
_LOOK_EACH_SECONDS: Final = 0.02


def shut_down(vm: str, monitor: Monitor, timeout_seconds: float) -> None:
    """Press the power button, wait until the guest has ended itself, and until QEMU has closed its disks or stands
    there without a guest (``-no-shutdown``).

    :raises HypervisorError: the guest stands still, did not end in time, or ended in another way
    """
    mark = monitor.mark()
    state = vm_state(monitor)
    if state is VmState.ENDED:
        return
    if state is not VmState.EXECUTING:
        raise HypervisorError(f"VM {vm!r} is {state.value}: its guest cannot shut down")
    with held(monitor.peer_pid) as process:
        monitor.execute("system_powerdown")
        try:
            event = monitor.wait_for_event("SHUTDOWN", since=mark, timeout_seconds=timeout_seconds)
        except VmGone as e:
            raise VmGone(f"VM {vm!r} ended without its guest's shutdown") from e
        except HypervisorError as e:
            raise HypervisorError(
                f"the guest of VM {vm!r} did not shut down within {timeout_seconds:g} s: it ignores its power button,"
                " or needs longer",
                cure="give it longer, or see what it does at ACPI power-down",
            ) from e
        if not event.data.get("guest") or event.data.get("reason") != "guest-shutdown":
            raise HypervisorError(f"VM {vm!r} ended without its guest's shutdown ({event.data.get('reason')})")
        left = _CLOSING_SECONDS
        while process is not None and not process.has_ended(_LOOK_EACH_SECONDS):
            try:
                if vm_state(monitor) is VmState.ENDED:
                    return
            except VmGone:
                pass  # it closes its monitor last, and then ends
            left -= _LOOK_EACH_SECONDS
            if left <= 0:
                raise HypervisorError(f"the QEMU of VM {vm!r} does not end after its guest's shutdown")
