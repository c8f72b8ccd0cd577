"""Several mechanisms in one VM: all of them inside one pause, side by side; what one of them does to the others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from tests.test_backup_failures import TWO_MECHANISMS
from tests.world import World, WorldDrivers, unguarded
from vmsnap.controller import Controller
from vmsnap.controller.interruption import Interruption
from vmsnap.errors import Interrupted, SnapshotError, VmsnapError
from vmsnap.guardian import start_for
from vmsnap.model import DiskSnapshot, SnapshotPlan
from vmsnap.roles import DriverContext, SnapshotMechanism

Act = Callable[[str, Callable[[], tuple[DiskSnapshot, ...]]], tuple[DiskSnapshot, ...]]
PATIENCE_SECONDS = 60.0


@pytest.fixture
def world() -> Iterator[World]:
    made = World(mechanisms=TWO_MECHANISMS)
    yield made
    made.close()


class WatchedDrivers(WorldDrivers):
    """Mechanisms whose `snapshot` goes through `act`, which is told the mechanism's name."""

    def __init__(self, context: DriverContext, act: Act) -> None:
        super().__init__(context)
        self._act = act

    def mechanism(self, name: str) -> SnapshotMechanism:
        made = super().mechanism(name)
        take = made.snapshot

        def snapshot(plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
            return self._act(name, lambda: take(plan))

        vars(made)["snapshot"] = snapshot
        return made


def controller(world: World, act: Act, *, guarded: bool = False) -> Controller:
    drivers = WatchedDrivers(world.folders.context(), act)
    return Controller(world.folders, drivers=drivers, start_guardian=start_for if guarded else unguarded)


def test_they_work_side_by_side_and_each_moment_lies_in_the_pause(world: World) -> None:
    both = threading.Barrier(2)

    def meet(_name: str, take: Callable[[], tuple[DiskSnapshot, ...]]) -> tuple[DiskSnapshot, ...]:
        both.wait(PATIENCE_SECONDS)  # one that waits for the other's end never gets past this
        return take()

    with controller(world, meet) as made:
        result = made.backup("vm001", world.repository(), max_pause_seconds=PATIENCE_SECONDS)
    manifest = world.repository().manifest(result.backup)
    assert [(disk.device, disk.mechanism) for disk in manifest.disks] == [("disk0", "file"), ("disk1", "second")]
    moments = [moment.name for moment in manifest.moments]
    assert moments.count("snapshot") == 2
    assert moments[0] == "pause" and moments[-1] == "resume"
    world.see_that_all_is_well(backups=1)


def test_the_first_failure_is_told_and_the_others_are_waited_for_while_the_guest_runs(world: World) -> None:
    begun, failed, ended = threading.Event(), threading.Event(), []

    def act(name: str, take: Callable[[], tuple[DiskSnapshot, ...]]) -> tuple[DiskSnapshot, ...]:
        if name == "second":
            begun.wait(PATIENCE_SECONDS)  # what had not begun would not be waited for
            failed.set()
            raise SnapshotError("this one cannot")
        begun.set()
        failed.wait(PATIENCE_SECONDS)
        assert world.counts_on(PATIENCE_SECONDS), "the guest waits for a snapshot that nobody wants any more"
        taken = take()
        ended.append(name)
        return taken

    with controller(world, act) as made, pytest.raises(SnapshotError, match="this one cannot"):
        made.backup("vm001", world.repository(), max_pause_seconds=PATIENCE_SECONDS)
    assert ended == ["file"]
    world.see_that_all_is_well(backups=0)


def test_what_fails_after_the_first_is_told_beside_it(world: World) -> None:
    first = threading.Event()

    def act(name: str, take: Callable[[], tuple[DiskSnapshot, ...]]) -> tuple[DiskSnapshot, ...]:
        if name == "file":
            first.wait(PATIENCE_SECONDS)
        else:
            first.set()
        raise SnapshotError(f"{name} cannot")

    with controller(world, act) as made, pytest.raises(SnapshotError) as raised:
        made.backup("vm001", world.repository(), max_pause_seconds=PATIENCE_SECONDS)
    told = [raised.value.message, *getattr(raised.value, "__notes__", [])]
    assert len(told) == 2 and {"file cannot", "second cannot"} == {line.rpartition(": ")[2] for line in told}
    world.see_that_all_is_well(backups=0)


def test_one_that_hangs_costs_the_backup_and_not_the_guest(world: World) -> None:
    """In a process of its own, which the guardian ends."""

    def act(name: str, take: Callable[[], tuple[DiskSnapshot, ...]]) -> tuple[DiskSnapshot, ...]:
        if name == "second":
            time.sleep(PATIENCE_SECONDS)
        return take()

    child = os.fork()
    if child == 0:
        try:
            with controller(world, act, guarded=True) as made:
                made.backup("vm001", world.repository(), max_pause_seconds=1.0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert world.counts_on(PATIENCE_SECONDS)
    with world.controller() as made:
        assert made.recover().kept == ()
    world.see_that_all_is_well(backups=0)


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_in_the_pause_leaves_nothing_whatever_is_still_at_work(
    world: World, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """The first one waits for the end of the pause, the second one ends it: what is at work then is waited for too."""
    begun, go_on, arrived = threading.Event(), threading.Event(), threading.Event()
    heard = Interruption._arrived

    def hear(self: Interruption, number: int, frame: FrameType | None) -> None:
        arrived.set()
        heard(self, number, frame)

    monkeypatch.setattr(Interruption, "_arrived", hear)

    def act(name: str, take: Callable[[], tuple[DiskSnapshot, ...]]) -> tuple[DiskSnapshot, ...]:
        if name == "second":
            begun.set()
            assert go_on.wait(PATIENCE_SECONDS)
        return take()

    def press() -> None:
        assert begun.wait(PATIENCE_SECONDS)
        for _ in range(signals):
            arrived.clear()
            os.kill(os.getpid(), signal.SIGINT)
            assert arrived.wait(PATIENCE_SECONDS)  # signals of one kind that wait together are one
        if signals == 2:
            world.counts_on(PATIENCE_SECONDS)
        go_on.set()

    pressing = threading.Thread(target=press)
    with controller(world, act) as made:
        pressing.start()
        with pytest.raises(Interrupted):
            made.backup("vm001", world.repository(), max_pause_seconds=PATIENCE_SECONDS)
        pressing.join()
    world.see_that_all_is_well(backups=0)


def test_a_snapshot_that_does_not_end_is_not_deleted_behind_its_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmsnap.controller.snapshots.PATIENCE_SECONDS", 0.1)
    failed, go_on = threading.Event(), threading.Event()

    def act(name: str, take: Callable[[], tuple[DiskSnapshot, ...]]) -> tuple[DiskSnapshot, ...]:
        if name == "second":
            failed.set()
            raise SnapshotError("this one cannot")
        failed.wait(PATIENCE_SECONDS)
        go_on.wait(PATIENCE_SECONDS)
        return take()

    with controller(world, act) as made:
        with pytest.raises(VmsnapError) as raised:
            made.backup("vm001", world.repository(), max_pause_seconds=PATIENCE_SECONDS)
        assert any("mechanism 'file' does not end its snapshot" in note for note in raised.value.__notes__)
        assert [row.vm for row in made.journal.unfinished()] == ["vm001"]
        go_on.set()
        while any(thread.name == "vmsnap file" for thread in threading.enumerate()):
            time.sleep(0.01)
        assert made.recover().kept == ()
    world.see_that_all_is_well(backups=0)
