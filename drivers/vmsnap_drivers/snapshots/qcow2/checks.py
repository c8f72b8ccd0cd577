"""What `plan` looks at before anything is made."""

from __future__ import annotations

from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap_drivers.qemu.blocks.graph import BlockGraph

_OLDEST: Final = (7, 1, 0)


def check_version(graph: BlockGraph) -> None:
    """See whether QEMU has a copy-before-write filter that spares the guest.

    :raises SnapshotError: it is too old
    """
    if graph.monitor.version < _OLDEST:
        found = ".".join(map(str, graph.monitor.version))
        raise SnapshotError(f"QEMU {found} is too old for the mechanism qcow2", cure="QEMU 7.1 or later is needed")
