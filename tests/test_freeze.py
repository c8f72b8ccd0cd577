"""Frozen disks, on real simulated VMs: what the guest writes meanwhile is in its disks afterwards, whatever happens;
the snapshots are of the instant, though they were taken later.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.test_backup_failures import TWO_MECHANISMS
from tests.test_side_by_side import controller as watched
from tests.world import FaultyDrivers, World
from vmsnap.controller import Controller
from vmsnap.errors import CannotCapture, UsageError, VmsnapError
from vmsnap.model import DiskSnapshot
from vmsnap.roles import Hypervisor
from vmsnap.testing.faults import FaultPlan
from vmsnap_drivers.hypervisors.simulated import lifecycle
from vmsnap_drivers.hypervisors.simulated.control import ask
from vmsnap_drivers.hypervisors.simulated.layout import read_disk

PATIENCE_SECONDS = 60.0
Take = Callable[[], tuple[DiskSnapshot, ...]]


@pytest.fixture
def world() -> Iterator[World]:
    made = World(mechanisms=TWO_MECHANISMS)
    yield made
    made.close()


def latest(world: World) -> list[int]:
    """The last record on each disk's own file, past its overlay and its VM."""
    contents = [read_disk(path) for path in sorted(world.disk_folder.glob("*.img"))]
    return [content.latest for content in contents if content is not None]


def overlays(world: World) -> list[Path]:
    return sorted(world.disk_folder.glob("*~overlay"))


def test_snapshots_are_taken_while_the_guest_runs_and_are_of_the_instant(world: World) -> None:
    seen = []

    def act(name: str, take: Take) -> tuple[DiskSnapshot, ...]:
        counted, held = world.status()["counter"], latest(world)
        assert world.counts_on(PATIENCE_SECONDS), "the guest waits for the snapshot"
        taken = take()
        while world.status()["counter"] < counted + 3:
            time.sleep(0.001)
        seen.append((name, held == latest(world), len(overlays(world))))
        return taken

    with watched(world, act) as made:
        result = made.backup("vm001", world.repository(), freeze="overlay")
    assert sorted(seen) == [("file", True, 2), ("second", True, 2)]
    manifest = world.repository().manifest(result.backup)
    assert manifest.freeze == "overlay"
    assert [moment.name for moment in manifest.moments] == ["pause", "freeze", "fork", "resume"]
    assert not world.repository().verify(result.backup).findings
    world.see_that_all_is_well(backups=1)
    with world.controller() as made:
        restored = made.restore(world.repository(), result.backup, "vm002", run=True)
        assert restored.state == "executing"
    world.take_away("vm002")


def test_disks_are_not_frozen_without_being_asked_for(world: World) -> None:
    with world.controller() as made:
        assert world.repository().manifest(made.backup("vm001", world.repository()).backup).freeze == ""
        with pytest.raises(UsageError, match="cannot be frozen by 'ice'"):
            made.backup("vm001", world.repository(), freeze="ice")


def test_a_stopped_vm_stays_stopped(world: World) -> None:
    ask(world.socket, "pause")
    with world.controller() as made:
        made.backup("vm001", world.repository(), freeze="overlay")
        assert world.status()["state"] == "stopped"
    ask(world.socket, "resume")
    with world.controller() as made:
        made.vm("vm001")
    world.see_that_all_is_well(backups=1)


class Unfreezing(FaultyDrivers):
    """Drivers of hypervisors without overlays."""

    def hypervisor(self, name: str, vm: str, options: Mapping[str, str]) -> Hypervisor:
        made = super().hypervisor(name, vm, options)
        vars(made)["freezes"] = False
        return made


def test_a_driver_without_overlays_refuses_before_anything_is_touched(world: World) -> None:
    plan = FaultPlan()
    drivers = Unfreezing(world.folders.context(), plan)
    refuses = pytest.raises(CannotCapture, match="driver 'simulated' has no overlays")
    with Controller(world.folders, drivers=drivers, start_guardian=world.start_guardian) as made, refuses as refused:
        made.backup("vm001", world.repository(), freeze="overlay")
    assert refused.value.cure == "back it up without --freeze"
    assert not {"plan_capture", "pause"} & set(plan.calls)
    world.see_that_all_is_well(backups=0)


def killed_while_frozen(world: World) -> None:
    """A backup dies while the snapshots are taken; nobody has put the overlays back."""

    def act(_name: str, _take: Take) -> tuple[DiskSnapshot, ...]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    child = os.fork()
    if child == 0:
        try:
            with watched(world, act) as made:
                made.backup("vm001", world.repository(), freeze="overlay")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(overlays(world)) == 2
    counted = world.status()["counter"]
    while world.status()["counter"] < counted + 3:
        time.sleep(0.001)


@pytest.mark.parametrize("vm_too", [False, True], ids=["vmsnap killed", "vmsnap and the VM killed"])
def test_killed_while_frozen_what_the_guest_wrote_is_in_its_disks_after_recovery(world: World, vm_too: bool) -> None:
    killed_while_frozen(world)
    ask(world.socket, "pause")
    counted = world.status()["completed"]
    assert latest(world) != counted
    if vm_too:
        lifecycle.stop(world.socket, force=True)
    else:
        ask(world.socket, "resume")
    with world.controller() as made:
        recovered = made.recover()
    assert recovered.kept == ()
    assert any(line.startswith("freeze of vmsnap-") for line in recovered.removed)
    assert overlays(world) == []
    if vm_too:
        assert latest(world) == counted
    else:
        world.see_that_all_is_well(backups=0)


def test_an_overlay_whose_disk_was_used_since_is_kept(world: World) -> None:
    killed_while_frozen(world)
    lifecycle.stop(world.socket, force=True)
    newest = overlays(world)[0].stat().st_mtime + 3600
    os.utime(world.disk_folder / "vm001-disk0.img", (newest, newest))
    with world.controller() as made:
        for _ in range(2):
            (line,) = [line for line in made.recover().kept if line.startswith("freeze of")]
            assert "is kept: its disk was written to after it" in line
    assert len(overlays(world)) == 2
    for path in overlays(world):
        path.unlink()
    with world.controller() as made:
        assert made.recover().kept == ()


def test_overlays_that_no_journal_knows_are_strays_and_put_back_when_they_are_named(world: World) -> None:
    killed_while_frozen(world)
    (world.folders.state_dir / "vmsnap.db").unlink()
    for path in world.folders.state_dir.glob("vmsnap.db-*"):
        path.unlink()
    with world.controller() as made:
        made.add_vm("vm001", "simulated", {"socket": str(world.socket)}, TWO_MECHANISMS)
        strays = [stray.name for stray in made.strays() if stray.kind == "overlay"]
        assert strays == [str(path) for path in overlays(world)]
        gone = made.remove_strays([stray.name for stray in made.strays()])
        assert set(strays) <= {stray.name for stray in gone}
    assert overlays(world) == []
    assert world.counts_on() and not ask(world.socket, "check")["fault"]


def test_a_disk_that_somebody_thaws_meanwhile_costs_the_backup(world: World) -> None:
    def act(_name: str, take: Take) -> tuple[DiskSnapshot, ...]:
        taken = take()
        files = [{"device": f"disk{number}", "path": str(path)} for number, path in enumerate(overlays(world))]
        ask(world.socket, "thaw", overlays=files)
        return taken

    with watched(world, act) as made, pytest.raises(VmsnapError, match=r"thawed by somebody else|was written while"):
        made.backup("vm001", world.repository(), freeze="overlay")
    world.see_that_all_is_well(backups=0)


def test_a_consistent_backup_of_frozen_disks_is_clean(world: World) -> None:
    with world.controller() as made:
        result = made.backup("vm001", world.repository(), mode="consistent", freeze="overlay")
    manifest = world.repository().manifest(result.backup)
    assert (manifest.mode, manifest.freeze) == ("consistent", "overlay")
    image = world.folder / "clean.img"
    with world.repository().reader(manifest.disks[0].image, "disk0") as reader:
        reader.restore_to_file(image)
    content = read_disk(image)
    assert content is not None and content.clean
    image.unlink()
    world.see_that_all_is_well(backups=1)
