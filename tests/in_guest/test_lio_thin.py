"""The mechanism ``iscsi`` fulfils the contract of its role on thin volumes behind LIO, too: what the appliance of the
whole scenario has. With files behind it the suite has it in `tests.in_guest.test_lio`; ``make test-cuts`` runs this.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.in_guest.told_here import ToldHere
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thin, volume_group, volumes
from tests.lab.appliance import lio_library
from tests.lab.lio import LioServer
from tests.left_out import EVERYWHERE
from tests.lun_rig import LunRig
from vmsnap.model import Disk
from vmsnap.roles import SnapshotMechanism
from vmsnap.testing.snapshot import SnapshotContract
from vmsnap_drivers.snapshots.iscsi import places

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def server() -> Iterator[LioServer]:
    with LioServer(lio_library()) as made:
        yield made


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


class _OnThinVolumes(SnapshotContract):
    @pytest.fixture
    def rig(self, server: LioServer, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThinRig]:
        monkeypatch.setattr(places, "Lio", ToldHere)
        rig = ThinRig(tmp_path, server, {"pause_seconds": "60"})
        yield rig
        rig.end()
        for target in server.targets():
            server.remove(target)
        assert server.stores() == [] and not [name for name in volumes() if "vmsnap" in name]


if EVERYWHERE:

    class TestThinVolumes(_OnThinVolumes):
        """Collected then."""
