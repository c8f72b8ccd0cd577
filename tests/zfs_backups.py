"""Whole backups of a VM whose disks lie on a real ZFS, the same for zfs-fuse and OpenZFS: live, consistent, killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.test_duplicate_failures import run_and_be_killed
from tests.world import World
from tests.zfs_rig import Run, names
from vmsnap.controller import Controller
from vmsnap.repository import Repository
from vmsnap.testing.faults import Effect, Fault


class ZfsWorld(World):
    """A simulated VM whose disks lie in a pool. Bookmarks, which tell changes, stay after a backup."""

    def __init__(self, run: Run, pool: str, images: Sequence[Path]) -> None:
        self._run, self._pool = run, pool
        super().__init__(images=images, mechanism_options={"zfs": {"pause_seconds": "60"}})

    def files(self) -> set[str]:
        return super().files() | {name for name in names(self._run, self._pool) if "#" not in name}


def back_up(controller: Controller, repository: Repository) -> str:
    """A live backup."""
    return controller.backup("vm001", repository, max_pause_seconds=100.0).backup


class BackupScenarios:
    """What is tried on each ZFS."""

    @pytest.fixture
    def world(self) -> ZfsWorld:
        """To be overridden."""
        raise TypeError(f"{type(self).__name__} has no fixture 'world'")

    def test_a_live_backup_comes_to_life_again_and_nothing_is_left(self, world: ZfsWorld) -> None:
        with world.controller() as controller:
            before = len(world.repository().list())
            backup = back_up(controller, world.repository())
            assert [disk.mechanism for disk in controller.table.get("vm001").disks] == ["zfs", "zfs"]
            controller.verify_boot(world.repository(), backup)
        world.see_that_all_is_well(before + 1)

    def test_a_consistent_backup_runs_its_duplicate_on_clones(self, world: ZfsWorld) -> None:
        with world.controller() as controller:
            before = len(world.repository().list())
            result = controller.backup("vm001", world.repository(), mode="consistent", max_pause_seconds=100.0)
            assert result.mode == "consistent"
        world.see_that_all_is_well(before + 1)

    @pytest.mark.parametrize(
        ("mode", "fault"),
        [
            ("live", Fault("snapshot", 1, Effect.KILL_AFTER)),
            ("live", Fault("settle", 1, Effect.KILL_AFTER)),
            ("live", Fault("delete_snapshots", 1, Effect.KILL)),
            ("consistent", Fault("clone", 2, Effect.KILL_AFTER)),
        ],
        ids=lambda value: value if isinstance(value, str) else value.method,
    )
    def test_what_a_killed_backup_leaves_is_removed_by_recovery(self, world: ZfsWorld, mode: str, fault: Fault) -> None:
        def work(controller: Controller, repository: Repository) -> None:
            controller.backup("vm001", repository, mode=mode, max_pause_seconds=100.0)

        run_and_be_killed(world, work, fault)
        assert [name for name in world.files() if "vmsnap-" in name and not name.startswith("/")]
        with world.controller() as controller:
            assert controller.strays() == [], "the journal knows all of it"
            assert controller.recover().kept == ()
        world.see_that_all_is_well()
