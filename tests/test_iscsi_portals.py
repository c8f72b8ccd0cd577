"""Which server's LUN it is that several portals of this host have; and what cannot be reflinked after all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.tgtd import TargetServer
from tests.lab.xfs import mounted_xfs
from tests.lun_failures import plan_of
from tests.lun_rig import SIZE, TARGETS, LunRig, rig_on
from tests.test_file_mechanism import xfs
from tests.test_iscsi_contract import server, tgtadm
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Window
from vmsnap.testing.snapshot import live
from vmsnap_drivers.snapshots.iscsi.address import is_at, parse

__all__ = ["server", "tgtadm", "xfs"]
pytestmark = pytest.mark.lab


@pytest.fixture
def rig(xfs: Path, server: TargetServer) -> Iterator[LunRig]:
    yield from rig_on(xfs / "rig", server, {})


def test_a_lun_of_another_server_with_the_same_name_is_not_taken(
    rig: LunRig, server: TargetServer, xfs: Path, tmp_path: Path
) -> None:
    other = xfs / "other.img"
    other.write_bytes(bytes(SIZE))
    with TargetServer(tmp_path / "second") as second:
        second.add(TARGETS[0], other)
        lun = Disk("disk0", second.address(TARGETS[0]), SIZE)
        mechanism = rig.mechanism()
        told = rf"{TARGETS[0]} of this host is not at {second.portal}, but at {server.portal}: what is there is another"
        with pytest.raises(SnapshotError, match=told) as caught:
            mechanism.plan("vm001", [lun], "vmsnap-x", Window.FREE)
        assert "control_port" in caught.value.cure
        with pytest.raises(SnapshotError, match=told):
            mechanism.writer(lun)
        rig.options["control_port"] = str(second.control_port)
        assert rig.mechanism().plan("vm001", [lun], "vmsnap-x", Window.FREE).data["luns"][0]["origin"] == str(other)
    other.unlink()


def test_a_file_that_cannot_be_reflinked_is_found_out_before_anything_is_paused(
    server: TargetServer, tmp_path: Path
) -> None:
    with mounted_xfs(tmp_path, reflink=False) as old:
        for rig in rig_on(old / "rig", server, {}):
            mechanism, plan = rig.mechanism(), plan_of(rig)
            with pytest.raises(SnapshotError, match=r"cp failed: .*failed to clone .*Operation not supported"):
                mechanism.prepare(plan)
            mechanism.delete(plan)
            assert not list(rig.images.glob("vmsnap-*"))


def test_what_is_tried_before_takes_nothing_from_what_is_taken(rig: LunRig) -> None:
    before = rig.content(rig.disks()[0])
    life = live(rig)
    with life.mechanism.reader(life.snapshots[0]) as reader:
        found = bytearray(SIZE)
        reader.read_into(0, memoryview(found))
    assert bytes(found) == before
    life.end()


@pytest.mark.parametrize(
    ("portals", "there"),
    [
        (["10.0.0.5:3260"], True),
        (["10.0.0.5:3261"], False),
        (["10.0.0.6:3260"], False),
        (["0.0.0.0:3260"], True),
        (["[::]:3260"], True),
        (["[fe80::1]:3260", "10.0.0.5:3260"], True),
        ([], False),
    ],
)
def test_where_a_server_listens(portals: list[str], there: bool) -> None:
    lun = parse("iscsi://10.0.0.5/iqn.2009-12.com.example:001/1")
    assert lun is not None and is_at(lun, portals) is there


def test_of_a_portal_with_a_name_the_port_is_told() -> None:
    lun = parse("iscsi://localhost:3262/iqn.2009-12.com.example:001/1")
    assert lun is not None and is_at(lun, ["127.0.0.1:3262"]) and not is_at(lun, ["127.0.0.1:3260"])
