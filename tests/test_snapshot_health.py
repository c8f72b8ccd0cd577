"""What threatens snapshots is told while the backup is stored, and the backup goes on; mechanisms that say nothing
of it are none the worse for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from tests.world import World, WorldDrivers
from vmsnap.cli.progress import Telling
from vmsnap.controller import Controller, Progress
from vmsnap.errors import SnapshotError
from vmsnap.model import Finding, FreezePlan, SnapshotPlan
from vmsnap.roles import Hypervisor, SnapshotMechanism

PATIENCE_SECONDS = 60.0
HealthOf = Callable[[SnapshotPlan], Sequence[Finding]]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "health of snapshots"]


class TellingDrivers(WorldDrivers):
    """Mechanisms whose snapshots fare as `health` says, and a hypervisor that thaws after `before_thaw`."""

    health: HealthOf
    before_thaw: Callable[[], object] = staticmethod(lambda: None)

    def mechanism(self, name: str) -> SnapshotMechanism:
        made = super().mechanism(name)
        vars(made)["health"] = self.health
        return made

    def hypervisor(self, name: str, vm: str, options: Mapping[str, str]) -> Hypervisor:
        made = super().hypervisor(name, vm, options)
        thaw = made.thaw_disks

        def thaw_disks(plan: FreezePlan) -> None:
            self.before_thaw()
            thaw(plan)

        vars(made)["thaw_disks"] = thaw_disks
        return made


def controller(world: World, health: HealthOf, before_thaw: Callable[[], object] = lambda: None) -> Controller:
    drivers = TellingDrivers(world.folders.context())
    drivers.health, drivers.before_thaw = health, before_thaw
    return Controller(world.folders, drivers=drivers, start_guardian=world.start_guardian)


class Watcher:
    """A callback of progress that lets the store begin only when it was warned."""

    def __init__(self) -> None:
        self.warnings: list[Progress] = []
        self.warned = threading.Event()

    def __call__(self, progress: Progress) -> None:
        if progress.warning:
            self.warnings.append(progress)
            self.warned.set()
        elif progress.phase == "storing":
            assert self.warned.wait(PATIENCE_SECONDS), "nothing was told while it was stored"


def test_what_threatens_is_told_once_while_it_is_stored_and_at_last_in_the_result(world: World) -> None:
    used = iter(range(70, 1000))

    def health(plan: SnapshotPlan) -> Sequence[Finding]:
        return [Finding("pool p", "note", f"{next(used)}% of it is used", "extend it")]

    watcher = Watcher()
    with controller(world, health) as made:
        result = made.backup("vm001", world.repository(), progress=watcher)
    assert [progress.warning for progress in watcher.warnings] == ["pool p: 70% of it is used (extend it)"]
    assert watcher.warnings[0].phase in ("copying memory", "storing")
    (line,) = result.warnings
    assert line.startswith("pool p: ") and line.endswith("% of it is used (extend it)")
    world.see_that_all_is_well(backups=1)


def test_with_frozen_disks_it_is_asked_for_before_they_are_thawed(world: World) -> None:
    asked = threading.Event()

    def health(plan: SnapshotPlan) -> Sequence[Finding]:
        asked.set()
        return ()

    def before_thaw() -> None:
        assert asked.wait(PATIENCE_SECONDS), "thawing fills snapshots that nobody looks at"

    with controller(world, health, before_thaw) as made:
        assert made.backup("vm001", world.repository(), freeze="overlay").warnings == ()
    world.see_that_all_is_well(backups=1)


def test_what_cannot_be_said_now_is_asked_again(world: World) -> None:
    asked: list[int] = []

    def health(plan: SnapshotPlan) -> Sequence[Finding]:
        asked.append(1)
        if len(asked) == 1:
            raise SnapshotError("the appliance does not answer")
        return [Finding("pool p", "note", "it is full to 80%", "extend it")]

    watcher = Watcher()
    with controller(world, health) as made:
        result = made.backup("vm001", world.repository(), progress=watcher)
    assert result.warnings == ("pool p: it is full to 80% (extend it)",)


def test_a_mechanism_that_fails_to_tell_costs_no_backup_and_is_named(world: World) -> None:
    def health(plan: SnapshotPlan) -> Sequence[Finding]:
        raise ZeroDivisionError("a pool of no size")

    watcher = Watcher()
    with controller(world, health) as made:
        result = made.backup("vm001", world.repository(), progress=watcher)
    (line,) = result.warnings
    assert "mechanism 'file' fails to tell how its snapshots fare" in line and "a pool of no size" in line
    world.see_that_all_is_well(backups=1)


@pytest.mark.parametrize("freeze", ["none", "overlay"])
def test_a_backup_that_fails_leaves_nobody_asking(world: World, freeze: str) -> None:
    def fail(progress: Progress) -> None:
        if progress.phase == "storing":
            raise SnapshotError("it is over")

    with controller(world, lambda plan: ()) as made, pytest.raises(SnapshotError, match="it is over"):
        made.backup("vm001", world.repository(), freeze=freeze, progress=fail)
    assert not [thread for thread in threading.enumerate() if thread.name == "health of snapshots"]
    world.see_that_all_is_well(backups=0)


def test_people_are_told_a_warning_when_it_comes() -> None:
    shown: list[Progress] = []
    told: list[str] = []
    telling = Telling(shown.append, told.append)
    telling(Progress("storing", 1, 2))
    telling(Progress("storing", 1, 2, "pool p: 80% of it is used"))
    assert shown == [Progress("storing", 1, 2)]
    assert told == telling.told == ["pool p: 80% of it is used"]
