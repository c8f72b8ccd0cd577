"""Whether a VM has the devices that it had when its capture began: what was plugged in since has its state captured,
and stands in no definition with which it could be brought back.
"""

from __future__ import annotations

from typing import Final

from vmsnap.errors import HypervisorError
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError

_FOLDERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
"""Of devices with and without an id (``qdev_set_id``, ``softmmu/qdev-monitor.c``)."""


def plugged(monitor: Monitor) -> frozenset[str]:
    """The names of all devices; a round trip or two.

    :raises VmGone: QEMU ended
    """
    found = set()
    for folder in _FOLDERS:
        try:
            entries = monitor.execute("qom-list", {"path": folder})
        except MonitorError:
            continue  # there is no such folder before its first object
        found |= {entry["name"] for entry in entries if entry["type"].startswith("child<")}
    return frozenset(found)


def check_unchanged(vm: str, before: frozenset[str], after: frozenset[str]) -> None:
    """See that they are the same.

    :raises HypervisorError: they are not
    """
    changes = [f"{name} was plugged out" for name in sorted(before - after)]
    changes += [f"{name} was plugged in" for name in sorted(after - before)]
    if changes:
        raise HypervisorError(
            f"VM {vm!r} was changed during its capture: {', '.join(changes)}", cure="back it up once more"
        )
