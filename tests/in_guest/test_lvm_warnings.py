"""A backup whose snapshot fills up, on a real volume: it is told while there is time, and a loss by the same names."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.volumes import MIB, make_thick, volume_group
from tests.world import World
from vmsnap.controller import Progress
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap_drivers.hypervisors.simulated.layout import PAGE, Slots

pytestmark = pytest.mark.storage


class Overwriting:
    """A guest's disk that is overwritten when its backup begins to be stored, until it is told, and then further."""

    def __init__(self, address: str, size_bytes: int, then_bytes: int) -> None:
        self._address, self._then_bytes = address, then_bytes
        self._slots = Slots.of(size_bytes)
        self._written = 0
        self._begun = False
        self.warned = threading.Event()
        self.told: list[str] = []

    def __call__(self, progress: Progress) -> None:
        if progress.warning:
            self.told.append(progress.warning)
            self.warned.set()
        elif progress.phase == "storing" and not self._begun:
            self._begun = True
            self._overwrite(3 * MIB // 2)
            assert self.warned.wait(60), "nothing was told while it was read"
            self._overwrite(self._then_bytes)

    def _overwrite(self, size_bytes: int) -> None:
        """Between the blocks in which the guest keeps its records."""
        until = self._written + size_bytes
        while self._written < until:
            piece = (self._slots.stride_blocks - 1) * PAGE
            write(self._address, self._slots.offset(self._written // piece) + PAGE, os.urandom(piece))
            self._written += piece
        sync(self._address)


@pytest.fixture
def thick(tmp_path: Path) -> Iterator[Disk]:
    with volume_group(tmp_path, "vg", 32) as group:
        yield make_thick(group, "disk-0", 8)


@pytest.fixture
def world(thick: Disk) -> Iterator[World]:
    made = World(
        images=[Path(thick.address)],
        mechanism_options={"lvm": {"pause_seconds": "60", "snapshot_size": "2M", "grow": "no"}},
    )
    yield made
    made.close()


def test_a_snapshot_that_fills_up_is_told_of_while_it_is_read_and_the_backup_goes_through(
    world: World, thick: Disk
) -> None:
    guest = Overwriting(thick.address, thick.size_bytes, 0)
    with world.controller() as controller:
        result = controller.backup("vm001", world.repository(), max_pause_seconds=100.0, progress=guest)
    (line,) = result.warnings
    for told in (line, *guest.told):
        assert told.startswith("the snapshot vg/vmsnap-") and f".0 of {thick.address}: " in told
        assert "% of its 2097152 bytes of room are used, and the option grow=no keeps it" in told
        assert "(extend it: lvextend --size +SIZE vg/vmsnap-" in told
    assert len(guest.told) == 1
    world.see_that_all_is_well(1)


def test_without_a_cure_the_loss_is_told_by_the_same_names(world: World, thick: Disk) -> None:
    guest = Overwriting(thick.address, thick.size_bytes, 4 * MIB)
    with world.controller() as controller, pytest.raises(SnapshotError) as lost:
        controller.backup("vm001", world.repository(), max_pause_seconds=100.0, progress=guest)
    (told,) = guest.told
    name = told.partition(" of ")[0]
    assert str(lost.value).startswith(f"{name} is lost: ")
    world.see_that_all_is_well(0)
