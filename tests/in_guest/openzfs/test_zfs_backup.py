"""Whole backups of a VM on OpenZFS, one disk a volume and one an image file; and reading only what has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.in_guest.openzfs.pools import make_volume, pool, run
from tests.zfs_backups import BackupScenarios, ZfsWorld
from tests.zfs_rig import MIB, make_image, names
from vmsnap_drivers.snapshots.zfs import ZfsMechanism

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pool(tmp_path_factory.mktemp("pool"), "tank") as name:
        yield name


@pytest.fixture(scope="module")
def made(tank: str) -> Iterator[ZfsWorld]:
    run("zfs", "create", f"{tank}/vm")
    folder = Path(run("zfs", "get", "-H", "-o", "value", "mountpoint", f"{tank}/vm").strip())
    make_image(image := folder / "disk1.img", 8 * MIB, "disk1")
    world = ZfsWorld(run, tank, [Path(make_volume(tank, "disk0", 8).address), image])
    yield world
    world.close()


def bookmarks(tank: str) -> set[str]:
    return {name for name in names(run, tank) if "#" in name}


class TestBackups(BackupScenarios):
    @pytest.fixture
    def world(self, made: ZfsWorld) -> ZfsWorld:
        return made

    def test_the_next_backup_asks_what_has_changed_and_bookmarks_stay_few(self, world: ZfsWorld, tank: str) -> None:
        with world.controller() as controller:
            controller.backup("vm001", world.repository(), max_pause_seconds=100.0)
            before = bookmarks(tank)
            result = controller.backup("vm001", world.repository(), max_pause_seconds=100.0)
            # This guest writes all over its disks: how little is read is seen in test_zfs_failures.
            assert not result.warnings, "they would say why a disk was read whole"
            assert len(bookmarks(tank)) == len(before) and bookmarks(tank) != before
            assert controller.strays() == [], "its disks are registered"
            addresses = {disk.address for disk in controller.table.get("vm001").disks}
        mechanism = ZfsMechanism(world.folders.context(), {})
        marks = [owned for owned in mechanism.list_owned() if owned.kind == "mark"]
        assert len(marks) == len(bookmarks(tank))
        assert {mark.name.partition(" of ")[2] for mark in marks} == addresses
        mechanism.remove_owned(marks[0])
        assert len(bookmarks(tank)) == len(marks) - 1
        mechanism.forget_marks("vm001")
        assert not bookmarks(tank) and not mechanism.list_owned()
        assert not list((world.folders.state_dir / "zfs/marks").iterdir())
