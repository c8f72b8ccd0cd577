"""What goes wrong between vmsnap and a tgtd: each is one clear line, nothing is left, and nobody else's is touched."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.consoles import NOBODY, Console, as_nobody
from tests.lab.mounts import own_mounts
from tests.lab.tgtd import TargetServer
from tests.lun_failures import *  # noqa: F403 -- its tests, on tgt
from tests.lun_failures import AUTHORITY, plan_of, written_by_somebody
from tests.lun_rig import SIZE, TARGETS, LunRig, rig_on
from tests.test_file_mechanism import xfs
from tests.test_iscsi_contract import server, tgtadm
from vmsnap.cli.backends import vmsnap_iscsi
from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError
from vmsnap.roles import DriverContext
from vmsnap.testing.cloning import clone_all, clone_contents, delete_all
from vmsnap.testing.rigs import eventually
from vmsnap.testing.snapshot import live
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism, watch
from vmsnap_drivers.snapshots.iscsi.address import is_for_every_network
from vmsnap_drivers.snapshots.iscsi.files import Files
from vmsnap_drivers.snapshots.iscsi.stores import Fill

__all__ = ["server", "tgtadm", "xfs"]
pytestmark = pytest.mark.lab


@pytest.fixture
def rig(xfs: Path, server: TargetServer) -> Iterator[LunRig]:
    yield from rig_on(xfs / "rig", server, {"reading": "initiator"})


def test_a_target_server_that_died_keeps_nothing_from_being_removed(
    xfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TargetServer(tmp_path / "tgtd") as own:
        for rig in rig_on(xfs / "own", own, {}):
            life = live(rig)
            own.kill()
            with pytest.raises(SnapshotError, match="no raw LUN of a place that is known"):
                plan_of(rig)
            life.mechanism.delete(life.plan)
            assert not list(rig.images.glob("vmsnap-*"))
            own.start()


def test_what_a_backups_own_duplicate_ran_on_is_given_up_with_the_snapshot_and_what_is_kept_stays(
    rig: LunRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = Fill("the pool", 0.1)
    monkeypatch.setattr(watch, "_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(Files, "fill", lambda _files, _origin: fill)  # no pool is behind an XFS
    life = live(rig)
    mechanism = life.mechanism
    running, kept = clone_all(rig, life, "run-1"), clone_all(rig, life, "bk-1", lasting=True)
    paths = [rig.path(clone.disk) for clone in running]
    with written_by_somebody(running[0].disk.address):
        reading = mechanism.clone_reader(running[1].plan, running[1].disk)
        fill = Fill("the pool", 0.99)
        eventually(lambda: not list(rig.images.glob("vmsnap-*~snapshot.iscsi")), "the snapshots are given up", 60)
        with pytest.raises(SnapshotError, match=r"the clone .* is lost: the pool is full to 99%"):
            reading.read_into(0, memoryview(bytearray(4096)))
        reading.close()
        eventually(lambda: not paths[1].exists(), "what nobody uses any more is gone", 60)
        assert paths[0].exists(), "its VM runs"
    eventually(lambda: not paths[0].exists(), "it goes when its VM has ended", 60)
    for clone in running:
        with pytest.raises(SnapshotError, match="is lost: the pool is full to 99%"):
            mechanism.clone_reader(clone.plan, clone.disk)
    with pytest.raises(SnapshotError, match="is lost: the pool is full to 99%"):
        mechanism.clone(running[0].plan, life.snapshots[0])
    assert clone_contents(mechanism, kept) == list(life.contents)
    delete_all(mechanism, [*running, *kept])
    life.end()
    assert sorted(rig.server.targets()) == sorted(TARGETS)


def test_a_lun_that_is_read_only_is_not_written_onto(rig: LunRig, server: TargetServer) -> None:
    image, target = rig.images / "other.img", "iqn.2009-12.com.example:other"
    image.write_bytes(bytes(SIZE))
    tid = str(server.add(target, image))
    server.tell("--mode", "logicalunit", "--op", "update", "--tid", tid, "--lun", "1", "--params", "readonly=1")
    with pytest.raises(UsageError, match="other/1 is read-only"):
        rig.mechanism().writer(replace(rig.disks()[0], address=server.address(target), size_bytes=SIZE))


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "[::]"])
def test_a_tgtd_that_listens_for_every_network_is_noted(tmp_path: Path, everywhere: str) -> None:
    with TargetServer(tmp_path / "tgtd", everywhere) as own:
        own.add(TARGETS[0], None)
        mechanism = IscsiMechanism(DriverContext(tmp_path / "state", tmp_path), own.options)
        (note,) = (finding for finding in mechanism.doctor() if finding.severity == "note")
        assert (
            f"tgtd listens at {everywhere}:{own.port}, for every network, and so does what vmsnap exports"
            in note.message
        )
        assert "--iscsi portal=" in note.cure


@pytest.mark.parametrize(
    ("portal", "is_for_all"),
    [
        *((portal, True) for portal in ("0.0.0.0:3260", "[::]:3260", "[::0]:3260")),
        *((portal, False) for portal in ("10.0.0.5:3260", "[::1]:3260", "san.example:3260", "3260", "")),
    ],
)
def test_a_portal_for_every_network_is_known(portal: str, is_for_all: bool) -> None:
    assert is_for_every_network(portal) is is_for_all


def test_the_commands_of_vmsnap_iscsi(rig: LunRig, tmp_path: Path) -> None:
    console = Console(vmsnap_iscsi, tmp_path / "state", rig.server.options)
    address = rig.disks()[0].address
    assert {found["severity"] for found in console("doctor")} == {"ok"}
    assert "no LUN of a place that is known" in console("snapshot", "/dev/null", status=2)
    nobodys = rig.server.address(f"{AUTHORITY}:nobody")
    assert f"serves no LUN 1 of {AUTHORITY}:nobody" in console("snapshot", nobodys, status=3)
    content = rig.content(rig.disks()[0])
    taken = console("snapshot", address)
    assert taken["disks"] == [{"device": "disk0", "address": address, "size_bytes": SIZE}] and taken["complete"]
    rig.write(rig.disks()[0], 0, os.urandom(4096))
    (made,) = console("clone", taken["snapshot"], "--as", "trial")["disks"]
    assert made == {"device": "disk0", "address": rig.server.address(f"{AUTHORITY}:trial")}
    clone = made["address"]
    assert rig.content(replace(rig.disks()[0], address=clone)) == content
    listed = console("list")
    assert {each["kind"] for each in listed["resources"]} == {"snapshot", "clone"}
    assert listed["snapshots"][0]["clones"] == [{"name": "trial", **made}]
    with written_by_somebody(clone):
        assert "is in use by iqn." in console("delete", taken["snapshot"], "--clone", "trial", status=5)
    console("delete", taken["snapshot"], "--clone", "trial")
    console("delete", taken["snapshot"])
    assert console("list") == {"snapshots": [], "resources": []}
    assert "there is no snapshot" in console("delete", taken["snapshot"], status=3)
    assert sorted(rig.server.targets()) == sorted(TARGETS)


def test_somebody_whom_tgtd_does_not_obey_is_told_so_and_not_that_there_are_no_snapshots(
    rig: LunRig, tmp_path: Path
) -> None:
    address = rig.disks()[0].address
    ours = Console(vmsnap_iscsi, tmp_path / "state", rig.server.options)
    taken = ours("snapshot", address)["snapshot"]
    assert ours("list")["resources"]
    state = Path(tempfile.mkdtemp())
    os.chown(state, NOBODY, NOBODY)
    theirs = Console(vmsnap_iscsi, state, rig.server.options)
    for words in (("snapshot", address), ("list",)):
        said = as_nobody(partial(theirs, *words, status=6))
        assert "we may not tell tgtd of this host" in said and "run vmsnap as root" in said
    ours("delete", taken)


def test_without_qemus_module_for_iscsi_it_is_named_as_missing(rig: LunRig) -> None:
    life = live(rig)
    (module,) = Path("/usr/lib").glob("*/qemu/block-iscsi.so")
    assert "qemu-nbd" not in {found.subject for found in rig.mechanism().doctor()}
    with own_mounts():
        subprocess.run(["mount", "--bind", "/dev/null", str(module)], check=True)
        (finding,) = (found for found in rig.mechanism().doctor() if found.subject == "qemu-nbd")
        assert finding.severity == "missing" and "qemu-block-extra" in finding.cure
        for use in (
            lambda: life.mechanism.reader(life.snapshots[0]),
            lambda: life.mechanism.writer(rig.disks()[0]),
        ):
            with pytest.raises(DriverUnavailable, match="QEMU's module for iSCSI, block-iscsi, is not installed"):
                use()
    life.end()
