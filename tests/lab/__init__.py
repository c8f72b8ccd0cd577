"""The lab: a tiny real Linux guest that checks itself, and the two QEMU generations to run it on.

Used by tests, benchmarks and the demo. Knows nothing of the product, so that it can be its oracle.
``install.sh`` sets up the machine. To start a guest::

    with LabMachine(folder, find_qemu("7.2")) as machine:
        machine.wait_for_count(100)
        assert machine.faults() == []
"""

from .machine import DEFAULT_DISKS, WITH_BARE_DISK, Disk, LabError, LabMachine
from .qemus import QemuBuild, available_qemus, find_qemu

__all__ = [
    "DEFAULT_DISKS",
    "WITH_BARE_DISK",
    "Disk",
    "LabError",
    "LabMachine",
    "QemuBuild",
    "available_qemus",
    "find_qemu",
]
