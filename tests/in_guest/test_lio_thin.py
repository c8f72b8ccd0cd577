"""The mechanism ``iscsi`` fulfils the contract of its role on thin volumes behind LIO, too: what the appliance of the
whole scenario has. With files behind it the suite has it in `tests.in_guest.test_lio`;
``make test-exhaustive`` runs this.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.in_guest.test_lio import server
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thin, volume_group, volumes
from tests.lab.lio import LioServer
from tests.lun_rig import LunRig, in_use
from vmsnap.model import Disk
from vmsnap.roles import SnapshotMechanism
from vmsnap.testing.snapshot import SnapshotContract

__all__ = ["server"]
pytestmark = [pytest.mark.storage, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("group"), "vg0") as name:
        make_pool(name, "pool", 64)
        yield name


class ThinRig(LunRig):
    """Two LUNs on thin volumes, which stay from test to test."""

    group = "vg0"

    def make_store(self, disk: Disk) -> Path:
        node = Path("/dev") / self.group / disk.device
        if f"{self.group}/{disk.device}" not in volumes():
            make_thin(self.group, "pool", disk.device, disk.size_bytes // MIB)
        return node

    def traces(self) -> frozenset[str]:
        return super().traces() | set(volumes())

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        end = f".{self._disks.index(disk)}"
        ((target, (path,)),) = (
            (name, paths) for name, paths in self.server.targets().items() if ":vmsnap-" in name and name.endswith(end)
        )
        self.server.remove(target)
        lvm("lvremove", "--force", path)


class TestThinVolumes(SnapshotContract):
    @pytest.fixture
    def rig(self, server: LioServer, group: str, tmp_path: Path) -> Iterator[ThinRig]:
        yield from in_use(ThinRig(tmp_path, server, {"pause_seconds": "60"}))
        assert server.stores() == [] and not [name for name in volumes() if "vmsnap" in name]
