"""What goes wrong from outside, on simulated VMs: one clear line, the right class, a running VM, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.mounts import read_only
from tests.test_cli import BIN
from tests.world import MIB, World
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import (
    AlreadyExists,
    Busy,
    DriverUnavailable,
    StorageFull,
    UnknownBackup,
    UnknownVm,
    UsageError,
    VmGone,
    VmsnapError,
)
from vmsnap.host import HostFolders
from vmsnap.locks import vm_lock
from vmsnap.places import create_repository, open_repository
from vmsnap_drivers.hypervisors.simulated import lifecycle
from vmsnap_drivers.hypervisors.simulated.control import ask


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def one_line(error: pytest.ExceptionInfo[VmsnapError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_state_folder_that_cannot_be_written_to_is_named_with_the_cure(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a read-only mount needs root")
    (state := tmp_path / "state").mkdir(mode=0o700)
    with read_only(state), pytest.raises(UsageError) as error:
        HostFolders.find(state)
    one_line(error, f"the folder {state} cannot be written to: Read-only file system", "--state-dir")
    # Root without its capabilities heeds the mode, as any user does.
    state.chmod(0o500)
    answer = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", str(BIN / "vmsnap"), "vm", "list"],
        env=os.environ | {"VMSNAP_STATE_DIR": str(state)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert f"the folder {state} cannot be written to: Permission denied (choose another one" in answer.stderr


def test_an_unknown_vm_is_named(world: World) -> None:
    with world.controller() as controller, pytest.raises(UnknownVm) as error:
        controller.backup("vm999", world.repository())
    one_line(error, "'vm999'", "vmsnap vm list")
    world.see_that_all_is_well(backups=0)


def test_an_unknown_driver_is_named_with_those_there_are(world: World) -> None:
    with world.controller() as controller, pytest.raises(DriverUnavailable) as error:
        controller.add_vm("vm002", "vmware")
    one_line(error, "'vmware'", "simulated")


def test_an_unknown_option_is_named_with_those_there_are(world: World) -> None:
    with world.controller() as controller, pytest.raises(UsageError) as error:
        controller.add_vm("vm002", "simulated", {"sokcet": "/x"})
    one_line(error, "'sokcet'", "socket")


def test_a_vm_that_does_not_exist_is_not_registered(world: World) -> None:
    with world.controller() as controller, pytest.raises(UnknownVm) as error:
        controller.add_vm("vm002", "simulated")
    one_line(error, "vm002")


@pytest.mark.parametrize("name", ["../vm", "", "a/b", "-rf", "a b", "x" * 65])
def test_a_name_that_could_leave_its_folder_or_pass_for_an_option_is_refused(world: World, name: str) -> None:
    with world.controller() as controller, pytest.raises(UsageError):
        controller.add_vm(name, "simulated")


def test_an_unknown_backup_is_named(world: World) -> None:
    with world.controller() as controller, pytest.raises(UnknownBackup) as error:
        controller.restore(world.repository(), "vm001-20200101T000000Z-abcdef", "vm002")
    one_line(error, "vm001-20200101T000000Z-abcdef")
    world.see_that_all_is_well()


def test_a_restore_onto_a_name_or_a_disk_that_exists_touches_nothing(world: World, tmp_path: Path) -> None:
    with world.controller() as controller:
        backup = controller.backup("vm001", world.repository()).backup
        with pytest.raises(AlreadyExists) as error:
            controller.restore(world.repository(), backup, "vm001", run=True)
        one_line(error, "'vm001'")
        (tmp_path / "disk1.raw").write_text("mine")
        with pytest.raises(AlreadyExists) as error:
            controller.restore(world.repository(), backup, "vm002", run=True, target=tmp_path)
        one_line(error, "disk1.raw", "not overwritten")
        assert (tmp_path / "disk1.raw").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["disk1.raw"]
    world.see_that_all_is_well(backups=1)


def test_a_second_backup_of_a_vm_is_refused_with_who_and_since_when(world: World) -> None:
    with (
        vm_lock(world.folders.state_dir, "vm001", "backup"),
        world.controller() as controller,
        pytest.raises(Busy) as error,
    ):
        controller.backup("vm001", world.repository())
    one_line(error, "backup by process", str(os.getpid()), "since 20")
    world.see_that_all_is_well(backups=0)


def test_two_backups_at_once_give_one_backup_and_one_clear_refusal(world: World) -> None:
    code = (
        "import sys; from pathlib import Path; from vmsnap.controller import Controller;"
        "from vmsnap.host import HostFolders; from vmsnap.places import open_repository;"
        "from vmsnap.errors import VmsnapError\n"
        "try: Controller(HostFolders.find(Path(sys.argv[1]))).backup('vm001', open_repository(sys.argv[2]))\n"
        "except VmsnapError as error: print(error); sys.exit(error.exit_code)"
    )
    ask(world.socket, "inject", call="pause", effect="slow", seconds=3.0, times=1)
    command = [sys.executable, "-c", code, str(world.folders.state_dir), world.url]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [worker.communicate()[0] for worker in workers]
    assert sorted(worker.returncode for worker in workers) == [0, 5], told
    assert "is busy: backup by process" in "".join(told)
    world.see_that_all_is_well(backups=1)


@pytest.mark.parametrize("call", ["pause", "duplicate", "resume", "copy"])
@pytest.mark.parametrize("effect", ["die", "die-after"])
def test_a_vm_that_dies_in_a_backup_gives_one_clear_line_and_leaves_nothing(
    world: World, call: str, effect: str
) -> None:
    ask(world.socket, "inject", call=call, effect=effect, times=1)
    with world.controller() as controller:
        try:
            controller.backup("vm001", world.repository())
        except VmsnapError as error:
            assert "\n" not in str(error)
            assert "vm001" in str(error) or "duplicate" in str(error)
        else:
            # The copy is a process of its own: where the VM dies after it was made, the backup is whole.
            assert effect == "die-after"
        assert controller.recover().kept == ()
        assert controller.journal.unfinished() == []
    assert list(world.folders.memory_dir.rglob("*")) == []
    assert {path.name for path in world.disk_folder.iterdir()} == {"vm001-disk0.img", "vm001-disk1.img"}
    lifecycle.clean_up(world.socket)


@pytest.mark.parametrize("call", ["pause", "duplicate", "resume"])
def test_a_hypervisor_that_hangs_is_given_up_within_the_time_limit_and_the_vm_runs(world: World, call: str) -> None:
    ask(world.socket, "inject", call=call, effect="hang", times=1)
    with world.controller() as controller:
        with pytest.raises(VmsnapError) as error:
            controller.backup("vm001", world.repository(), max_pause_seconds=0.5)
        one_line(error, "vm001")
        controller.recover()
    world.see_that_all_is_well(backups=0)


def test_a_full_disk_under_the_repository_loses_nothing(world: World, small_disk: Path) -> None:
    url = str(small_disk / "repository")
    create_repository(url)
    with world.controller() as controller:
        kept = controller.backup("vm001", open_repository(url)).backup
        (small_disk / "filler").write_bytes(os.urandom(2 * MIB - shutil.disk_usage(small_disk).used - 16384))
        with pytest.raises(StorageFull) as error:
            for _ in range(50):
                controller.backup("vm001", open_repository(url))
        one_line(error, str(small_disk))
    (small_disk / "filler").unlink()
    repository = open_repository(url)
    assert kept in [manifest.backup for manifest in repository.list()]
    assert not repository.check(read_data=True).findings
    world.see_that_all_is_well(backups=0)


def test_memory_that_does_not_fit_is_refused_before_the_pause(world: World) -> None:
    narrow = HostFolders(world.folders.state_dir, world.folders.memory_dir, memory_budget_bytes=MIB // 2)
    paused_before = world.status().get("pauses")
    with (
        Controller(narrow, drivers=Drivers(narrow.context()), start_guardian=world.start_guardian) as controller,
        pytest.raises(StorageFull) as error,
    ):
        controller.backup("vm001", world.repository())
    one_line(error, "vm001")
    assert world.status().get("pauses") == paused_before
    world.see_that_all_is_well(backups=0)


def test_a_dead_vm_is_told_from_a_busy_or_an_unknown_one(world: World) -> None:
    lifecycle.stop(world.socket, force=True)
    with world.controller() as controller, pytest.raises((VmGone, UnknownVm)) as error:
        controller.backup("vm001", world.repository())
    one_line(error, "vm001")
    assert len(world.repository().list()) == 0
