"""What goes wrong between vmsnap and a tgtd: each is one clear line, nothing is left, and nobody else's is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab.tgtd import TargetServer
from tests.lun_failures import *  # noqa: F403 -- its tests, on tgt
from tests.lun_failures import plan_of
from tests.lun_rig import SIZE, TARGETS, LunRig, rig_on
from tests.test_file_mechanism import xfs
from tests.test_iscsi_contract import server, tgtadm
from vmsnap.cli.backends import vmsnap_iscsi
from vmsnap.errors import SnapshotError, UsageError
from vmsnap.roles import DriverContext
from vmsnap.testing.snapshot import live
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism
from vmsnap_drivers.snapshots.iscsi.address import is_for_every_network

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


class Console:
    """``vmsnap-iscsi`` in this process, with a state folder and a configuration of its own."""

    def __init__(self, folder: Path, options: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
        self._state, self._capsys = folder, capsys
        self._options = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]

    def __call__(self, *words: str, status: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            vmsnap_iscsi.main([words[0], "--json", "--state-dir", str(self._state), *words[1:], *self._options])
        said = self._capsys.readouterr()
        assert (ended.value.code or 0) == status, said.err
        return json.loads(said.out) if status == 0 else said.err


def test_the_commands_of_vmsnap_iscsi(rig: LunRig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(tmp_path / "state", rig.server.options, capsys)
    address = rig.disks()[0].address
    assert {found["severity"] for found in console("doctor")} == {"ok"}
    assert "no LUN of a place that is known" in console("snapshot", "/dev/null", status=2)
    content = rig.content(rig.disks()[0])
    taken = console("snapshot", address)
    assert taken["disks"] == [{"address": address, "size_bytes": SIZE}] and taken["complete"]
    rig.write(rig.disks()[0], 0, os.urandom(4096))
    (clone,) = (disk["address"] for disk in console("clone", taken["snapshot"], "--as", "trial")["disks"])
    assert clone == rig.server.address("iqn.2009-12.com.example:trial")
    assert rig.content(replace(rig.disks()[0], address=clone)) == content
    listed = console("list")
    assert {each["kind"] for each in listed["resources"]} == {"snapshot", "clone"}
    console("delete", taken["snapshot"], "--clone", "trial")
    console("delete", taken["snapshot"])
    assert console("list") == {"snapshots": [], "resources": []}
    assert sorted(rig.server.targets()) == sorted(TARGETS)
