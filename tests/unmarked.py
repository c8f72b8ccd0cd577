"""The contract of a mechanism for disks of which nothing tells what has changed."""

from __future__ import annotations

from typing import ClassVar

import pytest

from vmsnap.errors import SnapshotError
from vmsnap.testing.rigs import SnapshotRig
from vmsnap.testing.snapshot import SnapshotContract, live


class Unmarked(SnapshotContract):
    """What the suite asks of changes is turned round."""

    somebodys_mark: ClassVar[str]
    """A mark that has the form of this mechanism's."""

    def test_25_changed_extents_name_every_change(self, rig: SnapshotRig) -> None:
        """There is no mark, and whoever asks is told so."""
        life = live(rig)
        assert {snapshot.mark for snapshot in life.snapshots} == {""}
        for since in ("", self.somebodys_mark):
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
