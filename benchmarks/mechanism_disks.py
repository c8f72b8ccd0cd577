"""The guests of `benchmarks.mechanism_pause`: one for each mechanism, and where its one raw disk lies.

Each is laid out in a folder of its own, with whatever serves the disk, and all of it goes with the ``with``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab import Disk, LabMachine, QemuBuild
from tests.lab import tgtd as tgt
from tests.lab import zfs_fuse as zfs
from tests.lab.appliance import Appliance
from tests.lab.lio import QEMU
from tests.lab.tgtd import TargetServer
from tests.lab.xfs import mounted_xfs
from tests.lab.zfs_fuse import ZfsFuse
from tests.qemu_stage import chap_arguments

MIB: Final = 1 << 20
WITNESS: Final = "witness.sock"
"""A monitor of each guest's own, beside vmsnap's, in its folder."""
SMALL_MIB: Final = 80
"""A disk where the lab has no room for a larger one. How much is on it makes no difference there."""
SLOW_COMMAND_SECONDS: Final = 90
"""What one command may take in the pause, in an appliance that is emulated."""
_DATA_FROM_BYTES: Final = 32 * MIB
"""Behind the guest's own records."""
_PIECE_BYTES: Final = 4 * MIB
_MEMORY_MIB: Final = 256
_SLOTS: Final = 64
TARGET: Final = "iqn.2009-12.com.example:bench"
"""Of every disk that is a LUN."""
_ACCOUNT, _WORD = "keeper", "word-of-chap-12"


@dataclass(frozen=True)
class Order:
    """What all guests have in common: the QEMU, and how much data is on a disk."""

    build: QemuBuild
    data_mib: int


@dataclass(frozen=True)
class Guest:
    """A machine that is not started yet, and the mechanism of its disk, with options."""

    machine: LabMachine
    mechanism: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One row of the table. `disk` says where the disk lies, `lay` lays everything out in an empty folder."""

    mechanism: str
    disk: str
    lay: Callable[[Path, Order], AbstractContextManager[Guest]]


@contextmanager
def _by_qcow2(place: Path, order: Order) -> Iterator[Guest]:
    yield Guest(_on_a_file(place / "vm001", order), "qcow2")


@contextmanager
def _by_copy(place: Path, order: Order) -> Iterator[Guest]:
    yield Guest(_on_a_file(place / "vm001", order), "file", {"way": "copy"})


@contextmanager
def _by_reflink(place: Path, order: Order) -> Iterator[Guest]:
    with _xfs(place, order) as mount:
        yield Guest(_on_a_file(mount / "vm001", order), "file", {"way": "reflink"})


@contextmanager
def _on_zfs(place: Path, order: Order) -> Iterator[Guest]:
    with _in_path(zfs.programs()), ZfsFuse(place / "zfs") as server:
        server.run("zfs", "create", f"{server.pool}/vm001")
        image = server.mounted / "vm001" / "disk.img"
        with image.open("wb") as file:
            file.truncate(SMALL_MIB * MIB)
        machine = machine_on(place / "vm001", order, Disk("raw", SMALL_MIB * MIB))
        machine.folder.mkdir()
        machine.disk_path(0).symlink_to(image)
        yield Guest(machine, "zfs", {"pause_seconds": str(SLOW_COMMAND_SECONDS)})


@contextmanager
def _on_tgt(place: Path, order: Order) -> Iterator[Guest]:
    with _in_path(tgt.programs()), _xfs(place, order) as mount, TargetServer(place / "tgtd") as server:
        size_bytes = _DATA_FROM_BYTES + order.data_mib * MIB
        _fill(mount / "lun.img", size_bytes)
        server.add(TARGET, mount / "lun.img")
        machine = machine_on(place / "vm001", order, Disk("raw", size_bytes, server.address(TARGET)))
        yield Guest(machine, "iscsi", server.options)


@contextmanager
def _in_an_appliance(place: Path, order: Order) -> Iterator[Guest]:
    (place / "word").write_text(_WORD)
    with Appliance(place / "appliance") as appliance:
        disk = Disk("raw", SMALL_MIB * MIB, appliance.address(TARGET, "lio"), _ACCOUNT)
        machine = machine_on(place / "vm001", order, disk, chap_arguments(place / "word"))
        appliance.add_lio(TARGET, "vm001", SMALL_MIB, [f"{QEMU}:{machine.uuid}"], _ACCOUNT, _WORD)
        options = {
            "appliances": f"{appliance.portal('lio')}={appliance.url()}",
            "known_hosts": str(appliance.known_hosts),
            "ssh_key": str(appliance.key),
            "pause_seconds": str(SLOW_COMMAND_SECONDS),
            "chap_user": _ACCOUNT,
            "chap_password_file": str(place / "word"),
        }
        yield Guest(machine, "iscsi", options)


FILES_AND_LUNS: Final[Mapping[str, Candidate]] = {
    "qcow2": Candidate("`qcow2`", "a file on this host", _by_qcow2),
    "reflink": Candidate("`file`, reflinked", "a file on XFS", _by_reflink),
    "copy": Candidate("`file`, copied", "a file on this host", _by_copy),
    "zfs": Candidate("`zfs`", "a file on zfs-fuse", _on_zfs),
    "iscsi": Candidate("`iscsi`, tgt on this host", "a LUN, its store a file on XFS", _on_tgt),
    "appliance": Candidate("`iscsi`, LIO and LVM-thin over SSH", "a LUN of an emulated appliance", _in_an_appliance),
}
"""By the words of the command line, in the order of the table."""


def _on_a_file(folder: Path, order: Order) -> LabMachine:
    size_bytes = _DATA_FROM_BYTES + order.data_mib * MIB
    machine = machine_on(folder, order, Disk("raw", size_bytes))
    folder.mkdir()
    _fill(machine.disk_path(0), size_bytes)
    return machine


def machine_on(folder: Path, order: Order, disk: Disk, arguments: Sequence[str] = ()) -> LabMachine:
    """The guest of every row, on that disk."""
    return LabMachine(
        folder,
        order.build,
        memory_mib=_MEMORY_MIB,
        disks=[disk],
        settings={"slots": _SLOTS},
        extra_arguments=[*arguments, "-qmp", f"unix:{folder / WITNESS},server=on,wait=off"],
    )


def _xfs(place: Path, order: Order) -> AbstractContextManager[Path]:
    return mounted_xfs(place, (4 * order.data_mib + 1024) * MIB)


@contextmanager
def _in_path(folder: Path) -> Iterator[None]:
    """Within, programs of that folder are found first, by the guardian too."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}:{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _fill(path: Path, size_bytes: int) -> None:
    """A raw disk, with noise behind what the guest uses, all of it on the host's disk."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
        file.seek(_DATA_FROM_BYTES)
        for _ in range(_DATA_FROM_BYTES, size_bytes, _PIECE_BYTES):
            file.write(os.urandom(_PIECE_BYTES))
        file.flush()
        os.fsync(file.fileno())
