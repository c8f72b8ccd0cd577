"""The mechanism ``zfs`` fulfils the contract of its role on zfs-fuse, with image files in two file systems.

On OpenZFS, with volumes too, it does so in ``tests/in_guest/openzfs``: ``make test-openzfs``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.zfs_fuse import ZfsFuse, programs
from tests.zfs_rig import MIB, ZfsRig, make_image
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap.testing.rigs import SnapshotRig
from vmsnap.testing.snapshot import SnapshotContract, live

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


class TestImageFiles(SnapshotContract):
    @pytest.fixture
    def rig(self, zfs: ZfsFuse, two_disks: tuple[Disk, ...], tmp_path: Path) -> Iterator[ZfsRig]:
        rig = ZfsRig(zfs.run, zfs.pool, tmp_path, two_disks)
        yield rig
        rig.end()

    def test_25_changed_extents_name_every_change(self, rig: SnapshotRig) -> None:
        """zfs-fuse has no bookmarks: there is no mark, and whoever asks is told so."""
        life = live(rig)
        assert {snapshot.mark for snapshot in life.snapshots} == {""}
        for since in ("", "tank/vm#any"):
            with pytest.raises(SnapshotError):
                list(life.mechanism.changed_extents(life.snapshots[0], since))
        life.end()

    def test_26_a_record_of_changes_goes_on_until_another_is_kept_in_its_stead(self, rig: SnapshotRig) -> None:
        """Keeping and forgetting what there is not does nothing."""
        life = live(rig)
        before = rig.traces()
        life.mechanism.keep_mark(life.snapshots[0])
        life.mechanism.forget_marks(rig.vm)
        assert rig.traces() == before
        life.end()
