"""VMs whose disks Linux' own initiator (open-iscsi) has brought: LIO serves them, with CHAP, and the disks of their
duplicates are brought by it too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.test_lio import AUTHORITY, server
from tests.lab.counter import CounterMachine, boot_sector, count_in, see_it_count, was_shut_down
from tests.lab.lio import QEMU, LioServer
from tests.lab.open_iscsi import NAME, KernelInitiator
from tests.secrets_in_sight import files_with, unseen
from tests.test_duplicate_failures import run_and_be_killed
from tests.test_file_mechanism import xfs
from tests.world import World, unguarded
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import SnapshotError
from vmsnap.host import HostFolders
from vmsnap.model import Disk, Window
from vmsnap.places import create_repository
from vmsnap.repository import Repository
from vmsnap.roles import DriverContext
from vmsnap.testing.faults import Effect, Fault
from vmsnap.testing.rigs import eventually, read_all
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism, lio_program
from vmsnap_drivers.snapshots.iscsi.kernel import lun_at

__all__ = ["server", "xfs"]
pytestmark = [pytest.mark.storage, pytest.mark.timeout(600)]
USER, WORD = "keeper", "a-word-of-chap-12"
SHOWN = ("storage", "its-own-word-34")
"""By which the targets show who they are."""
MIB = 1 << 20
SESSIONS, RECORDS = Path("/sys/class/iscsi_session"), Path("/etc/iscsi/nodes")


@pytest.fixture(scope="module")
def initiator() -> Iterator[KernelInitiator]:
    with KernelInitiator() as made:
        yield made


class Brought:
    """One disk of 4 MiB, a LUN that the initiator has brought; `image` is what lies behind it."""

    def __init__(self, folder: Path, server: LioServer, initiator: KernelInitiator) -> None:
        self.folder, self.server = folder, server
        self.target, self.image = f"{AUTHORITY}:001", folder / "disk.img"
        with self.image.open("wb") as file:
            file.truncate(4 * MIB)
        server.add(self.target, self.image, user=USER, password=WORD, shown=SHOWN, initiators=(QEMU, NAME))
        self.device = initiator.log_in(self.target, server.portal, USER, WORD, SHOWN)
        self.secret = folder / "secret"
        self.secret.write_text(WORD)
        account = {"chap_user": USER, "chap_password_file": str(self.secret)}
        self.options = {**server.options, **account, "pause_seconds": "60"}

    def traces(self) -> list[str]:
        """What is there of it: files, targets, backing stores, sessions, and of whom open-iscsi has a record."""
        sessions = [path.read_text().strip() for path in SESSIONS.glob("*/targetname")]
        files = [str(path) for path in self.folder.iterdir()]
        records = [str(path) for path in RECORDS.iterdir()]
        return sorted([*self.server.targets(), *self.server.stores(), *sessions, *files, *records])

    def see_that_nothing_is_left(self) -> None:
        image = str(self.image)
        assert self.traces() == sorted([self.target] * 2 + [image] * 2 + [str(RECORDS / self.target), str(self.secret)])


@pytest.fixture
def brought(server: LioServer, initiator: KernelInitiator, xfs: Path) -> Iterator[Brought]:
    folder = xfs / "disks"
    folder.mkdir()
    made = Brought(folder, server, initiator)
    yield made
    made.see_that_nothing_is_left()
    initiator.log_out(made.target, server.portal)
    server.remove(made.target)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_the_clone_of_a_disk_that_was_brought_is_brought_by_the_same_account(brought: Brought, tmp_path: Path) -> None:
    mechanism = IscsiMechanism(DriverContext(tmp_path / "state", tmp_path), brought.options)
    disk = mechanism.disk_at("disk0", str(brought.device))
    assert (disk.address, disk.size_bytes) == (str(brought.device), 4 * MIB) and mechanism.handles(disk)
    assert not mechanism.handles(Disk("disk0", "/dev/null", 0))
    assert {finding.severity for finding in mechanism.doctor()} == {"ok"}
    plan = mechanism.plan("vm001", [disk], "vmsnap-x", Window.FREE)
    assert plan.data["luns"][0]["address"] == brought.server.address(brought.target)
    mechanism.prepare(plan)
    write(disk.address, 0, wanted := os.urandom(disk.size_bytes))
    sync(disk.address)
    (snapshot,) = mechanism.snapshot(plan)
    write(disk.address, 0, os.urandom(MIB))
    sync(disk.address)
    mechanism.settle([snapshot])
    planned = mechanism.plan_clone(snapshot, "bk001", tmp_path, lasting=True)
    with unseen(WORD), unseen(SHOWN[1]):
        for _ in range(2):  # a clone that was made is made
            clone = mechanism.clone(planned, snapshot)
            assert str(lun_at(clone.address)) == brought.server.address(f"{AUTHORITY}:bk001")
    records = [path for path in (RECORDS / f"{AUTHORITY}:bk001").rglob("*") if path.is_file()]
    assert records and all(path.stat().st_mode & 0o077 == 0 for path in records)
    assert all(word in path.read_text() for path in records for word in (WORD, SHOWN[1]))
    assert files_with(WORD, tmp_path / "state") == []
    with mechanism.reader(snapshot) as reader, mechanism.clone_reader(planned, clone) as other:
        assert read_all(reader) == read_all(other) == wanted
    assert Path(clone.address).read_bytes() == wanted and mechanism.handles(clone)
    write(clone.address, 0, bytes(MIB))
    sync(clone.address)
    with mechanism.reader(snapshot) as reader:
        assert read_all(reader) == wanted
    with Path(clone.address).open("rb"), pytest.raises(SnapshotError, match=r"bk001/1 is in use by \S+ \(process \d+"):
        mechanism.delete_clone(planned)
    mechanism.delete_clone(planned)
    mechanism.delete_clone(planned)
    mechanism.delete(plan)
    assert not Path(clone.address).exists()
    mechanism.close()


def test_what_was_written_and_not_flushed_is_in_the_snapshot(brought: Brought, tmp_path: Path) -> None:
    mechanism = IscsiMechanism(DriverContext(tmp_path / "state", tmp_path), brought.options)
    disk = mechanism.disk_at("disk0", str(brought.device))
    plan = mechanism.plan("vm001", [disk], "vmsnap-x", Window.FREE)
    mechanism.prepare(plan)
    descriptor = os.open(disk.address, os.O_WRONLY)  # whoever closes it last flushes it
    try:
        assert os.pwrite(descriptor, wanted := os.urandom(disk.size_bytes), 0) == len(wanted)
        (snapshot,) = mechanism.snapshot(plan)
        mechanism.settle([snapshot])
        with mechanism.reader(snapshot) as reader:
            assert read_all(reader) == wanted
    finally:
        os.close(descriptor)
    mechanism.delete(plan)
    mechanism.close()


class Stage:
    """A guest in QEMU on such a disk, registered as ``vm001``, and a repository."""

    def __init__(self, machine: CounterMachine, controller: Controller, url: str) -> None:
        self.machine, self.controller = machine, controller
        self.repository = create_repository(url)

    def disk_of(self, backup: str) -> bytes:
        (disk,) = self.repository.manifest(backup).disks
        with self.repository.reader(disk.image, disk.device) as reader:
            return read_all(reader)


@pytest.fixture
def stage(brought: Brought, tmp_path: Path) -> Iterator[Stage]:
    write(str(brought.device), 0, boot_sector(tmp_path))
    with CounterMachine(tmp_path / "vm001", brought.device) as machine:
        folders = HostFolders.find(tmp_path / "state")
        drivers = Drivers(folders.context(), {"iscsi": brought.options})
        with Controller(folders, drivers=drivers, start_guardian=unguarded) as controller:
            controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
            yield Stage(machine, controller, str(tmp_path / "repository"))


@pytest.mark.timeout(900)
def test_a_vm_in_qemu_is_backed_up_consistent_and_its_duplicate_takes_over(stage: Stage, brought: Brought) -> None:
    controller, machine = stage.controller, stage.machine
    (disk,) = controller.table.get("vm001").disks
    assert (disk.address, disk.mechanism) == (str(brought.device), "iscsi")
    before = count_in(brought.image.read_bytes())
    patient = {"max_pause_seconds": 100.0, "timeout_seconds": 200.0}
    consistent = controller.backup("vm001", stage.repository, mode="consistent", **patient)
    machine.counts_on()
    brought.see_that_nothing_is_left()
    content = stage.disk_of(consistent.backup)
    assert was_shut_down(content) and count_in(content) > before and not was_shut_down(brought.image.read_bytes())

    held = controller.backup("vm001", stage.repository, keep_duplicate=True, **patient)
    addresses = {row.vm: row.disks[0].address for row in controller.table.rows()}
    assert addresses["vm001"] == str(brought.device)
    assert str(lun_at(addresses[held.duplicate])) == brought.server.address(f"{AUTHORITY}:{held.duplicate}")
    machine.counts_on()
    machine.kill()
    first = count_in(stage.disk_of(held.backup))
    assert controller.failover("vm001").disks[0].address == addresses[held.duplicate]
    # Its RAM is that of the capture, its disk the clone: at each count it looks whether they agree.
    (log,) = controller.folders.state_dir.rglob("serial")
    see_it_count(log)
    (clone,) = brought.folder.glob("vmsnap-*~clone.iscsi")
    assert count_in(clone.read_bytes()) > first

    mechanism = controller.drivers.mechanism("iscsi")
    (owned,) = mechanism.list_owned()
    with pytest.raises(SnapshotError, match=r"is in use by qemu-system-x86 \(process \d+"):
        mechanism.remove_owned(owned)
    row = controller.table.get("vm001")
    driver = controller.drivers.hypervisor("qemu", "vm001", row.options)
    driver.destroy()
    driver.close()
    controller.remove_vm("vm001")
    mechanism.remove_owned(owned)


class BroughtWorld(World):
    """A simulated VM with such a disk."""

    def __init__(self, brought: Brought) -> None:
        self.brought = brought
        super().__init__(images=[brought.device], mechanism_options={"iscsi": brought.options})

    def files(self) -> set[str]:
        return super().files() | set(self.brought.traces())


@pytest.fixture
def world(brought: Brought) -> Iterator[BroughtWorld]:
    made = BroughtWorld(brought)
    yield made
    made.close()


def keep(controller: Controller, repository: Repository) -> str:
    return controller.backup("vm001", repository, keep_duplicate=True, max_pause_seconds=100.0).duplicate


def test_what_a_killed_backup_has_logged_in_to_is_let_go_by_recovery(world: BroughtWorld) -> None:
    run_and_be_killed(world, keep, Fault("clone", 1, Effect.KILL_AFTER))
    assert [path for path in SESSIONS.glob("*/targetname") if ":bk-" in path.read_text()]
    with world.controller() as controller:
        assert controller.recover().kept == ()
    world.see_that_all_is_well(1)


def test_a_duplicate_whose_target_has_vanished_is_discarded_all_the_same(
    world: BroughtWorld, brought: Brought, initiator: KernelInitiator
) -> None:
    with world.controller() as controller:
        name = keep(controller, world.repository())
        brought.server.remove(f"{AUTHORITY}:{name}")
        eventually(lambda: any(path.read_text() == "FAILED\n" for path in SESSIONS.glob("*/state")), "it is noticed")
        controller.discard_duplicate(name)
    world.see_that_all_is_well(1)


def test_a_target_that_does_not_let_the_initiator_in_is_one_line_and_leaves_nothing(
    world: BroughtWorld, brought: Brought
) -> None:
    world.mechanism_options = {"iscsi": {**brought.options, "initiators": QEMU}}
    with world.controller() as controller, pytest.raises(SnapshotError) as refused:
        keep(controller, world.repository())
    assert "could not log in to iscsi://" in refused.value.message and "authorization failure" in refused.value.message
    assert "\n" not in str(refused.value)
    world.see_that_all_is_well(1)


def test_a_target_that_does_not_show_who_it_is_is_one_line_and_leaves_nothing(
    world: BroughtWorld, brought: Brought
) -> None:
    """CHAP of both ways. The origin's secret was changed after it was brought, and whoever serves has another now."""
    (secret,) = Path(lio_program.ISCSI, brought.target).glob(f"tpgt_1/acls/{NAME}/auth/password_mutual")
    secret.write_text("another-word-56")
    with world.controller() as controller, pytest.raises(SnapshotError) as refused:
        keep(controller, world.repository())
    assert "could not log in to iscsi://" in refused.value.message and "login failure" in refused.value.message
    assert "the same secrets of CHAP" in refused.value.cure
    assert "\n" not in str(refused.value) and SHOWN[1] not in str(refused.value)
    world.see_that_all_is_well(1)
