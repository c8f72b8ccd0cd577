"""Backups of mode consistent, and consolidation, on real simulated VMs: what they hold, what they never touch, and what
a guest that does not shut down leads to.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.world import World
from vmsnap.controller import Controller, Drivers, Progress
from vmsnap.errors import AlreadyExists, CannotCapture, HypervisorError, Interrupted, UsageError, VmsnapError
from vmsnap.model import ClonePlan, Disk, DiskSnapshot, Nic
from vmsnap.repository import Manifest
from vmsnap.roles import DriverContext, Hypervisor, SnapshotMechanism
from vmsnap_drivers.hypervisors.simulated import SimulatedHypervisor, lifecycle
from vmsnap_drivers.hypervisors.simulated.control import ask
from vmsnap_drivers.hypervisors.simulated.layout import DiskContent, read_disk
from vmsnap_drivers.snapshots.file import FileMechanism


@pytest.fixture
def deaf_world() -> Iterator[World]:
    made = World(deaf=True)
    yield made
    made.close()


def disks_of(world: World, manifest: Manifest) -> list[DiskContent]:
    """What each disk of a backup says by itself."""
    found = []
    for disk in manifest.disks:
        path = world.folder / f"read-{disk.device}"
        path.unlink(missing_ok=True)
        with world.repository().reader(disk.image, disk.device) as reader:
            reader.restore_to_file(path)
        content = read_disk(path)
        assert content is not None
        found.append(content)
    return found


def duplicate_seen_at(world: World, phase: str) -> tuple[list[dict[str, Any]], Any]:
    """A list that is filled with the duplicate's own words when the backup's progress comes to `phase`, and the
    callback that does it."""
    seen: list[dict[str, Any]] = []

    def look(progress: Progress) -> None:
        if progress.phase == phase:
            running = [vm for vm in lifecycle.list_vms(world.folders.state_dir) if vm.vm != "vm001"]
            with world.controller() as controller:
                rows = {row.vm: row for row in controller.vms()}
            seen.extend({**ask(vm.socket, "status"), "row": rows[vm.vm]} for vm in running)

    return seen, look


def test_what_the_guest_had_in_memory_only_is_on_the_disks_of_a_consistent_backup_alone(world: World) -> None:
    with world.controller() as controller:
        live = controller.backup("vm001", world.repository())
        consistent = controller.backup("vm001", world.repository(), mode="consistent", tags=["clean"])
    manifests = {manifest.backup: manifest for manifest in world.repository().list()}
    for content in disks_of(world, manifests[live.backup]):
        assert not content.clean and content.log == ()
    first, second = disks_of(world, manifests[consistent.backup])
    assert first.clean and second.clean
    assert first.log[-1] == first.counter == max(first.latest, second.latest) > 0
    manifest = manifests[consistent.backup]
    assert (consistent.mode, manifest.mode, manifest.tags) == ("consistent", "consistent", ("clean",))
    assert manifest.memory == () and manifest.device_state is None and consistent.memory_bytes == 0
    assert manifest.pause_seconds == consistent.pause_seconds > 0 and manifest.remarks == ()
    assert manifest.moments[-1].name == "duplicate ended"
    world.see_that_all_is_well(backups=2)


def test_the_duplicate_runs_apart_and_stands_in_the_table_beside_its_vm(world: World) -> None:
    seen, look = duplicate_seen_at(world, "the duplicate shuts down")
    with world.controller() as controller:
        controller.backup("vm001", world.repository(), mode="consistent", progress=look)
    (duplicate,) = seen
    assert duplicate["nic"]["connected"] is False and duplicate["nic"]["mac"] == world.status()["nic"]["mac"]
    own = {disk["path"] for disk in duplicate["disks"]}
    assert own.isdisjoint({disk["path"] for disk in world.status()["disks"]})
    row = duplicate["row"]
    assert (row.kind, row.duplicate_of, row.state) == ("duplicate", "vm001", "executing")
    assert {disk.address for disk in row.disks} == own
    world.see_that_all_is_well(backups=1)


def test_a_guest_that_ignores_its_power_button_costs_the_backup_and_nothing_else(deaf_world: World) -> None:
    with deaf_world.controller() as controller, pytest.raises(HypervisorError, match="did not shut down in order") as e:
        controller.backup("vm001", deaf_world.repository(), mode="consistent", timeout_seconds=0.2)
    assert "--timeout" in e.value.cure and "\n" not in str(e.value)
    deaf_world.see_that_all_is_well(backups=0)


def test_the_live_backup_is_kept_instead_where_that_was_asked_for(deaf_world: World) -> None:
    with deaf_world.controller() as controller:
        result = controller.backup(
            "vm001", deaf_world.repository(), mode="consistent", timeout_seconds=0.2, on_timeout="keep-live"
        )
    assert result.mode == "live" and result.memory_bytes == 1 << 20
    manifest = deaf_world.repository().manifest(result.backup)
    (remark,) = manifest.remarks
    assert remark.startswith("not consistent but live") and remark in result.warnings
    deaf_world.see_that_all_is_well(backups=1)
    with deaf_world.controller() as controller:
        restored = controller.restore(deaf_world.repository(), result.backup, "vm002", run=True, isolated=True)
        assert ask(Path(restored.options["socket"]), "check") == {"fault": ""}


class OneDriver(Drivers):
    """Drivers of which one is another class than usual."""

    def __init__(
        self,
        context: DriverContext,
        mechanism: type[FileMechanism] = FileMechanism,
        hypervisor: type[SimulatedHypervisor] = SimulatedHypervisor,
    ) -> None:
        super().__init__(context)
        self._mechanism, self._hypervisor = mechanism, hypervisor

    def mechanism(self, name: str) -> SnapshotMechanism:
        return self._mechanism(self.context, {"way": "auto"})

    def hypervisor(self, name: str, vm: str, options: Mapping[str, str]) -> Hypervisor:
        return self._hypervisor(vm, self.context, {"timeout": "5", **options})


def back_up_with(world: World, **drivers: Any) -> None:
    with Controller(
        world.folders, drivers=OneDriver(world.folders.context(), **drivers), start_guardian=world.start_guardian
    ) as controller:
        controller.backup("vm001", world.repository(), mode="consistent")


class CannotClone(FileMechanism):
    clones = False


class ClonesNothing(FileMechanism):
    """Says that it made a clone, and gives the original."""

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        return replace(snapshot.disk)


class SwitchesBack(SimulatedHypervisor):
    """Connects the duplicate to the disks that it was captured with, and says so."""

    def switch_disks(self, disks: Any) -> tuple[Disk, ...]:
        with_lock = super().switch_disks(disks)
        original = SimulatedHypervisor("vm001", self.context, {}).describe().disks
        return tuple(replace(disk, address=of.address) for disk, of in zip(with_lock, original, strict=True))


class LeavesItConnected(SimulatedHypervisor):
    resumed = 0

    def cut_network(self) -> tuple[Nic, ...]:
        return (replace(super().cut_network()[0], connected=True),)

    def resume(self) -> Any:
        type(self).resumed += self.vm != "vm001"
        return super().resume()


def test_a_mechanism_without_clones_is_refused_before_anything_is_paused(world: World) -> None:
    epoch = world.status()["epoch"]
    with pytest.raises(CannotCapture, match="'file' of disk disk0 makes no writable disks"):
        back_up_with(world, mechanism=CannotClone)
    assert world.status()["epoch"] == epoch
    world.see_that_all_is_well(backups=0)


@pytest.mark.parametrize("drivers", [{"mechanism": ClonesNothing}, {"hypervisor": SwitchesBack}])
def test_a_duplicate_with_a_disk_of_its_vm_is_never_started(world: World, drivers: dict[str, Any]) -> None:
    with pytest.raises(HypervisorError, match="is disk disk0 of 'vm001' too"):
        back_up_with(world, **drivers)
    world.see_that_all_is_well(backups=0)


def test_a_duplicate_whose_network_is_not_cut_is_never_started(world: World) -> None:
    with pytest.raises(HypervisorError, match="still connected"):
        back_up_with(world, hypervisor=LeavesItConnected)
    assert LeavesItConnected.resumed == 0
    world.see_that_all_is_well(backups=0)


def test_a_consistent_backup_is_exported_and_not_restored(world: World) -> None:
    with world.controller() as controller:
        backup = controller.backup("vm001", world.repository(), mode="consistent").backup
        for refused in (
            lambda: controller.restore(world.repository(), backup, "vm002", run=True),
            lambda: controller.consolidate(world.repository(), backup, world.folder / "clean"),
            lambda: controller.verify_boot(world.repository(), backup),
        ):
            with pytest.raises(UsageError, match="holds disks alone") as e:
                refused()
            assert "vmsnap export" in e.value.cure
    assert not (world.folder / "clean").exists()
    world.see_that_all_is_well(backups=1)


def test_a_stopped_vm_is_backed_up_consistently_and_stays_stopped(world: World) -> None:
    ask(world.socket, "pause")
    with world.controller() as controller:
        result = controller.backup("vm001", world.repository(), mode="consistent")
    assert all(content.clean for content in disks_of(world, world.repository().manifest(result.backup)))
    assert world.status()["state"] == "stopped"


# -- consolidating


def test_a_live_backup_is_consolidated_into_clean_disks_and_a_backup_of_them(world: World) -> None:
    target = world.folder / "clean"
    with world.controller() as controller:
        live = controller.backup("vm001", world.repository(), tags=["nightly", "schedule:nightly"])
        result = controller.consolidate(world.repository(), live.backup, target, store=True)
    contents = [read_disk(Path(disk.address)) for disk in result.disks]
    assert [disk.device for disk in result.disks] == ["disk0", "disk1"] and result.clean
    assert all(content is not None and content.clean for content in contents)
    manifest = world.repository().manifest(result.backup)
    assert disks_of(world, manifest) == contents
    assert (manifest.mode, manifest.vm) == ("consistent", "vm001")
    assert manifest.tags == ("nightly",), "it is none of the schedule's backups, which prunes those that bear its tag"
    assert manifest.remarks == (f"consolidated from {live.backup}",)
    assert {path.name for path in target.iterdir()} == {"disk0.raw", "disk1.raw"}
    world.see_that_all_is_well(backups=2)


def test_consolidated_disks_are_not_stored_unless_that_is_asked_for_and_nothing_is_overwritten(world: World) -> None:
    target = world.folder / "clean"
    with world.controller() as controller:
        live = controller.backup("vm001", world.repository())
        assert controller.consolidate(world.repository(), live.backup, target).backup == ""
        before = (target / "disk0.raw").read_bytes()
        with pytest.raises(AlreadyExists, match="not overwritten"):
            controller.consolidate(world.repository(), live.backup, target)
    assert (target / "disk0.raw").read_bytes() == before
    world.see_that_all_is_well(backups=1)


def test_a_guest_that_does_not_shut_down_leaves_no_consolidated_disks(deaf_world: World) -> None:
    with deaf_world.controller() as controller:
        live = controller.backup("vm001", deaf_world.repository())
        with pytest.raises(VmsnapError, match="did not shut down in order"):
            controller.consolidate(
                deaf_world.repository(), live.backup, deaf_world.folder / "clean", store=True, timeout_seconds=0.2
            )
    assert not (deaf_world.folder / "clean").exists()
    deaf_world.see_that_all_is_well(backups=1)


# -- verifying by booting


def test_a_backup_is_booted_apart_seen_to_live_and_removed(world: World) -> None:
    with world.controller() as controller:
        live = controller.backup("vm001", world.repository())
        result = controller.verify_boot(world.repository(), live.backup)
    assert "counted on" in result.life and result.backup == live.backup
    assert not list((world.folders.state_dir / "duplicates").iterdir())
    world.see_that_all_is_well(backups=1)


def test_a_backup_whose_disks_are_of_another_instant_does_not_pass(world: World) -> None:
    """What no checksum shows: memory and disks that do not belong together."""
    with world.controller() as controller:
        first = controller.backup("vm001", world.repository())
        counter = world.status()["counter"]
        while world.status()["counter"] < counter + 5:
            pass
        second = controller.backup("vm001", world.repository())
    repository = world.repository()
    old, new = repository.manifest(first.backup), repository.manifest(second.backup)
    with repository.writer(purpose="a test") as writer:
        fields = {name: getattr(old, name) for name in type(old).__mro__[1].__dataclass_fields__}
        mixed = writer.commit(type(old).__mro__[1](**{**fields, "disks": new.disks}))
    assert not repository.verify(mixed.backup).findings
    with world.controller() as controller, pytest.raises(HypervisorError):
        controller.verify_boot(world.repository(), mixed.backup, life_seconds=2)
    world.see_that_all_is_well(backups=3)


# -- interrupted


@pytest.mark.parametrize("phase", ["copying memory", "the duplicate runs", "the duplicate shuts down", "storing"])
def test_ctrl_c_at_any_stage_leaves_nothing(world: World, phase: str) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.phase == phase:
            signal.raise_signal(signal.SIGINT)

    with world.controller() as controller, pytest.raises(Interrupted):
        controller.backup("vm001", world.repository(), mode="consistent", progress=interrupt)
    world.see_that_all_is_well(backups=0)
