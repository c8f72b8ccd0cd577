"""A snapshot mechanism that knows what has changed spares the backup of a running VM most of its reading, and one that
is wrong costs it nothing but the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_contract_snapshot import MarksBearTheDisk
from tests.world import MIB, World, unguarded
from vmsnap.controller import BackupResult, Controller, Drivers
from vmsnap.errors import SnapshotError
from vmsnap.model import DiskSnapshot, Extent, SnapshotPlan
from vmsnap.repository import ChunkSizes
from vmsnap.roles import SnapshotMechanism
from vmsnap.roles.filereader import FileReader

CHUNK = ChunkSizes().disk


class WatchedReader(FileReader):
    """Notes which chunks were read."""

    chunks: list[int] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.chunks.extend(range(offset // CHUNK, -(-(offset + len(buffer)) // CHUNK)))
        super().read_into(offset, buffer)


class Watched(MarksBearTheDisk):
    """Notes what it was asked and what it answered."""

    asked: list[str] = []
    answered: list[Extent] = []

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        self.asked.append(since)
        return super().changed_extents(snapshot, since)

    def differences(self, old: bytes, new: bytes) -> Iterator[Extent]:
        for extent in super().differences(old, new):
            self.answered.append(extent)
            yield extent

    def reader(self, snapshot: DiskSnapshot) -> FileReader:
        return WatchedReader(Path(snapshot.data["file"]), snapshot.disk.size_bytes)


class Forgetful(Watched):
    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        raise SnapshotError("the bitmap is gone")


class OneMechanism(Drivers):
    kind: type[SnapshotMechanism] = Watched

    def mechanism(self, name: str) -> SnapshotMechanism:
        return self.kind(self.context, {"way": "copy"})


def back_up(world: World, kind: type[SnapshotMechanism]) -> BackupResult:
    drivers = OneMechanism(world.folders.context())
    drivers.kind = kind
    with Controller(world.folders, drivers=drivers, start_guardian=unguarded) as controller:
        return controller.backup("vm001", world.repository())


@pytest.fixture
def world() -> Iterator[World]:
    for noted in (Watched.asked, Watched.answered, WatchedReader.chunks):
        noted.clear()
    made = World(disk_bytes=16 * MIB)
    yield made
    made.close()


def test_the_second_backup_reads_what_changed(world: World) -> None:
    first = back_up(world, Watched)
    assert Watched.asked == []
    WatchedReader.chunks.clear()
    second = back_up(world, Watched)
    assert len(Watched.asked) == 2
    assert second.warnings == ()
    repository = world.repository()
    assert not repository.verify(second.backup).findings
    old, new = (repository.manifest(result.backup) for result in (first, second))
    assert [disk.mark for disk in old.disks] == Watched.asked
    changed = {extent.offset // CHUNK for extent in Watched.answered}
    # One sample of each disk, for each has one node.
    assert len([chunk for chunk in WatchedReader.chunks if chunk not in changed]) <= 2
    repository.forget(first.backup)
    assert not repository.verify(second.backup).findings
    assert all(disk.mark for disk in new.disks)


def test_a_mechanism_that_cannot_say_costs_the_hint_and_not_the_backup(world: World) -> None:
    back_up(world, Watched)
    second = back_up(world, Forgetful)
    assert len(second.warnings) == 2
    assert all("the bitmap is gone" in warning for warning in second.warnings)
    assert not world.repository().verify(second.backup).findings


def test_a_disk_of_another_address_or_mechanism_is_not_asked_for(world: World) -> None:
    class Elsewhere(Watched):
        def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
            taken = super().snapshot(plan)
            return tuple(replace(one, disk=replace(one.disk, address=one.disk.address + ".new")) for one in taken)

    back_up(world, Watched)
    back_up(world, Elsewhere)
    assert Watched.asked == []
