"""A restore never takes away what it did not make: VMs, disks and files of others, or of a later restore."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.world import World
from vmsnap.controller import RestoreResult
from vmsnap.errors import AlreadyExists, Busy
from vmsnap.model import to_json
from vmsnap.protocol import RESTORE
from vmsnap_drivers.hypervisors.simulated.control import ask


def back_up(world: World) -> str:
    with world.controller() as controller:
        return controller.backup("vm001", world.repository()).backup


def restore(world: World, backup: str, name: str, target: Path | None = None) -> RestoreResult:
    with world.controller() as controller:
        return controller.restore(world.repository(), backup, name, run=True, target=target)


def executes(result: RestoreResult) -> bool:
    return bool(ask(Path(result.options["socket"]), "status")["state"] == "executing")


def leave_a_dead_restore(world: World, name: str, disks: list[Path]) -> None:
    """What the journal holds after a restore of `name` was killed once it had loaded the VM."""
    code = (
        "import sys; from pathlib import Path; from vmsnap.database import Database\n"
        "from vmsnap.journal import Journal\n"
        "operation = Journal(Database(Path(sys.argv[1]))).begin(sys.argv[2], sys.argv[3], 'simulated', {})\n"
        "for data in sys.argv[4:]: operation.will_make('file', '', data)\n"
        "from vmsnap.controller.running import LoadedRecord; from vmsnap.model import to_json\n"
        "operation.will_make('loaded', 'simulated', to_json(LoadedRecord(sys.argv[3])))\n"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(world.folders.state_dir / "vmsnap.db"),
            RESTORE.name,
            name,
            *[to_json(str(disk)) for disk in disks],
        ],
        check=True,
    )


def test_what_a_killed_restore_left_does_not_destroy_a_later_one(world: World, tmp_path: Path) -> None:
    backup = back_up(world)
    leave_a_dead_restore(world, "vm002", [tmp_path / "disk0.raw", tmp_path / "disk1.raw"])
    restored = restore(world, backup, "vm002", tmp_path)
    with world.controller() as controller:
        assert controller.backup("vm002", world.repository()).warnings == ()
        assert controller.recover().removed == ()
    assert executes(restored)
    assert (tmp_path / "disk0.raw").exists()


def test_recovery_keeps_a_file_that_has_become_a_disk_of_a_vm(world: World, tmp_path: Path) -> None:
    backup = back_up(world)
    restored = restore(world, backup, "vm002", tmp_path)
    leave_a_dead_restore(world, "vm003", [tmp_path / "disk0.raw"])
    with world.controller() as controller:
        (kept,) = controller.recover().kept
    assert "is a disk of VM 'vm002' now" in kept
    assert (tmp_path / "disk0.raw").exists()
    assert executes(restored)


def test_a_vm_cannot_be_registered_over_what_a_killed_restore_left(world: World) -> None:
    leave_a_dead_restore(world, "vm002", [])
    with world.controller() as controller, pytest.raises(Busy, match="vmsnap recover vm002"):
        controller.add_vm("vm002", "simulated")


def test_a_vm_that_is_no_longer_registered_is_not_destroyed_by_a_restore_of_its_name(
    world: World, tmp_path: Path
) -> None:
    backup = back_up(world)
    restored = restore(world, backup, "vm002")
    with world.controller() as controller:
        controller.remove_vm("vm002")
    with pytest.raises(AlreadyExists, match="though it is not registered"):
        restore(world, backup, "vm002", tmp_path)
    assert executes(restored)
    assert list(tmp_path.iterdir()) == []


def test_a_link_where_a_disk_is_to_be_is_left_alone(world: World, tmp_path: Path) -> None:
    backup = back_up(world)
    (tmp_path / "disk0.raw").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AlreadyExists):
        restore(world, backup, "vm002", tmp_path)
    assert (tmp_path / "disk0.raw").is_symlink()


def test_a_backup_after_a_pack_was_lost_is_whole(world: World) -> None:
    back_up(world)
    packs = sorted(path for path in (Path(world.url) / "packs").rglob("*") if path.is_file())
    max(packs, key=lambda path: path.stat().st_size).unlink()
    assert world.repository().check().damaged
    after = back_up(world)
    assert not world.repository().verify(after).findings
