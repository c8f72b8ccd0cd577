"""The mechanism ``iscsi`` where LIO serves volumes of OpenZFS: its contract, and what they add to what can go wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_rig import write
from tests.in_guest.openzfs.pools import MIB, NODES, links, pool, run
from tests.in_guest.test_lio import server
from tests.lab.lio import LioServer
from tests.lun_failures import AUTHORITY, plan_of
from tests.lun_rig import LunRig, in_use
from tests.zfs_rig import names
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap.roles import SnapshotMechanism
from vmsnap.testing.cloning import clone_all, delete_all
from vmsnap.testing.rigs import eventually, read_all
from vmsnap.testing.snapshot import SnapshotContract, live
from vmsnap_drivers.snapshots.iscsi import watch
from vmsnap_drivers.snapshots.zfs import ZfsMechanism

__all__ = ["server"]
pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pool(tmp_path_factory.mktemp("pool"), "tank", 320) as name, links():
        yield name


class ZvolRig(LunRig):
    """Two LUNs on volumes, which stay from test to test."""

    tank = "tank"

    def make_store(self, disk: Disk) -> Path:
        node = NODES / self.tank / disk.device
        if not node.exists():
            run("zfs", "create", "-V", str(disk.size_bytes), f"{self.tank}/{disk.device}")
            eventually(node.exists, f"{node} appears")
        return node

    def traces(self) -> frozenset[str]:
        return super().traces() | names(run, self.tank)

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        (reader,) = NODES.glob(f"{self.tank}/iscsi.vmsnap-*.{self._disks.index(disk)}")
        for target, paths in self.server.targets().items():
            if str(reader) in paths:
                self.server.remove(target)
        origin = run("zfs", "get", "-H", "-o", "value", "origin", f"{self.tank}/{reader.name}").strip()
        run("zfs", "destroy", "-R", origin)


def rig_of(server: LioServer, tank: str, tmp_path: Path) -> Iterator[ZvolRig]:
    yield from in_use(ZvolRig(tmp_path, server, {"pause_seconds": "60"}))
    assert server.stores() == [] and not [name for name in names(run, tank) if "vmsnap" in name]


@pytest.fixture
def rig(server: LioServer, tank: str, tmp_path: Path) -> Iterator[ZvolRig]:
    yield from rig_of(server, tank, tmp_path)


class TestZvols(SnapshotContract):
    @pytest.fixture
    def rig(self, server: LioServer, tank: str, tmp_path: Path) -> Iterator[ZvolRig]:
        yield from rig_of(server, tank, tmp_path)


def test_what_is_made_is_ours_and_the_mechanism_zfs_leaves_it_alone(rig: ZvolRig, tank: str) -> None:
    life = live(rig)
    clones = clone_all(rig, life, "bk001")
    assert {owned.kind for owned in life.mechanism.list_owned()} == {"snapshot", "clone"}
    assert all(owned.tag == life.plan.tag for owned in life.mechanism.list_owned())
    of_files = ZfsMechanism(rig.context, {})
    assert not of_files.list_owned()
    assert not [finding for finding in of_files.doctor() if "vmsnap" in finding.subject], "it is nobody else's"
    assert {finding.severity for finding in rig.mechanism().doctor()} == {"ok"}
    assert run("zfs", "get", "-H", "-o", "value", "readonly", f"{tank}/iscsi.{life.plan.tag}.0").strip() == "on"
    life.mechanism.delete(life.plan)
    assert {owned.kind for owned in life.mechanism.list_owned()} == {"clone"}, "the snapshot goes with it"
    delete_all(life.mechanism, clones)
    assert not life.mechanism.list_owned()


def test_a_pool_that_is_too_full_is_relieved_of_the_snapshot(
    rig: ZvolRig, tank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rig.traces()
    life = live(rig, "reader")
    monkeypatch.setattr(watch, "_FULL", 0.0)
    eventually(lambda: not [name for name in names(run, tank) if "vmsnap" in name], "the snapshot is given up", 60)
    assert rig.traces() == before
    for reader in life.readers:
        with pytest.raises(SnapshotError, match=rf"the pool {tank} is full to \d+%, and the snapshot was given up"):
            reader.read_into(0, memoryview(bytearray(4096)))
    life.end()


def test_what_the_backups_own_duplicate_ran_on_goes_with_the_snapshot(
    rig: ZvolRig, tank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rig.traces()
    life = live(rig)
    clones = clone_all(rig, life, "run-1")
    monkeypatch.setattr(watch, "_FULL", 0.0)
    gone = lambda: not [name for name in names(run, tank) if "vmsnap" in name]  # noqa: E731
    eventually(gone, "all that pins the pool's room is given up", 60)
    for clone in clones:
        with pytest.raises(SnapshotError, match="and the snapshot was given up"):
            life.mechanism.clone_reader(clone.plan, clone.disk)
    delete_all(life.mechanism, clones)
    life.end()
    assert {trace for trace in rig.traces() - before if "clones-" not in trace} == set()


def test_a_clone_has_properties_of_its_own_whatever_its_pool_has(rig: ZvolRig, tank: str) -> None:
    for disk in rig.disks():
        run("zfs", "set", "readonly=off", f"{tank}/{disk.device}")
    run("zfs", "set", "readonly=on", tank)
    try:
        life = live(rig)
        clones = clone_all(rig, life, "bk001")
        for clone in clones:
            rig.write(clone.disk, 0, b"a duplicate writes")
        for name, read_only in (("0", "on"), ("0.bk001.clone", "off")):
            asked = ["zfs", "get", "-H", "-o", "value", "readonly,volmode,com.sun:auto-snapshot"]
            assert run(*asked, f"{tank}/iscsi.{life.plan.tag}.{name}").split() == [read_only, "dev", "false"]
        delete_all(life.mechanism, clones)
        life.end()
    finally:
        run("zfs", "inherit", "-r", "readonly", tank)


def test_a_quota_of_what_a_volume_lies_in_counts(rig: ZvolRig, server: LioServer, tank: str) -> None:
    run("zfs", "create", f"{tank}/customers")
    run("zfs", "create", "-s", "-V", "16m", f"{tank}/customers/web1")
    node = NODES / tank / "customers/web1"
    eventually(node.exists, "it appears")
    server.add(f"{AUTHORITY}:web1", node)
    mechanism, address = rig.mechanism(), server.address(f"{AUTHORITY}:web1")
    assert mechanism.disk_at("web1", address).size_bytes == 16 * MIB
    write(str(node), 0, os.urandom(15 * MIB))
    os.sync()
    run("zpool", "sync", tank)
    # Set before, it may keep the write waiting for ever: that takes 24 times its room as long as it lasts
    # (spa_asize_inflation), and is tried again while the quota is not used up (dsl_dir_tempreserve_impl).
    run("zfs", "set", "quota=16m", f"{tank}/customers")
    with pytest.raises(SnapshotError, match=f"the quota of {tank}/customers is too full for a snapshot"):
        mechanism.disk_at("web1", address)
    server.remove(f"{AUTHORITY}:web1")
    run("zfs", "destroy", "-r", f"{tank}/customers")


def test_a_volume_of_others_that_is_called_as_ours_is_left_alone(rig: ZvolRig, tank: str) -> None:
    run("zfs", "create", "-V", "1m", f"{tank}/iscsi.vmsnap-x.0")
    with pytest.raises(SnapshotError, match=r"there is /dev/zvol/tank/iscsi.vmsnap-x.0 .* already"):
        plan_of(rig)
    assert not rig.mechanism().list_owned()
    (note,) = (finding for finding in rig.mechanism().doctor() if finding.severity != "ok")
    assert note.severity == "note" and f"/dev/zvol/{tank}/iscsi.vmsnap-x.0 is named as ours are" in note.message
    run("zfs", "destroy", f"{tank}/iscsi.vmsnap-x.0")


def test_a_volume_by_its_number_and_one_without_room_are_refused(rig: ZvolRig, server: LioServer, tank: str) -> None:
    mechanism = rig.mechanism()
    numbered = (NODES / tank / "disk0").resolve()
    run("zfs", "create", "-V", "110m", f"{tank}/big")
    big = NODES / tank / "big"
    eventually(big.exists, "it appears")
    write(str(big), 0, os.urandom(100 * MIB))
    os.sync()
    server.add(f"{AUTHORITY}:big", big)
    with pytest.raises(SnapshotError, match="no room in pool tank for a snapshot of tank/big"):
        mechanism.disk_at("big", server.address(f"{AUTHORITY}:big"))
    server.remove(f"{AUTHORITY}:big")
    run("zfs", "destroy", f"{tank}/big")
    server.remove(f"{AUTHORITY}:001")
    server.add(f"{AUTHORITY}:001", numbered)
    with pytest.raises(SnapshotError, match=r"zd\d+ is a volume of ZFS by a number"):
        mechanism.disk_at("disk0", server.address(f"{AUTHORITY}:001"))


def test_it_is_read_by_the_initiator_as_it_is_where_it_lies(rig: ZvolRig) -> None:
    life = live(rig)
    content = rig.content(rig.disks()[0])
    rig.options["reading"] = "initiator"
    with rig.mechanism().reader(life.snapshots[0]) as reader:
        assert read_all(reader) == content
    life.end()
