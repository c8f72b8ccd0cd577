"""The mechanism ``iscsi`` fulfils the contract of its role, on a real tgtd over files on a real XFS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.tgtd import TargetServer, programs
from tests.lun_rig import LunRig, rig_on
from tests.test_file_mechanism import xfs
from vmsnap.testing.snapshot import SnapshotContract

__all__ = ["xfs"]
pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetServer]:
    with TargetServer(tmp_path_factory.mktemp("tgtd")) as made:
        yield made


@pytest.fixture(autouse=True)
def tgtadm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab's own is found as an installed one is."""
    monkeypatch.setenv("PATH", f"{programs()}:{os.environ['PATH']}")


class TestFilesReadWhereTheyLie(SnapshotContract):
    @pytest.fixture
    def rig(self, xfs: Path, server: TargetServer) -> Iterator[LunRig]:
        yield from rig_on(xfs / "rig", server, {})


class TestFilesReadByTheInitiator(SnapshotContract):
    @pytest.fixture
    def rig(self, xfs: Path, server: TargetServer) -> Iterator[LunRig]:
        yield from rig_on(xfs / "rig", server, {"reading": "initiator"})
