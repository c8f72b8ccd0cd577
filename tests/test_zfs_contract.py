"""The mechanism ``zfs`` fulfils the contract of its role on zfs-fuse, with image files in two file systems.

On OpenZFS, with volumes too, it does so in ``tests/in_guest/openzfs``: ``make test-openzfs``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.zfs_fuse import ZfsFuse, programs
from tests.unmarked import Unmarked
from tests.zfs_rig import MIB, ZfsRig, make_image
from vmsnap.model import Disk

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def zfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZfsFuse]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", str(programs()), prepend=":")
        with ZfsFuse(tmp_path_factory.mktemp("zfs")) as started:
            yield started


@pytest.fixture(scope="module")
def two_disks(zfs: ZfsFuse) -> tuple[Disk, ...]:
    disks = []
    for index, size in enumerate((MIB, 3 * MIB)):
        zfs.run("zfs", "create", f"{zfs.pool}/vm{index}")
        disks.append(make_image(zfs.mounted / f"vm{index}" / "disk.img", size, f"disk{index}"))
    return tuple(disks)


class TestImageFiles(Unmarked):
    """zfs-fuse has no bookmarks."""

    somebodys_mark = "tank/vm#any"

    @pytest.fixture
    def rig(self, zfs: ZfsFuse, two_disks: tuple[Disk, ...], tmp_path: Path) -> Iterator[ZfsRig]:
        rig = ZfsRig(zfs.run, zfs.pool, tmp_path, two_disks)
        yield rig
        rig.end()
