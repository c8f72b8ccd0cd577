"""What a VM of QEMU's does now."""

from __future__ import annotations

from typing import Final

from vmsnap.model import VmState
from vmsnap_drivers.qemu.monitor import Monitor

_ENDED: Final = frozenset(["shutdown"])


def vm_state(monitor: Monitor) -> VmState:
    """What the VM does now (``query-status``)."""
    status = monitor.execute("query-status")
    if status["running"]:
        return VmState.EXECUTING
    return VmState.ENDED if status["status"] in _ENDED else VmState.STOPPED
