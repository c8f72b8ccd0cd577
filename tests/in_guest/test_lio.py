"""The mechanism ``iscsi`` on LIO, the target in Linux: its contract, and what goes wrong. Targets are made by rtslib as
their users make them; files lie on a real XFS.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.volumes import MIB, lvm, make_pool, make_thick, make_thin, run, volume_group, volumes
from tests.lab.appliance import lio_library
from tests.lab.lio import QEMU, LioServer
from tests.lun_failures import *  # noqa: F403 -- its tests, on LIO
from tests.lun_failures import AUTHORITY, plan_of
from tests.lun_rig import SIZE, TARGETS, LunRig, rig_on
from tests.test_file_mechanism import xfs
from vmsnap.errors import SnapshotError, SnapshotInUse, UsageError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap.testing.cloning import clone_all, delete_all
from vmsnap.testing.rigs import eventually, read_all
from vmsnap.testing.snapshot import SnapshotContract, live
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism, lio_program
from vmsnap_drivers.snapshots.iscsi.address import parse
from vmsnap_drivers.snapshots.iscsi.exports import Export, Exports
from vmsnap_drivers.snapshots.iscsi.initiator import Account
from vmsnap_drivers.snapshots.iscsi.lio import Lio
from vmsnap_drivers.snapshots.iscsi.places import HERE, Place, ServerSettings
from vmsnap_drivers.snapshots.iscsi.writer import LunTarget

__all__ = ["xfs"]
pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def server() -> Iterator[LioServer]:
    for module in ("loop", "xfs"):
        run("modprobe", module)
    with LioServer(lio_library()) as made:
        yield made


@pytest.fixture
def rig(server: LioServer, xfs: Path) -> Iterator[LunRig]:
    yield from rig_on(xfs / "rig", server, {"reading": "initiator"})
    assert server.stores() == []


class TestLio(SnapshotContract):
    @pytest.fixture
    def rig(self, server: LioServer, xfs: Path) -> Iterator[LunRig]:
        yield from rig_on(xfs / "rig", server, {})
        assert server.stores() == []


def test_an_export_listens_where_its_origin_does_and_admits_by_name(rig: LunRig, server: LioServer) -> None:
    life = live(rig)
    clones = clone_all(rig, life, "bk001")
    snapshot, clone = f"{AUTHORITY}:{life.plan.tag}.0", f"{AUTHORITY}:bk001"
    assert server.portals(snapshot) == server.portals(clone) == [server.portal] == server.portals(TARGETS[0])
    assert server.access(snapshot) == [QEMU] and server.access(clone) == [QEMU, f"{QEMU}:bk001"]
    assert server.read_only(snapshot) and not server.read_only(clone)
    assert [finding.severity for finding in rig.mechanism().doctor()] == ["ok"]
    delete_all(life.mechanism, clones)
    life.end()
    assert sorted(server.targets()) == sorted(TARGETS)


def test_a_lun_is_what_its_initiators_see_by_its_number(rig: LunRig, server: LioServer) -> None:
    target, other = f"{AUTHORITY}:both", rig.images / "other.img"
    other.write_bytes(bytes(SIZE))
    server.add(target, rig.path(rig.disks()[0]), initiators=())
    server.add_disk(target, other, 2, {"iqn.2009-12.com.example:a": 1})
    lun, mechanism = Disk("disk0", server.address(target), SIZE), rig.mechanism()
    plan = mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
    assert plan.data["luns"][0]["origin"] == str(other), "the group's own LUN 1 is seen by nobody"
    server.add_disk(target, rig.path(rig.disks()[1]), 3, {"iqn.2009-12.com.example:b": 1})
    with pytest.raises(SnapshotError, match=r"LUN 1 of .* is not the same disk to all of its initiators, but one of"):
        mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
    with pytest.raises(SnapshotError, match="is not the same disk to all"):
        mechanism.writer(lun)
    server.remove(target)
    other.unlink()


def test_initiators_are_names_to_lio(rig: LunRig) -> None:
    rig.options["initiators"] = "127.0.0.1"
    life = live(rig, "snapshot")
    with pytest.raises(UsageError, match="knows initiators by their names"):
        life.mechanism.settle(life.snapshots)
    life.end()


def test_a_target_that_listens_for_everybody_is_noted(rig: LunRig, server: LioServer) -> None:
    everywhere = LioServer(lio_library(), "0.0.0.0:3300")
    everywhere.add(f"{AUTHORITY}:open", rig.images / "disk0.img")
    # No more can be done: nobody may listen at one address of that port besides.
    with pytest.raises(OSError) as refused:
        Path(lio_program.ISCSI, TARGETS[0], "tpgt_1/np/127.0.0.1:3300").mkdir()
    assert refused.value.errno == errno.EINVAL and server.portals(TARGETS[0]) == [server.portal]
    notes = [finding for finding in rig.mechanism().doctor() if finding.severity == "note"]
    said = f"LIO listens at 0.0.0.0:3300, for every network, and so does what vmsnap exports beside {AUTHORITY}:open,"
    assert len(notes) == 1 and notes[0].message.startswith(said)
    server.remove(f"{AUTHORITY}:open")


def test_a_lio_that_was_started_anew_keeps_nothing_from_being_removed(rig: LunRig, server: LioServer) -> None:
    life = live(rig)
    server.kill()
    with pytest.raises(SnapshotError, match="serves no LUN 1 of"):
        plan_of(rig)
    life.mechanism.delete(life.plan)
    assert not list(rig.images.glob("vmsnap-*")) and server.stores() == []


def test_a_volume_outside_of_a_thin_pool_has_snapshots_that_never_run_full(server: LioServer, tmp_path: Path) -> None:
    target = f"{AUTHORITY}:thick"
    with volume_group(tmp_path, "vg0", 64) as group:
        origin = make_thick(group, "vm001", 8)
        server.add(target, Path(origin.address))
        lun = Disk("disk0", server.address(target), origin.size_bytes)
        mechanism = IscsiMechanism(
            DriverContext(tmp_path / "state", tmp_path), {"server": "lio", "pause_seconds": "60"}
        )
        content, before = os.urandom(origin.size_bytes), volumes()
        write(origin.address, 0, content)
        plan = mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
        mechanism.prepare(plan)
        sync(origin.address)
        (snapshot,) = mechanism.snapshot(plan)
        write(origin.address, 0, os.urandom(origin.size_bytes))
        sync(origin.address)
        mechanism.settle([snapshot])
        with mechanism.reader(snapshot) as reader:
            assert read_all(reader) == content
        planned = mechanism.plan_clone(snapshot, "bk001", tmp_path, lasting=True)
        made = parse(mechanism.clone(planned, snapshot).address)
        assert made is not None and str(made) == server.address(f"{AUTHORITY}:bk001")
        assert {owned.kind for owned in mechanism.list_owned()} == {"snapshot", "clone"}
        mechanism.delete(plan)
        with Path(planned.data["path"]).open("rb") as device:
            assert device.seek(0, os.SEEK_END) == origin.size_bytes, "not the room of the snapshot that it is made of"
            device.seek(0)
            # What asks a new volume what it is (udev's blkid) leaves its begin in this host's cache.
            assert device.read(4096) == content[:4096]
        written = os.urandom(4096)
        with LunTarget(made, Account()) as duplicate:
            duplicate.write(0, [written])
            duplicate.flush()
        with mechanism.clone_reader(planned, lun) as reader:
            assert read_all(reader) == written + content[4096:]
        with Path(planned.data["path"]).open("rb"), pytest.raises(SnapshotInUse, match="in use"):
            mechanism.delete_clone(planned)
        mechanism.delete_clone(planned)
        assert volumes() == before and server.targets() == {target: [origin.address]}
        theirs = make_thick(group, "iscsi.vmsnap-x.0", 1).address
        with pytest.raises(SnapshotError, match=f"there is {theirs} on this host already"):
            mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
        notes = [finding for finding in mechanism.doctor() if finding.severity != "ok"]
        assert [(note.severity, theirs in note.message) for note in notes] == [("note", True)]
        lvm("lvremove", "--force", theirs)
        make_thick(group, "large", 48)
        with pytest.raises(SnapshotError, match=r"no room in volume group vg0 for a snapshot of /dev/vg0/vm001"):
            mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
        server.remove(target)


class Dying(Lio):
    """LIO told by the real program in processes of its own, one of which is killed before its change number `dies_at`.
    They are forked from here: to start a new Python takes seconds in this guest.
    """

    def __init__(self) -> None:
        super().__init__(LocalRunner())
        self.dies_at: int | None = None

    def _tell(self, operation: str, *, changes: bool = True, **request: Any) -> Any:
        if self.dies_at is None or not changes:
            return lio_program.OPERATIONS[operation](request)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _die_at(self.dies_at)
                lio_program.OPERATIONS[operation](request)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            raise SnapshotError("it was killed")
        assert status == 0
        return {}


def _die_at(step: int) -> None:
    """Have this process killed before so many changes of the file system."""
    left = iter(range(step))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return change

    for name in ("mkdir", "rmdir", "symlink", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    lio_program.write = counted(lio_program.write)


def _made() -> list[str]:
    """Backing stores with their adapters, begun ones too, and targets."""
    return sorted(str(path) for each in ("core/*", "core/*/*", "iscsi/*") for path in Path(lio_program.ROOT).glob(each))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("reading", ["store", "initiator"])
def test_a_pool_that_fills_up_is_relieved_of_the_snapshot_and_the_guest_goes_on(
    server: LioServer, tmp_path: Path, reading: str
) -> None:
    target = f"{AUTHORITY}:thin"
    with volume_group(tmp_path, "vg0", 64) as group:
        make_pool(group, "pool", 16)
        origin = make_thin(group, "pool", "vm001", 16)
        server.add(target, Path(origin.address))
        lun = Disk("disk0", server.address(target), origin.size_bytes)
        options = {"server": "lio", "pause_seconds": "60", "reading": reading}
        mechanism = IscsiMechanism(DriverContext(tmp_path / "state", tmp_path), options)
        before = volumes()
        write(origin.address, 0, os.urandom(8 * MIB))
        sync(origin.address)
        plan = mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
        mechanism.prepare(plan)
        (taken,) = mechanism.snapshot(plan)
        mechanism.settle([taken])
        with mechanism.reader(taken) as reader:
            reader.read_into(0, memoryview(bytearray(4096)))
            written = os.urandom(7 * MIB + MIB // 2)
            write(origin.address, 0, written[: 7 * MIB])  # 8 of 16 MiB are the snapshot's alone: 15 are used
            sync(origin.address)
            eventually(lambda: bool(mechanism.health(plan)), "it is told", 120)
            (told,) = mechanism.health(plan)
            assert told.subject == "the thin pool vg0/pool" and told.message.startswith("94% of it is used")
            reader.read_into(0, memoryview(bytearray(4096)))
            write(origin.address, 7 * MIB, written[7 * MIB :])
            sync(origin.address)
            eventually(lambda: volumes().keys() == before.keys(), "the snapshot is given up", 120)
            assert target in server.targets() and len(server.targets()) == 1
            with pytest.raises(SnapshotError, match=r"pool vg0/pool is full to 9\d%, and the snapshot was given up"):
                for at in range(0, lun.size_bytes, MIB):
                    reader.read_into(at, memoryview(bytearray(MIB)))
        write(origin.address, 8 * MIB, os.urandom(4 * MIB))  # there was no room for this
        sync(origin.address)
        assert Path(origin.address).read_bytes()[: len(written)] == written
        mechanism.delete(plan)
        write(origin.address, 12 * MIB, os.urandom(3 * MIB))
        sync(origin.address)
        with pytest.raises(SnapshotError, match=r"pool of \S+ is too full for a snapshot: 93\.75% of its data is used"):
            mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
        mechanism.close()
        assert not mechanism.list_owned()
        mechanism.close()
        server.remove(target)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", ["export", "delete"])
def test_a_killed_export_or_removal_leaves_nothing_that_a_later_removal_does_not_find(
    rig: LunRig, server: LioServer, operation: str, record_property: Callable[[str, object], None]
) -> None:
    image, notes = rig.images / "vmsnap-x~0~bk001~clone.iscsi", rig.scratch / "notes"
    image.write_bytes(bytes(SIZE))
    dying, place = Dying(), Place(HERE, (), LocalRunner(), ServerSettings())
    export, beside = Export(place, dying, f"{AUTHORITY}:bk001", str(image)), rig.lun(rig.disks()[0])
    before, steps, killed = _made(), 0, True
    while killed:
        if operation == "delete":
            Exports(notes).make(export, beside, (), "bk001", read_only=False)
        dying.dies_at = steps
        try:
            if operation == "export":
                Exports(notes).make(export, beside, (), "bk001", read_only=False)
            else:
                Exports(notes).remove(export, force=False)
            killed = False
        except SnapshotError as e:
            assert e.message == "it was killed"
            steps += 1
        dying.dies_at = None
        # As another process does it, which knows what stands in the journal and in the notes.
        Exports(notes).remove(export, force=False)
        assert _made() == before and not list(notes.iterdir()), f"killed before step {steps}"
    assert steps > 10
    record_property("counted", f"LIO, killed before each of {steps} steps of the operation {operation}")
    record_property("cases", steps)
    notes.rmdir()
