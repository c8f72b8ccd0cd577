"""What goes wrong between vmsnap and a tgtd: each is one clear line, nothing is left, and nobody else's is touched."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab.tgtd import TargetServer
from tests.test_file_mechanism import xfs
from tests.test_iscsi_contract import SIZE, TARGETS, IscsiRig, rig_on, server, tgtadm
from vmsnap.cli.backends import vmsnap_iscsi
from vmsnap.errors import SnapshotError, UsageError
from vmsnap.model import Window
from vmsnap.testing.cloning import clone_all, delete_all
from vmsnap.testing.rigs import read_all
from vmsnap.testing.snapshot import contents_of, live

__all__ = ["server", "tgtadm", "xfs"]
pytestmark = pytest.mark.lab


@pytest.fixture
def rig(xfs: Path, server: TargetServer) -> Iterator[IscsiRig]:
    yield from rig_on(xfs / "rig", server, {"reading": "initiator"})


def plan_of(rig: IscsiRig, tag: str = "vmsnap-x") -> Any:
    return rig.mechanism().plan(rig.vm, rig.disks(), tag, Window.FREE)


def test_a_target_that_has_the_name_already_is_left_alone_and_reported(rig: IscsiRig) -> None:
    taken = "iqn.2009-12.com.example:vmsnap-x.0"
    rig.server.add(taken, None)
    before = rig.traces()
    with pytest.raises(SnapshotError, match=r"there is an iSCSI target \S+:vmsnap-x.0 already, which is left alone"):
        plan_of(rig)
    assert any(taken in finding.message and finding.severity == "note" for finding in rig.mechanism().doctor())
    assert not rig.mechanism().list_owned()
    assert rig.traces() == before


def test_a_name_that_somebody_takes_after_the_plan_fails_and_stays_somebodys(rig: IscsiRig) -> None:
    life = live(rig, "snapshot", tag="vmsnap-x")
    taken = "iqn.2009-12.com.example:vmsnap-x.1"
    other = rig.images / "somebody.img"
    other.write_bytes(bytes(SIZE))
    rig.server.add(taken, other)
    with pytest.raises(SnapshotError, match=r"vmsnap-x.1 already"):
        life.mechanism.settle(life.snapshots)
    life.end()
    assert rig.server.targets()[taken] == [str(other)]
    assert sorted(rig.server.targets()) == sorted([*TARGETS, taken])
    assert not list(rig.images.glob("vmsnap-*"))


def test_the_name_of_a_duplicates_lun_may_be_taken(rig: IscsiRig) -> None:
    rig.server.add("iqn.2009-12.com.example:bk001", None)
    life = live(rig)
    with pytest.raises(SnapshotError, match=r"iqn.2009-12.com.example:bk001 already"):
        clone_all(rig, life, "bk001")
    life.end()
    assert "iqn.2009-12.com.example:bk001" in rig.server.targets()


def test_a_lun_in_use_is_not_removed_and_its_user_is_named(rig: IscsiRig) -> None:
    life = live(rig)
    clones = clone_all(rig, life, "bk001")
    qemu_io = subprocess.Popen(
        ["qemu-io", "-f", "raw", clones[0].disk.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert qemu_io.stdin is not None and qemu_io.stdout is not None
        qemu_io.stdin.write(b"write -P 7 0 4096\n")
        qemu_io.stdin.flush()
        assert b"wrote 4096" in qemu_io.stdout.readline() + qemu_io.stdout.readline()
        with pytest.raises(SnapshotError, match=r"is in use by iqn.2008-11.org.linux-kvm"):
            delete_all(life.mechanism, clones)
        assert rig.content(clones[0].disk)[:4096] == b"\7" * 4096
    finally:
        qemu_io.communicate()
    delete_all(life.mechanism, clones)
    life.end()
    assert sorted(rig.server.targets()) == sorted(TARGETS)


def test_a_snapshot_takes_no_writes_and_admits_this_host_alone(rig: IscsiRig) -> None:
    life = live(rig)
    address = rig.server.address("iqn.2009-12.com.example:" + life.plan.tag + ".0")
    about = rig.server.about(address.split("/")[3])
    assert "Readonly: Yes" in about and about.rstrip().endswith("ACL information:\n        127.0.0.1")
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 4096", address], capture_output=True, text=True)
    assert done.returncode and "write protected" in done.stderr
    assert contents_of(rig.mechanism(), life) == list(life.contents)
    life.end()


@pytest.mark.parametrize("initiators", ["ALL", "127.0.0.1 all", "10.0.0.1;reboot"])
def test_nobody_and_everybody_are_no_initiators(rig: IscsiRig, initiators: str) -> None:
    rig.options["initiators"] = initiators
    life = live(rig, "snapshot")
    with pytest.raises(UsageError, match="initiators"):
        life.mechanism.settle(life.snapshots)
    life.end()
    assert sorted(rig.server.targets()) == sorted(TARGETS)


def test_initiators_can_be_named_and_then_nobody_else_is_admitted(rig: IscsiRig) -> None:
    rig.options["initiators"] = "iqn.2009-12.com.example:reader"
    life = live(rig)
    about = rig.server.about(f"iqn.2009-12.com.example:{life.plan.tag}.0")
    assert about.split("ACL information:")[1].split() == ["iqn.2009-12.com.example:reader"]
    with pytest.raises(SnapshotError, match="cannot be reached"):
        life.mechanism.reader(life.snapshots[0])
    life.end()


def test_an_export_has_the_accounts_of_its_origin_and_no_secret_stands_in_a_command_line(
    rig: IscsiRig, tmp_path: Path
) -> None:
    word = "a word of chap 12"
    for target in TARGETS:
        rig.server.remove(target)
    for index, target in enumerate(TARGETS):
        rig.server.add(target, rig.images / f"disk{index}.img", user=f"keeper{index}", password=word)
    life = live(rig)
    with pytest.raises(SnapshotError, match="cannot be reached"):
        life.mechanism.reader(life.snapshots[0])
    secret = tmp_path / "secret"
    secret.write_text(word)
    rig.options |= {"chap_user": "keeper0", "chap_password_file": str(secret)}
    with rig.mechanism().reader(life.snapshots[0]) as reader:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _is_readable(path)]
        assert any(b"qemu-nbd" in line and str(secret).encode() in line for line in lines)
        assert not any(word.encode() in line for line in lines)
        assert read_all(reader) == life.contents[0]
    life.end()


def _is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


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


def test_what_cannot_be_snapshotted_where_it_lies_is_refused_before_anything_is_made(
    rig: IscsiRig, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.img"
    elsewhere.write_bytes(bytes(SIZE))
    rig.server.add("iqn.2009-12.com.example:elsewhere", elsewhere)
    disk = rig.disks()[0]
    cases = [
        ("iqn.2009-12.com.example:elsewhere", SIZE, "where a file cannot be snapshotted"),
        ("iqn.2009-12.com.example:nobody", SIZE, "serves no LUN 1"),
        (TARGETS[0], SIZE * 2, "has 2097152 bytes for the VM, and 1048576 where it lies"),
    ]
    before = rig.traces()
    for target, size_bytes, message in cases:
        wrong = replace(disk, address=rig.server.address(target), size_bytes=size_bytes)
        with pytest.raises(SnapshotError, match=message):
            rig.mechanism().plan(rig.vm, [wrong], "vmsnap-x", Window.FREE)
    assert rig.traces() == before


def test_a_plan_that_names_others_removes_nothing(rig: IscsiRig) -> None:
    life = live(rig)
    before = rig.traces()
    (first, second) = life.plan.data["luns"]
    for forged in (
        {**first, "snapshot": first["origin"]},
        {**first, "target": TARGETS[0]},
        {**first, "origin": str(rig.images / "../images/disk0.img")},
        {**first, "kind": "other"},
    ):
        with pytest.raises(SnapshotError, match=r"no snapshot of it|none of the mechanism iscsi"):
            life.mechanism.delete(replace(life.plan, data={"luns": [forged, second]}))
    assert rig.traces() == before
    life.end()


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


def test_the_commands_of_vmsnap_iscsi(rig: IscsiRig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(tmp_path / "state", {"control_port": str(rig.server.control_port)}, capsys)
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
