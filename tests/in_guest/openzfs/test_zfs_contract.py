"""The mechanism ``zfs`` fulfils the contract of its role on OpenZFS: image files of one file system, and volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.in_guest.openzfs.pools import MIB, make_volume, pool, run
from tests.zfs_rig import ZfsRig, make_image
from vmsnap.model import Disk
from vmsnap.testing.snapshot import SnapshotContract

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pool(tmp_path_factory.mktemp("pool"), "tank") as name:
        yield name


@pytest.fixture(scope="module")
def files(tank: str) -> tuple[Disk, ...]:
    run("zfs", "create", f"{tank}/vm")
    folder = Path(run("zfs", "get", "-H", "-o", "value", "mountpoint", f"{tank}/vm").strip())
    return make_image(folder / "a.img", MIB, "disk0"), make_image(folder / "b.img", 3 * MIB, "disk1")


@pytest.fixture(scope="module")
def volumes(tank: str) -> tuple[Disk, ...]:
    return make_volume(tank, "disk0", 1), make_volume(tank, "disk1", 3, "-s")


class TestImageFiles(SnapshotContract):
    @pytest.fixture
    def rig(self, tank: str, files: tuple[Disk, ...], tmp_path: Path) -> Iterator[ZfsRig]:
        rig = ZfsRig(run, tank, tmp_path, files)
        yield rig
        rig.end()


class TestVolumes(SnapshotContract):
    @pytest.fixture
    def rig(self, tank: str, volumes: tuple[Disk, ...], tmp_path: Path) -> Iterator[ZfsRig]:
        rig = ZfsRig(run, tank, tmp_path, volumes)
        yield rig
        rig.end()
