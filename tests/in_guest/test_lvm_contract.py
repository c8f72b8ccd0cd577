"""The mechanism ``lvm`` fulfils the contract of its role, on real thick and thin volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.in_guest.volumes import LvmRig, make_pool, make_thick, make_thin, volume_group
from tests.unmarked import Unmarked
from vmsnap.model import Disk
from vmsnap.testing.snapshot import SnapshotContract

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("group"), "vg") as name:
        yield name


@pytest.fixture(scope="module")
def thick_disks(group: str) -> tuple[Disk, ...]:
    return make_thick(group, "disk0", 1), make_thick(group, "disk1", 3)


@pytest.fixture(scope="module")
def thin_disks(group: str) -> tuple[Disk, ...]:
    make_pool(group, "pool", 64)
    return make_thin(group, "pool", "thin0", 1), make_thin(group, "pool", "thin1", 3)


class TestThick(Unmarked):
    """Nothing tells what has changed on a thick volume."""

    somebodys_mark = "vg/any"

    @pytest.fixture
    def rig(self, thick_disks: tuple[Disk, ...], tmp_path: Path) -> Iterator[LvmRig]:
        rig = LvmRig(tmp_path, thick_disks, {"pause_seconds": "60"}, thin=False)
        yield rig
        rig.end()


class TestThin(SnapshotContract):
    @pytest.fixture
    def rig(self, thin_disks: tuple[Disk, ...], tmp_path: Path) -> Iterator[LvmRig]:
        rig = LvmRig(tmp_path, thin_disks, {"marks": "4", "pause_seconds": "60"}, thin=True)
        yield rig
        rig.end()
