"""What can go wrong with real volumes: no room, overflow, a full pool, other people's volumes, no permission."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thick, make_thin, run, volume_group, volumes
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, DiskSnapshot, Window
from vmsnap.roles import DriverContext
from vmsnap.testing.rigs import eventually, read_all
from vmsnap_drivers.snapshots.lvm import LvmMechanism

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("group"), "vmsnap-vg", 96) as name:
        make_pool(name, "pool", 16)
        yield name


@pytest.fixture(scope="module")
def thick(group: str) -> Disk:
    return make_thick(group, "disk-0", 8)


@pytest.fixture(scope="module")
def thin(group: str) -> Disk:
    return make_thin(group, "pool", "thin-0", 24)


@pytest.fixture(autouse=True)
def cleaned() -> Iterator[None]:
    """One test that fails is one that fails."""
    yield
    if left := [name for name in volumes() if "/vmsnap-t." in name]:
        lvm("lvremove", "--force", *left)


@pytest.fixture
def mechanism(tmp_path: Path) -> Iterator[LvmMechanism]:
    made = mechanism_with(tmp_path)
    yield made
    made.close()


def mechanism_with(folder: Path, **options: str) -> LvmMechanism:
    return LvmMechanism(DriverContext(folder, folder), {"pause_seconds": "60", **options})


def snapshot_of(mechanism: LvmMechanism, *disks: Disk, tag: str = "vmsnap-t") -> tuple[DiskSnapshot, ...]:
    plan = mechanism.plan("vm001", disks, tag, Window.FREE)
    mechanism.prepare(plan)
    for disk in disks:
        sync(disk.address)
    taken = mechanism.snapshot(plan)
    mechanism.settle(taken)
    return taken


def test_a_thick_snapshot_that_fills_up_is_extended_before_it_is_lost(tmp_path: Path, group: str, thick: Disk) -> None:
    mechanism = mechanism_with(tmp_path, snapshot_size="2M")
    (taken,) = snapshot_of(mechanism, thick)
    before = Path(thick.address).read_bytes()

    def room_left_mib() -> float:
        options = ["--noheadings", "--units", "m", "--nosuffix", "--options", "lv_size,data_percent"]
        size, used = map(float, lvm("lvs", *options, f"{group}/vmsnap-t.0").split())
        return size * (1 - used / 100)

    for at in range(0, thick.size_bytes, MIB // 2):
        eventually(lambda: room_left_mib() > 0.6, "room for half a MiB and its table", 60)
        write(thick.address, at, os.urandom(MIB // 2))
        sync(thick.address)
    with mechanism.reader(taken) as reader:
        assert read_all(reader) == before
    mechanism.delete(taken.plan)


def test_an_overflow_costs_the_snapshot_and_says_so_and_the_guest_nothing(
    tmp_path: Path, group: str, thick: Disk
) -> None:
    mechanism = mechanism_with(tmp_path, grow="no", snapshot_size="2M")
    (taken,) = snapshot_of(mechanism, thick)
    written = os.urandom(8 * MIB)
    # Opened before: once it is seen to be lost it cannot be.
    with mechanism.reader(taken) as reader:
        write(thick.address, 0, written)
        sync(thick.address)
        assert Path(thick.address).read_bytes() == written

        def reads() -> str:
            with pytest.raises(SnapshotError) as caught:
                read_all(reader)
            return str(caught.value)

        eventually(lambda: "overwrote more than the 2097152 bytes" in reads(), "the reason", 60)
        assert f"the snapshot {group}/vmsnap-t.0 is lost" in reads()
    overflowed = [finding for finding in mechanism.doctor() if finding.subject.endswith("/vmsnap-t.0")]
    assert [(finding.severity, "overflowed" in finding.message) for finding in overflowed] == [("note", True)]
    mechanism.delete(taken.plan)
    assert f"{group}/vmsnap-t.0" not in volumes()
    assert Path(thick.address).read_bytes() == written


def test_a_raw_disk_that_is_a_whole_volume_is_handled_whatever_hypervisor_has_it(
    mechanism: LvmMechanism, group: str, thick: Disk, thin: Disk
) -> None:
    handle = {"qmp": "/run/qmp", "node": "disk0", "qdev": "/machine/peripheral/disk0", "file": thick.address}
    for disk in (thick, thin, replace(thick, handle=handle), replace(thick, address="/dev/mapper/vmsnap--vg-disk--0")):
        assert mechanism.handles(disk)
    for disk in (
        replace(thick, format="qcow2", handle=handle),
        replace(thick, size_bytes=thick.size_bytes + 512),
        replace(thick, address="/dev/loop0"),
        replace(thick, address=f"/dev/mapper/{group.replace('-', '--')}-pool_tdata"),
        replace(thick, address=f"/dev/{group}"),
    ):
        assert not mechanism.handles(disk)


def test_without_room_in_the_group_nothing_is_begun(tmp_path: Path, group: str) -> None:
    big = make_thick(group, "big", 56)
    before = volumes()
    with pytest.raises(SnapshotError, match=f"no room in volume group {group}"):
        mechanism_with(tmp_path, snapshot_size="100%").plan("vm001", [big], "vmsnap-t", Window.FREE)
    assert volumes() == before
    lvm("lvremove", "--force", f"{group}/big")


def test_a_pool_that_is_too_full_takes_no_snapshot(tmp_path: Path, group: str, thin: Disk) -> None:
    write(thin.address, 0, os.urandom(4 * MIB))
    sync(thin.address)
    before = volumes()
    with pytest.raises(SnapshotError, match=r"pool is too full for a snapshot of thin-0: 25% of its data"):
        mechanism_with(tmp_path, pool_limit="20").plan("vm001", [thin], "vmsnap-t", Window.FREE)
    assert volumes() == before


def test_a_pool_that_fills_up_is_relieved_of_the_snapshot_and_the_guest_goes_on(
    tmp_path: Path, group: str, thin: Disk
) -> None:
    mechanism = mechanism_with(tmp_path, pool_limit="80")
    write(thin.address, 0, os.urandom(6 * MIB))
    (taken,) = snapshot_of(mechanism, thin)
    written = os.urandom(7 * MIB)
    with mechanism.reader(taken) as reader:  # opened before: once it is given up it cannot be

        def reads() -> bool:
            try:
                reader.read_into(0, memoryview(bytearray(4096)))
            except SnapshotError:
                return False
            return True

        with Path(f"/dev/{group}/vmsnap-t.0").open("rb"):  # as one of several that read it
            write(thin.address, 0, written)  # 6 of 16 MiB are the snapshot's alone: 13 are used
            sync(thin.address)
            eventually(lambda: not reads(), "nobody is let at it any more", 60)
            assert f"{group}/vmsnap-t.0" in volumes(), "it is in use"
        eventually(lambda: f"{group}/vmsnap-t.0" not in volumes(), "the snapshot is given up", 60)
        with pytest.raises(SnapshotError, match="to spare the guests"):
            reader.read_into(0, memoryview(bytearray(4096)))
    assert Path(thin.address).read_bytes()[: 7 * MIB] == written
    write(thin.address, 7 * MIB, os.urandom(5 * MIB))  # there was no room for this
    sync(thin.address)
    mechanism.delete(taken.plan)


def test_a_volume_that_is_named_as_ours_and_is_not_is_left_alone(
    mechanism: LvmMechanism, group: str, thick: Disk
) -> None:
    plan = mechanism.plan("vm001", [thick], "vmsnap-t", Window.FREE)
    lvm("lvcreate", "--yes", "--size", "1m", "--name", "vmsnap-t.0", group)
    with pytest.raises(SnapshotError, match="already exists"):
        mechanism.prepare(plan)
    with pytest.raises(SnapshotError, match=r"there is a volume vmsnap-vg/vmsnap-t\.0 already"):
        mechanism.plan("vm001", [thick], "vmsnap-t", Window.FREE)
    mechanism.delete(plan)
    assert not mechanism.list_owned()
    assert f"{group}/vmsnap-t.0" in volumes()
    notes = [finding for finding in mechanism.doctor() if finding.subject == f"{group}/vmsnap-t.0"]
    assert [finding.severity for finding in notes] == ["note"]
    lvm("lvremove", "--force", f"{group}/vmsnap-t.0")


def test_what_is_in_use_is_named_the_rest_is_removed_and_a_later_call_removes_it(
    mechanism: LvmMechanism, group: str, thick: Disk, thin: Disk
) -> None:
    taken = snapshot_of(mechanism, thick, thin)
    with (
        Path(f"/dev/{group}/vmsnap-t.1").open("rb"),
        pytest.raises(SnapshotError, match=r"vmsnap-t\.1 in use"),
    ):
        mechanism.delete(taken[0].plan)
    assert {name for name in volumes() if "vmsnap-t" in name} == {f"{group}/vmsnap-t.1"}
    assert [owned.name for owned in mechanism.list_owned()] == [f"{group}/vmsnap-t.1"]
    mechanism.remove_owned(mechanism.list_owned()[0])
    assert not [name for name in volumes() if "vmsnap-t" in name]
    mechanism.delete(taken[0].plan)


def test_a_group_that_another_command_keeps_fails_the_snapshot_in_time_and_nothing_is_left(
    tmp_path: Path, group: str, thick: Disk
) -> None:
    mechanism = mechanism_with(tmp_path, pause_seconds="2")
    plan = mechanism.plan("vm001", [thick], "vmsnap-t", Window.FREE)
    mechanism.prepare(plan)
    with subprocess.Popen(["flock", f"/run/lock/lvm/V_{group}", "sleep", "1000"]) as holder:
        eventually(lambda: subprocess.run(["flock", "-n", f"/run/lock/lvm/V_{group}", "true"]).returncode == 1, "lock")
        begin = time.monotonic()
        with pytest.raises(SnapshotError, match="did not end within 2 s and was stopped"):
            mechanism.snapshot(plan)
        assert time.monotonic() - begin < 30
        run("pkill", "-P", str(holder.pid))
    mechanism.delete(plan)
    assert not mechanism.list_owned()


def test_an_origin_that_a_dead_command_left_suspended_is_resumed(
    mechanism: LvmMechanism, group: str, thick: Disk
) -> None:
    plan = mechanism.plan("vm001", [thick], "vmsnap-t", Window.FREE)
    run("dmsetup", "suspend", f"{group.replace('-', '--')}-disk--0")
    mechanism.delete(plan)
    assert "ACTIVE" in run("dmsetup", "info", f"{group.replace('-', '--')}-disk--0")
    write(thick.address, 0, b"the guest writes again")
    sync(thick.address)


def test_a_metadata_snapshot_that_a_dead_process_left_is_released(
    mechanism: LvmMechanism, group: str, thin: Disk, tmp_path: Path
) -> None:
    (taken,) = snapshot_of(mechanism, thin)
    run("dmsetup", "message", f"{group.replace('-', '--')}-pool-tpool", "0", "reserve_metadata_snap")
    with mechanism.reader(taken) as reader:
        assert not any(extent.zero for extent in reader.extents())
        assert "another program holds" in reader.remark(), "nothing says that it is ours"
    (tmp_path / "lvm" / f"{group}~pool.reserved").touch()  # as we do before we reserve it
    mechanism.delete(taken.plan)
    assert run("dmsetup", "status", f"{group.replace('-', '--')}-pool-tpool").split()[6] == "-"


def test_without_permission_it_is_said_what_is_missing(group: str, thick: Disk) -> None:
    script = f"""
import json, os, subprocess
from pathlib import Path
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap_drivers.snapshots.lvm import LvmMechanism
os.setgid(65534); os.setuid(65534)
mechanism = LvmMechanism(DriverContext(Path("/tmp"), Path("/tmp")), {{}})
disk = Disk("disk0", {thick.address!r}, {thick.size_bytes})
said = {{"handles": mechanism.handles(disk), "owned": list(mechanism.list_owned())}}
said["doctor"] = [(finding.severity, finding.cure) for finding in mechanism.doctor()]
try:
    mechanism.plan("vm001", [disk], "vmsnap-t", Window.FREE)
except SnapshotError as e:
    said["plan"] = e.cure
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
    assert json.loads(done.stdout) == {
        "handles": True,
        "owned": [],
        "doctor": [["missing", "run vmsnap as root"]],
        "plan": "LVM is root's: run vmsnap as root",
    }


def test_other_layouts_are_refused(mechanism: LvmMechanism, group: str, thick: Disk) -> None:
    lvm("lvcreate", "--snapshot", "--size", "2m", "--name", "users", f"{group}/disk-0")
    users = Disk("disk0", f"/dev/{group}/users", thick.size_bytes)
    with pytest.raises(SnapshotError, match="of the kind snapshot"):
        mechanism.plan("vm001", [users], "vmsnap-t", Window.FREE)
    (taken,) = snapshot_of(mechanism, thick)
    mechanism.delete(taken.plan)
    assert f"{group}/users" in volumes()
    lvm("lvremove", "--force", f"{group}/users")


@pytest.mark.parametrize("tag", ["vmsnap-x_tdata", "vmsnap-" + "y" * 120])
def test_a_name_that_lvm_would_not_take_is_refused_in_time(mechanism: LvmMechanism, thick: Disk, tag: str) -> None:
    with pytest.raises(SnapshotError, match="give the VM"):
        mechanism.plan("vm001", [thick], tag, Window.FREE)


def test_a_plan_that_names_another_volume_removes_nothing(mechanism: LvmMechanism, group: str, thick: Disk) -> None:
    plan = mechanism.plan("vm001", [thick], "vmsnap-t", Window.FREE)
    plan.data["volumes"][0]["snapshot"] = "disk-0"
    with pytest.raises(SnapshotError, match="no snapshot of it"):
        mechanism.delete(plan)
    assert f"{group}/disk-0" in volumes()
