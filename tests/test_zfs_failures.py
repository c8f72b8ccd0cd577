"""What can go wrong with a real ZFS: full pools, what is other people's, holds, a daemon that hangs, no permission."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.consoles import NOBODY, Console, as_nobody
from tests.disk_rig import sync, write
from tests.lab.mounts import read_only
from tests.lab.zfs_fuse import ZfsFuse
from tests.test_zfs_contract import zfs
from tests.zfs_console import see_the_commands
from tests.zfs_rig import MIB, TAG, ZfsRig, make_image, names, snapshot_of
from vmsnap.cli.backends import vmsnap_zfs
from vmsnap.errors import SnapshotError, SnapshotInUse, VmsnapError
from vmsnap.model import Disk, SnapshotPlan, Window, to_json
from vmsnap.roles import DriverContext
from vmsnap.testing.cloning import clone_all, delete_all
from vmsnap.testing.rigs import eventually, read_all
from vmsnap.testing.snapshot import contents_of, live
from vmsnap_drivers.devicereader import DeviceReader
from vmsnap_drivers.runner import LocalRunner, commands_with
from vmsnap_drivers.snapshots.iscsi import zvols
from vmsnap_drivers.snapshots.zfs import ZfsMechanism, doctor

__all__ = ["zfs"]

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def disks(zfs: ZfsFuse) -> tuple[Disk, Disk]:
    """Two images in one file system."""
    zfs.run("zfs", "create", f"{zfs.pool}/vm")
    (folder := zfs.mounted / "vm" / "images").mkdir()
    return make_image(folder / "a.img", 4 * MIB, "disk0"), make_image(folder / "b.img", MIB, "disk1")


@pytest.fixture(autouse=True)
def cleaned(zfs: ZfsFuse) -> Iterator[None]:
    """One test that fails is one that fails."""
    before = names(zfs.run, zfs.pool)
    yield
    for name in sorted(names(zfs.run, zfs.pool) - before, key=lambda name: "@" in name):
        if "@" in name and zfs.run("zfs", "get", "-H", "-o", "value", "userrefs", name).strip() != "0":
            zfs.run("zfs", "release", TAG, name)
        zfs.run("zfs", "destroy", name)


@contextmanager
def much_written(zfs: ZfsFuse) -> Iterator[bytes]:
    """Somebody writes so much that a fifth of the pool is full; it is gone afterwards, and the pool empty again."""

    def used() -> int:
        return int(zfs.run("zfs", "get", "-Hp", "-o", "value", "used", zfs.pool))

    before, written = used(), os.urandom(60 * MIB)
    with (other := zfs.mounted / "vm" / "other").open("wb") as file:
        file.write(written)
        os.fsync(file.fileno())
    yield written
    assert other.read_bytes() == written
    other.unlink()
    eventually(lambda: used() < before + 8 * MIB, "the room is free", 60)


@pytest.fixture
def mechanism(tmp_path: Path) -> Iterator[ZfsMechanism]:
    made = mechanism_with(tmp_path)
    yield made
    made.close()


def mechanism_with(folder: Path, **options: str) -> ZfsMechanism:
    return ZfsMechanism(DriverContext(folder / "state", folder / "memory"), {"pause_seconds": "60", **options})


def plan_of(mechanism: ZfsMechanism, *disks: Disk, tag: str = TAG) -> SnapshotPlan:
    return mechanism.plan("vm001", disks, tag, Window.FREE)


def test_disks_of_one_file_system_share_one_snapshot_at_one_instant(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    rig = ZfsRig(zfs.run, zfs.pool, tmp_path, disks)
    before = rig.traces()
    life = live(rig)
    assert len({snapshot.instant for snapshot in life.snapshots}) == 1
    made = rig.traces() - before
    assert [name for name in made if "@" in name] == [f"{zfs.pool}/vm@{life.plan.tag}"]
    assert contents_of(life.mechanism, life) == list(life.contents)
    clones = clone_all(rig, life, "bk001")
    assert len({Path(clone.disk.address).parent.parent for clone in clones}) == 2, "each has a clone of its own"
    life.end()
    assert f"{zfs.pool}/vm@{life.plan.tag}" in names(zfs.run, zfs.pool), "the clones lean on it"
    delete_all(life.mechanism, clones)
    assert not [name for name in rig.traces() - before if not Path(name).name.startswith("clones-")]


def test_raw_images_in_mounted_file_systems_are_handled(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    image = disks[0]
    (link := tmp_path / "link.img").symlink_to(image.address)
    for disk in (image, replace(image, address=str(link)), replace(image, handle={"qmp": "/run/qmp"})):
        assert mechanism.handles(disk)
    outside = make_image(tmp_path / "outside.img", MIB, "disk0")
    for disk in (
        outside,
        replace(image, format="qcow2"),
        replace(image, size_bytes=image.size_bytes + 512),
        replace(image, address=str(Path(image.address).parent)),
        replace(image, address="/dev/null"),
    ):
        assert not mechanism.handles(disk)
    with pytest.raises(SnapshotError, match="is no volume and no image file of ZFS"):
        plan_of(mechanism, outside)


def test_a_pool_or_quota_that_is_too_full_takes_no_snapshot(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    write(disks[0].address, 0, os.urandom(4 * MIB))
    sync(disks[0].address)
    before = names(zfs.run, zfs.pool)
    zfs.run("zfs", "set", "quota=8m", f"{zfs.pool}/vm")
    with pytest.raises(SnapshotError, match=f"the quota of {zfs.pool}/vm is too full"):
        plan_of(mechanism_with(tmp_path, pool_limit="50"), disks[0])
    zfs.run("zfs", "set", "quota=none", f"{zfs.pool}/vm")
    with pytest.raises(SnapshotError, match=f"pool {zfs.pool} is too full for a snapshot: .* 1% is the limit"):
        plan_of(mechanism_with(tmp_path, pool_limit="1"), disks[0])
    assert names(zfs.run, zfs.pool) == before


def test_a_quota_of_what_a_file_system_lies_in_counts_before_the_snapshot_and_while_it_is_read(
    zfs: ZfsFuse, tmp_path: Path
) -> None:
    above, within = f"{zfs.pool}/customers", zfs.mounted / "customers/web1"
    zfs.run("zfs", "create", above)
    zfs.run("zfs", "set", "quota=24m", above)
    zfs.run("zfs", "create", f"{above}/web1")
    disk = make_image(within / "a.img", MIB, "disk0")
    mechanism = mechanism_with(tmp_path, pool_limit="50")
    (taken,) = snapshot_of(mechanism, disk)
    snapshot = f"{above}/web1@{TAG}"
    with mechanism.reader(taken) as reader:
        with (within / "other").open("wb") as file:
            file.write(os.urandom(16 * MIB))
            os.fsync(file.fileno())
        eventually(lambda: snapshot not in names(zfs.run, zfs.pool), "the snapshot is given up", 60)
        with pytest.raises(SnapshotError, match=f"the quota of {above} is full to .* given up to spare the guests"):
            reader.read_into(0, memoryview(bytearray(4096)))
    mechanism.delete(taken.plan)
    with pytest.raises(SnapshotError, match=f"the quota of {above} is too full for a snapshot: .* 50% is the limit"):
        plan_of(mechanism, disk)
    mechanism.close()
    zfs.run("zfs", "destroy", "-r", above)


def test_a_pool_that_fills_up_is_relieved_of_the_snapshot_and_the_guest_goes_on(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    mechanism = mechanism_with(tmp_path, pool_limit="20")
    (taken,) = snapshot_of(mechanism, disks[0])
    with mechanism.reader(taken) as reader, much_written(zfs):
        eventually(lambda: f"{zfs.pool}/vm@{TAG}" not in names(zfs.run, zfs.pool), "the snapshot is given up", 60)
        with pytest.raises(SnapshotError, match=f"pool {zfs.pool} is full .* given up to spare the guests"):
            reader.read_into(0, memoryview(bytearray(4096)))
    with pytest.raises(SnapshotError, match="to spare the guests"):
        mechanism.reader(taken)
    mechanism.delete(taken.plan)
    assert not mechanism.list_owned()


def test_a_snapshot_that_is_being_read_is_given_up_all_the_same(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    mechanism = mechanism_with(tmp_path, pool_limit="20")
    write(disks[0].address, 0, os.urandom(4 * MIB))
    (taken,) = snapshot_of(mechanism, disks[0])
    why = f"pool {zfs.pool} is full .* given up to spare the guests"

    ended = threading.Event()

    def read_on(reader: DeviceReader) -> None:
        while not ended.is_set():
            reader.read_into(0, memoryview(bytearray(4 * MIB)))

    def ask_on(reader: DeviceReader) -> None:
        while not ended.is_set():
            assert list(reader.extents())

    with mechanism.reader(taken) as reader, ThreadPoolExecutor(4) as threads:
        work = [threads.submit(do, reader) for do in (read_on, read_on, read_on, ask_on)]
        try:
            with much_written(zfs):
                gone = f"{zfs.pool}/vm@{TAG}"
                eventually(lambda: gone not in names(zfs.run, zfs.pool), "the snapshot is given up", 60)
        finally:
            ended.set()
    for each in work:
        with pytest.raises(SnapshotError, match=why):
            each.result()
    mechanism.delete(taken.plan)


def test_what_a_backups_own_duplicate_ran_on_is_given_up_with_the_snapshot_and_what_is_kept_stays(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    mechanism = mechanism_with(tmp_path, pool_limit="20")
    write(disks[0].address, 0, wanted := os.urandom(4 * MIB))
    (taken,) = snapshot_of(mechanism, disks[0])
    clones = {}
    for name, lasting in (("run-1", False), ("bk-1", True)):
        (folder := tmp_path / name).mkdir()
        planned = mechanism.plan_clone(taken, name, folder, lasting=lasting)
        clones[name] = planned, mechanism.clone(planned, taken)
    running, (keeping, kept) = clones["run-1"], clones["bk-1"]
    made, snapshot = running[0].data["dataset"], f"{zfs.pool}/vm@{TAG}"
    with much_written(zfs):
        with Path(running[1].address).open("r+b"):  # its VM runs
            eventually(lambda: f"{zfs.pool}/{TAG}.0" not in names(zfs.run, zfs.pool), "the snapshot is given up", 60)
            with pytest.raises(SnapshotError, match="to spare the guests"):
                mechanism.clone_reader(*running)
            assert made in names(zfs.run, zfs.pool)
        eventually(lambda: made not in names(zfs.run, zfs.pool), "the clone goes when its VM has ended", 60)
        with pytest.raises(SnapshotError, match=f"pool {zfs.pool} is full .* given up to spare the guests"):
            mechanism.clone_reader(*running)
        with mechanism.clone_reader(keeping, kept) as reader:
            assert read_all(reader) == wanted
        with pytest.raises(SnapshotError, match=f"the snapshot {snapshot} is lost: .* to spare the guests"):
            mechanism.clone(running[0], taken)
        mechanism.delete_clone(keeping)
        assert snapshot not in names(zfs.run, zfs.pool), "it goes with its last clone"
    mechanism.delete_clone(running[0])
    mechanism.delete(taken.plan)
    assert not mechanism.list_owned()


def test_what_is_named_as_ours_and_is_not_is_left_alone_and_told_of(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk]
) -> None:
    plan = plan_of(mechanism, disks[0])
    theirs = {f"{zfs.pool}/vm@{TAG}", f"{zfs.pool}/{TAG}.0"}
    zfs.run("zfs", "snapshot", f"{zfs.pool}/vm@{TAG}")
    zfs.run("zfs", "create", f"{zfs.pool}/{TAG}.0")
    with pytest.raises(SnapshotError, match="already exists"):
        mechanism.snapshot(plan)
    with pytest.raises(SnapshotError, match=f"there is {zfs.pool}/.* already"):
        plan_of(mechanism, disks[0])
    mechanism.delete(plan)
    assert not mechanism.list_owned() and theirs <= names(zfs.run, zfs.pool)
    notes = {finding.subject: finding.severity for finding in mechanism.doctor()}
    assert {notes[name] for name in theirs} == {"note"}


def test_what_the_mechanism_of_luns_has_made_is_not_told_of_as_somebody_elses(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk]
) -> None:
    assert doctor.OF_LUNS == zvols.KIND
    of_luns, inherited = f"{zfs.pool}/vm@vmsnap-luns", f"{zfs.pool}/below@vmsnap-theirs"
    zfs.run("zfs", "snapshot", "-o", f"{zvols.KIND}=snapshot", of_luns)
    zfs.run("zfs", "create", "-o", f"{zvols.KIND}=snapshot", f"{zfs.pool}/below")
    zfs.run("zfs", "snapshot", inherited)
    told = {finding.subject for finding in mechanism.doctor()}
    zfs.run("zfs", "destroy", "-r", f"{zfs.pool}/below")
    assert of_luns not in told and inherited in told


def test_the_commands_of_vmsnap_zfs(zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path) -> None:
    see_the_commands(zfs.run, zfs.pool, zfs.mounted / "vm", tmp_path / "state")


def test_somebody_without_rights_is_told_so_and_not_that_there_are_no_snapshots(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    ours = Console(vmsnap_zfs, tmp_path / "state", {"pause_seconds": "60"})
    taken = ours("snapshot", disks[0].address)["snapshot"]
    assert ours("list")["resources"]
    state = Path(tempfile.mkdtemp())
    os.chown(state, NOBODY, NOBODY)
    theirs = Console(vmsnap_zfs, state)
    for words in (("snapshot", disks[0].address), ("list",)):
        said = as_nobody(partial(theirs, *words, status=6))
        assert said == "vmsnap-zfs: we may not use /var/run/zfs/zfs_socket (run vmsnap as root)\n"
    ours("delete", taken)


def test_what_others_make_below_or_of_ours_is_not_ours(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk]
) -> None:
    (taken,) = snapshot_of(mechanism, disks[0])
    reader = f"{zfs.pool}/{TAG}.0"
    zfs.run("zfs", "snapshot", f"{reader}@theirs")
    assert {owned.name for owned in mechanism.list_owned()} == {reader, f"{zfs.pool}/vm@{TAG}"}
    with pytest.raises(SnapshotInUse, match=f"cannot destroy '{reader}'"):
        mechanism.delete(taken.plan)
    assert f"{reader}@theirs" in names(zfs.run, zfs.pool)
    zfs.run("zfs", "destroy", f"{reader}@theirs")
    mechanism.delete(taken.plan)
    assert not mechanism.list_owned()


def test_a_snapshot_is_held_while_it_is_read_and_what_others_hold_goes_when_they_let_go(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk]
) -> None:
    (taken,) = snapshot_of(mechanism, disks[0])
    snapshot = f"{zfs.pool}/vm@{TAG}"
    assert zfs.run("zfs", "get", "-H", "-o", "value", "userrefs", snapshot) == "1\n"
    zfs.run("zfs", "hold", "theirs", snapshot)
    with pytest.raises(SnapshotInUse, match=f"{snapshot} is held or cloned by somebody else"):
        mechanism.delete(taken.plan)
    zfs.run("zfs", "release", "theirs", snapshot)
    assert snapshot not in names(zfs.run, zfs.pool)
    mechanism.delete(taken.plan)


def test_what_is_in_use_is_named_the_guest_is_well_and_a_later_call_removes_it(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk]
) -> None:
    (taken,) = snapshot_of(mechanism, disks[0])
    mounted = Path(taken.plan.data["disks"][0]["mounted"])
    with (mounted / "images/a.img").open("rb"), pytest.raises(SnapshotInUse, match=f"{TAG}.0"):
        mechanism.delete(taken.plan)
    write(disks[0].address, 0, b"the guest writes on")
    mechanism.remove_owned(mechanism.list_owned()[0])
    mechanism.delete(taken.plan)
    assert not mechanism.list_owned() and not mounted.exists()


def test_a_folder_for_clones_that_cannot_be_written_to_is_told_before_anything_is_taken(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    before = names(zfs.run, zfs.pool)
    (folder := tmp_path / "state" / "zfs").mkdir(parents=True)
    with read_only(folder), pytest.raises(VmsnapError, match=f"the folder {folder} cannot be written to: Read-only"):
        mechanism.prepare(plan_of(mechanism, *disks))
    assert names(zfs.run, zfs.pool) == before


def test_a_file_system_that_was_renamed_keeps_nothing_of_ours(
    mechanism: ZfsMechanism, zfs: ZfsFuse, tmp_path: Path
) -> None:
    zfs.run("zfs", "create", f"{zfs.pool}/before")
    (taken,) = snapshot_of(mechanism, make_image(zfs.mounted / "before" / "a.img", MIB, "disk0"))
    zfs.run("zfs", "rename", f"{zfs.pool}/before", f"{zfs.pool}/after")
    mechanism.delete(taken.plan)
    assert not mechanism.list_owned() and f"{zfs.pool}/after" in names(zfs.run, zfs.pool)


def test_a_file_system_that_was_destroyed_is_no_reason_to_keep_a_plan(
    mechanism: ZfsMechanism, zfs: ZfsFuse, tmp_path: Path
) -> None:
    zfs.run("zfs", "create", f"{zfs.pool}/gone")
    (taken,) = snapshot_of(mechanism, make_image(zfs.mounted / "gone" / "a.img", MIB, "disk0"))
    mechanism.close()
    zfs.run("zfs", "destroy", f"{zfs.pool}/{TAG}.0")
    zfs.run("zfs", "release", TAG, f"{zfs.pool}/gone@{TAG}")
    zfs.run("zfs", "destroy", "-r", f"{zfs.pool}/gone")
    with pytest.raises(SnapshotError, match="is lost"):
        mechanism.reader(taken)
    mechanism.delete(taken.plan)
    mechanism.delete(taken.plan)


def test_a_daemon_that_hangs_fails_the_snapshot_in_time_and_nothing_is_left(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path
) -> None:
    mechanism = mechanism_with(tmp_path, pause_seconds="2")
    plan = plan_of(mechanism, disks[0])
    mechanism.prepare(plan)
    os.kill(zfs.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(SnapshotError, match="zfs snapshot did not end within 2 s and was stopped"):
            mechanism.snapshot(plan)
        assert time.monotonic() - begin < 30
    finally:
        os.kill(zfs.pid, signal.SIGCONT)
    mechanism.delete(plan)
    assert f"{zfs.pool}/vm@{TAG}" not in names(zfs.run, zfs.pool)


def test_a_command_that_outlives_the_vmsnap_that_gave_it_makes_nothing_after_the_recovery(
    zfs: ZfsFuse, disks: tuple[Disk, Disk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mechanism = mechanism_with(tmp_path)
    plan = plan_of(mechanism, disks[0])
    mechanism.prepare(plan)
    (said := tmp_path / "plan").write_text(to_json(plan))
    # What is at work within ZFS is not stopped by any signal; zfs-fuse's command is, so that it is given none.
    code = f"""
from pathlib import Path
from vmsnap.model import SnapshotPlan, from_json
from vmsnap.roles import DriverContext
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.snapshots.zfs import ZfsMechanism
LocalRunner._tie = lambda self: []
mechanism = ZfsMechanism(DriverContext(Path({str(tmp_path)!r}), Path({str(tmp_path)!r})), {{"pause_seconds": "600"}})
mechanism._zfs.flavour()
Path({str(tmp_path / "asked")!r}).touch()
input()
mechanism.snapshot(from_json(Path({str(said)!r}).read_text(), SnapshotPlan))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        eventually((tmp_path / "asked").exists, "it knows its ZFS", 60)
        os.kill(zfs.pid, signal.SIGSTOP)
        try:
            worker.stdin.write("\n")
            worker.stdin.flush()
            eventually(lambda: list(commands_with("vmsnap:plan", TAG)), "the command is given", 60)
            ((_, which),) = commands_with("vmsnap:plan", TAG)
            os.kill(client := int(which.split()[-1]), signal.SIGSTOP)
            worker.kill()
        finally:
            os.kill(zfs.pid, signal.SIGCONT)
    waiting = threading.Event()
    waits = LocalRunner.await_others
    monkeypatch.setattr(LocalRunner, "await_others", lambda *words: (waiting.set(), waits(*words)))
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(mechanism.delete, plan)
        eventually(lambda: waiting.is_set() or deleting.done(), "nothing is found", 60)
        os.kill(client, signal.SIGCONT)
        deleting.result(120)
    eventually(lambda: not list(commands_with("vmsnap:plan", TAG)), "its end", 60)
    assert f"{zfs.pool}/vm@{TAG}" not in names(zfs.run, zfs.pool)


def test_a_plan_that_names_something_else_removes_nothing(
    mechanism: ZfsMechanism, zfs: ZfsFuse, disks: tuple[Disk, Disk]
) -> None:
    before = names(zfs.run, zfs.pool)
    for key, value in (("reader", f"{zfs.pool}/vm"), ("snapshot", f"{zfs.pool}/vm@theirs"), ("mounted", "/tmp")):
        plan = plan_of(mechanism, disks[0])
        plan.data["disks"][0][key] = value
        with pytest.raises(SnapshotError, match="which are not its"):
            mechanism.delete(plan)
    assert names(zfs.run, zfs.pool) == before


@pytest.mark.parametrize("tag", ["other", "vmsnap-x/y", "vmsnap-" + "y" * 250], ids=["no prefix", "path", "long"])
def test_a_name_that_zfs_would_not_take_is_refused_in_time(
    mechanism: ZfsMechanism, disks: tuple[Disk, Disk], tag: str
) -> None:
    with pytest.raises(SnapshotError, match=r"is no tag|too long a name for ZFS"):
        plan_of(mechanism, disks[0], tag=tag)


def test_without_permission_it_is_said_what_is_missing(zfs: ZfsFuse, disks: tuple[Disk, Disk]) -> None:
    script = """
import json, os
from pathlib import Path
from vmsnap.errors import SnapshotError, VmsnapError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap_drivers.snapshots.zfs import ZfsMechanism
os.setgid(65534); os.setuid(65534)
mechanism = ZfsMechanism(DriverContext(Path("/tmp"), Path("/tmp")), {})
said = {"owned": list(mechanism.list_owned())}
said["doctor"] = [(finding.severity, finding.subject) for finding in mechanism.doctor()]
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"owned": [], "doctor": [["missing", "zfs"]]}
