"""What of this driver's is on this host: duplicates in memory, loaded VMs, overlays over disks."""

from __future__ import annotations

from vmsnap.model import OwnedResource
from vmsnap.roles import DriverContext
from vmsnap_drivers.hypervisors.qemu.launch import read_mark
from vmsnap_drivers.qemu import freeze
from vmsnap_drivers.qemu.capture import duplicates


def list_owned(context: DriverContext) -> list[OwnedResource]:
    """All duplicates, loaded VMs and overlays, those whose process has ended included."""
    found = duplicates.list_owned("qemu", context)
    runs = context.state_dir / "qemu" / "run"
    for folder in sorted(runs.iterdir()) if runs.is_dir() else ():
        if read_mark(folder) is not None:
            found.append(OwnedResource("vm", folder.name, folder.name, "qemu"))
    return found + freeze.list_owned("qemu", context.state_dir / "qemu" / freeze.FOLDER)
