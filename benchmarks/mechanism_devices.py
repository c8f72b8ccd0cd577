"""More guests of `benchmarks.mechanism_pause`: on devices that need what the kernel of this host may lack, device
mapper, LIO and Linux' own initiator. They run in the storage guest of the lab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.mechanism_disks import (
    MIB,
    SLOW_COMMAND_SECONDS,
    SMALL_MIB,
    TARGET,
    Candidate,
    Guest,
    Order,
    machine_on,
)
from tests.in_guest.volumes import make_pool, make_thick, make_thin, run, volume_group
from tests.lab import Disk
from tests.lab.appliance import lio_library
from tests.lab.lio import QEMU, LioServer
from tests.lab.open_iscsi import NAME, KernelInitiator
from tests.lab.xfs import mounted_xfs

_ROOM_MIB: Final = 4 * SMALL_MIB
_OPTIONS: Final = {"pause_seconds": str(SLOW_COMMAND_SECONDS)}


@contextmanager
def _on_a_thick_volume(place: Path, order: Order) -> Iterator[Guest]:
    with volume_group(place, "vg", _ROOM_MIB) as group:
        disk = make_thick(group, "disk0", SMALL_MIB)
        yield Guest(machine_on(place / "vm001", order, Disk("raw", disk.size_bytes, disk.address)), "lvm", _OPTIONS)


@contextmanager
def _on_a_thin_volume(place: Path, order: Order) -> Iterator[Guest]:
    with volume_group(place, "vg", _ROOM_MIB) as group:
        make_pool(group, "pool", 3 * SMALL_MIB)
        disk = make_thin(group, "pool", "disk0", SMALL_MIB)
        yield Guest(machine_on(place / "vm001", order, Disk("raw", disk.size_bytes, disk.address)), "lvm", _OPTIONS)


@contextmanager
def _on_lio(place: Path, order: Order) -> Iterator[Guest]:
    for module in ("loop", "xfs"):
        run("modprobe", module)
    with (
        mounted_xfs(place, _ROOM_MIB * MIB) as mount,
        LioServer(lio_library()) as server,
        KernelInitiator() as initiator,
    ):
        with (mount / "lun.img").open("wb") as file:
            file.truncate(SMALL_MIB * MIB)
        server.add(TARGET, mount / "lun.img", initiators=(QEMU, NAME))
        device = initiator.log_in(TARGET, server.portal)
        try:
            machine = machine_on(place / "vm001", order, Disk("raw", SMALL_MIB * MIB, str(device)))
            yield Guest(machine, "iscsi", {**server.options, **_OPTIONS})
        finally:
            initiator.log_out(TARGET, server.portal)


DEVICES: Final[Mapping[str, Candidate]] = {
    "thick": Candidate("`lvm`, thick", "a volume in the storage guest", _on_a_thick_volume),
    "thin": Candidate("`lvm`, thin", "a volume in the storage guest", _on_a_thin_volume),
    "lio": Candidate("`iscsi`, LIO, Linux' initiator", "a LUN in the storage guest, its store a file on XFS", _on_lio),
}
"""By the words of the command line, in the order of the table."""
