"""The mechanism ``iscsi`` fulfils the contract of its role, on a real tgtd over files on a real XFS."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.lab.tgtd import TargetServer, programs
from tests.test_file_mechanism import xfs
from vmsnap.model import Disk
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig
from vmsnap.testing.snapshot import SnapshotContract
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism
from vmsnap_drivers.snapshots.iscsi.address import parse

__all__ = ["xfs"]
pytestmark = pytest.mark.lab
SIZE = 1 << 20
TARGETS = ("iqn.2009-12.com.example:001", "iqn.2009-12.com.example:001-data")


class IscsiRig(SnapshotRig):
    """Two LUNs; the writer is the test itself, which writes to the backing stores as tgtd does."""

    def __init__(self, folder: Path, server: TargetServer, options: Mapping[str, str]) -> None:
        self.scratch = folder
        self.images = folder / "images"
        self.images.mkdir()
        self.context = DriverContext(folder / "state", folder / "memory")
        self.server = server
        self.options = {"control_port": str(server.control_port), **options}
        self.mechanisms: list[SnapshotMechanism] = []
        self._disks = tuple(
            Disk(f"disk{index}", server.address(target), (1 + 2 * index) * SIZE) for index, target in enumerate(TARGETS)
        )
        for disk, target in zip(self._disks, TARGETS, strict=True):
            image = self.images / f"{disk.device}.img"
            with image.open("wb") as file:
                file.truncate(disk.size_bytes)
            server.add(target, image)
            for at in (0, 100 << 10, disk.size_bytes // 2, disk.size_bytes - 4096):
                self.write(disk, at, os.urandom(4096))

    def mechanism(self) -> IscsiMechanism:
        made = IscsiMechanism(self.context, self.options)
        self.mechanisms.append(made)
        return made

    def disks(self) -> tuple[Disk, ...]:
        return self._disks

    def path(self, disk: Disk) -> Path:
        """What lies behind a LUN, as tgtd says."""
        lun = parse(disk.address)
        assert lun is not None
        (path,) = self.server.targets()[lun.target]
        return Path(path)

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        with self.path(disk).open("r+b") as image:
            image.seek(offset)
            image.write(data)

    def content(self, disk: Disk) -> bytes:
        return self.path(disk).read_bytes()

    def pause(self) -> None:
        for disk in self._disks:
            with self.path(disk).open("rb") as image:
                os.fsync(image)

    def resume(self) -> None:
        pass

    def traces(self) -> frozenset[str]:
        # The folder of notes stays.
        files = {str(path) for path in self.scratch.rglob("*")}
        return frozenset(
            files - {str(self.context.state_dir), str(self.context.state_dir / "iscsi")} | set(self.server.targets())
        )

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        index = self._disks.index(disk)
        (image,) = self.images.glob(f"vmsnap-*~{index}~snapshot.iscsi")
        for target, paths in self.server.targets().items():
            if str(image) in paths:
                self.server.remove(target)
        image.unlink()

    def end(self) -> None:
        for mechanism in self.mechanisms:
            mechanism.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetServer]:
    with TargetServer(tmp_path_factory.mktemp("tgtd")) as made:
        yield made


@pytest.fixture(autouse=True)
def tgtadm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab's own is found as an installed one is."""
    monkeypatch.setenv("PATH", f"{programs()}:{os.environ['PATH']}")


def rig_on(folder: Path, server: TargetServer, options: Mapping[str, str]) -> Iterator[IscsiRig]:
    folder.mkdir()
    rig = IscsiRig(folder, server, options)
    yield rig
    rig.end()
    for target in server.targets():
        server.remove(target)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


class TestFilesReadWhereTheyLie(SnapshotContract):
    @pytest.fixture
    def rig(self, xfs: Path, server: TargetServer) -> Iterator[IscsiRig]:
        yield from rig_on(xfs / "rig", server, {})


class TestFilesReadByTheInitiator(SnapshotContract):
    @pytest.fixture
    def rig(self, xfs: Path, server: TargetServer) -> Iterator[IscsiRig]:
        yield from rig_on(xfs / "rig", server, {"reading": "initiator"})
