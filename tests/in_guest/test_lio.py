"""The mechanism ``iscsi`` on LIO, the target in Linux: its contract, and what goes wrong. Targets are made by rtslib as
their users make them; files lie on a real XFS.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disk_rig import sync, write
from tests.in_guest.volumes import make_thick, run, volume_group, volumes
from tests.lab.appliance import lio_library
from tests.lab.lio import QEMU, LioServer
from tests.lun_failures import *  # noqa: F403 -- its tests, on LIO
from tests.lun_failures import plan_of
from tests.lun_rig import SIZE, TARGETS, LunRig, rig_on
from tests.test_file_mechanism import xfs
from vmsnap.errors import SnapshotError, UsageError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap.testing.cloning import clone_all, delete_all
from vmsnap.testing.rigs import read_all
from vmsnap.testing.snapshot import SnapshotContract, live
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism, lio_program
from vmsnap_drivers.snapshots.iscsi.exports import Export, Exports
from vmsnap_drivers.snapshots.iscsi.lio import Lio
from vmsnap_drivers.snapshots.iscsi.places import HERE, Place, ServerSettings

__all__ = ["xfs"]
pytestmark = pytest.mark.storage
AUTHORITY = "iqn.2009-12.com.example"


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


def test_initiators_are_names_to_lio(rig: LunRig) -> None:
    rig.options["initiators"] = "127.0.0.1"
    life = live(rig, "snapshot")
    with pytest.raises(UsageError, match="knows initiators by their names"):
        life.mechanism.settle(life.snapshots)
    life.end()


def test_a_target_that_listens_for_everybody_is_noted(rig: LunRig, server: LioServer) -> None:
    everywhere = LioServer(lio_library(), "0.0.0.0:3300")
    everywhere.add(f"{AUTHORITY}:open", rig.images / "disk0.img")
    notes = [finding for finding in rig.mechanism().doctor() if finding.severity == "note"]
    assert len(notes) == 1 and "LIO listens at 0.0.0.0:3300, for every network" in notes[0].message
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
        assert mechanism.clone(planned, snapshot).address == server.address(f"{AUTHORITY}:bk001")
        assert {owned.kind for owned in mechanism.list_owned()} == {"snapshot", "clone"}
        mechanism.delete(plan)
        with mechanism.clone_reader(planned, lun) as reader:
            assert read_all(reader) == content
        mechanism.delete_clone(planned)
        assert volumes() == before and server.targets() == {target: [origin.address]}
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


@pytest.mark.timeout(240)
@pytest.mark.parametrize("operation", ["export", "delete"])
def test_a_killed_export_or_removal_leaves_nothing_that_a_later_removal_does_not_find(
    rig: LunRig, server: LioServer, operation: str, record_property: Callable[[str, object], None]
) -> None:
    image, notes = rig.images / "vmsnap-x~0~bk001~clone.iscsi", rig.scratch / "notes"
    image.write_bytes(bytes(SIZE))
    dying, place = Dying(), Place(HERE, "", LocalRunner(), ServerSettings())
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
