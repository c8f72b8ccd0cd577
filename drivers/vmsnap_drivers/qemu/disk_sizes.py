"""Whether the disks of a VM have the sizes that they had when its capture began: of one that was resized meanwhile
(``block_resize``) the guest's memory knows the new size, and its snapshot would be read to the old one.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk
from vmsnap_drivers.qemu.monitor import Monitor


def check_unchanged(vm: str, monitor: Monitor, disks: Sequence[Disk]) -> None:
    """See that the guest's disks are as large as they were described; a round trip.

    :raises VmGone: QEMU ended
    :raises HypervisorError: one was resized
    """
    entries = [entry for entry in monitor.execute("query-block") if entry.get("inserted")]
    present = {entry.get("qdev"): entry["inserted"]["image"]["virtual-size"] for entry in entries}
    changes = []
    for disk in disks:
        # Of one that was plugged out, or whose medium is another, others tell.
        size_bytes = present.get(disk.handle["qdev"], disk.size_bytes)
        if size_bytes != disk.size_bytes and not disk.read_only:
            changes.append(f"disk {disk.device} was resized from {disk.size_bytes} to {size_bytes} bytes")
    if changes:
        raise HypervisorError(
            f"VM {vm!r} was changed during its capture: {', '.join(changes)}", cure="back it up once more"
        )
