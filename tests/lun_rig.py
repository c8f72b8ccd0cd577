"""A rig of two LUNs on real targets, of whatever serves them: the backing stores are files on a real XFS, or whatever a
test puts there. Used on this host with tgt, and in the storage guest with LIO.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from vmsnap.model import Disk
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism
from vmsnap_drivers.snapshots.iscsi.address import LunAddress, parse

SIZE = 1 << 20
TARGETS = ("iqn.2009-12.com.example:001", "iqn.2009-12.com.example:001-data")


class Server(Protocol):
    """What serves targets, as the lab starts it; asked past the mechanism. `this_host` is as which vmsnap's own reading
    comes from here.
    """

    this_host: str

    @property
    def options(self) -> dict[str, str]:
        """Of the mechanism, for this server."""

    def address(self, target: str) -> str:
        """The address of a target's first disk."""

    def add(
        self,
        target: str,
        path: Path | None,
        *,
        user: str = "",
        password: str = "",
        shown: tuple[str, str] = ("", ""),
    ) -> object:
        """Make a target; `shown` is the account by which it shows who it is."""

    def remove(self, target: str) -> None:
        """Remove a target, whoever uses it."""

    def targets(self) -> dict[str, list[str]]:
        """All targets, each with its backing stores."""

    def access(self, target: str) -> list[str]:
        """Whom a target admits."""

    def read_only(self, target: str) -> bool:
        """Whether whoever is admitted may only read."""


class LunRig(SnapshotRig):
    """Two LUNs; the writer is the test itself, which writes to the backing stores as the server does."""

    def __init__(self, folder: Path, server: Server, options: Mapping[str, str]) -> None:
        self.scratch = folder
        self.images = folder / "images"
        self.images.mkdir()
        self.context = DriverContext(folder / "state", folder / "memory")
        self.server = server
        self.options = {**server.options, **options}
        self.mechanisms: list[SnapshotMechanism] = []
        self._disks = tuple(
            Disk(f"disk{index}", server.address(target), (1 + 2 * index) * SIZE) for index, target in enumerate(TARGETS)
        )
        self._stores: dict[str, Path] = {}
        for disk, target in zip(self._disks, TARGETS, strict=True):
            self._stores[target] = self.make_store(disk)
            server.add(target, self._stores[target])
            for at in (0, 100 << 10, disk.size_bytes // 2, disk.size_bytes - 4096):
                self.write(disk, at, os.urandom(4096))

    def make_store(self, disk: Disk) -> Path:
        """What is to lie behind a LUN."""
        image = self.images / f"{disk.device}.img"
        with image.open("wb") as file:
            file.truncate(disk.size_bytes)
        return image

    def mechanism(self) -> IscsiMechanism:
        made = IscsiMechanism(self.context, self.options)
        self.mechanisms.append(made)
        return made

    def disks(self) -> tuple[Disk, ...]:
        return self._disks

    def lun(self, disk: Disk) -> LunAddress:
        """Where a disk is."""
        found = parse(disk.address)
        assert found is not None
        return found

    def path(self, disk: Disk) -> Path:
        """What lies behind a LUN; a duplicate's is asked of its server."""
        target = self.lun(disk).target
        if target in self._stores:
            return self._stores[target]
        (path,) = self.server.targets()[target]
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


RigOfLuns = TypeVar("RigOfLuns", bound=LunRig)


def in_use(rig: RigOfLuns) -> Iterator[RigOfLuns]:
    """The rig, and no target of its server afterwards."""
    yield rig
    rig.end()
    for target in rig.server.targets():
        rig.server.remove(target)


def rig_on(folder: Path, server: Server, options: Mapping[str, str]) -> Iterator[LunRig]:
    """A rig in a new folder, and nothing of it afterwards."""
    folder.mkdir()
    yield from in_use(LunRig(folder, server, options))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
