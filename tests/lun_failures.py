"""What goes wrong between vmsnap and whatever serves targets, tgt or LIO: each is one clear line, nothing is left, and
nobody else's is touched. Test modules take these tests over, and have a fixture ``rig`` of their own.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.consoles import as_nobody
from tests.lab.libiscsi import log_in
from tests.lun_rig import SIZE, TARGETS, LunRig
from tests.secrets_in_sight import files_with, unseen
from vmsnap.errors import Busy, DriverUnavailable, NotFound, SnapshotError, SnapshotInUse, UsageError
from vmsnap.model import Window
from vmsnap.testing.cloning import clone_all, delete_all
from vmsnap.testing.rigs import read_all
from vmsnap.testing.snapshot import contents_of, live
from vmsnap_drivers.snapshots.iscsi.lio import QEMU

AUTHORITY = "iqn.2009-12.com.example"


def plan_of(rig: LunRig, tag: str = "vmsnap-x") -> Any:
    return rig.mechanism().plan(rig.vm, rig.disks(), tag, Window.FREE)


def test_a_target_that_has_the_name_already_is_left_alone_and_reported(rig: LunRig) -> None:
    taken = "iqn.2009-12.com.example:vmsnap-x.0"
    rig.server.add(taken, None)
    before = rig.traces()
    with pytest.raises(SnapshotError, match=r"there is an iSCSI target \S+:vmsnap-x.0 already, which is left alone"):
        plan_of(rig)
    assert any(taken in finding.message and finding.severity == "note" for finding in rig.mechanism().doctor())
    assert not rig.mechanism().list_owned()
    assert rig.traces() == before


def test_a_name_that_somebody_takes_after_the_plan_fails_and_stays_somebodys(rig: LunRig) -> None:
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


def test_the_name_of_a_duplicates_lun_may_be_taken(rig: LunRig) -> None:
    taken = f"{AUTHORITY}:bk-001"
    rig.server.add(taken, None)
    life = live(rig)
    with pytest.raises(SnapshotError, match=rf"{taken} already"):
        clone_all(rig, life, "bk-001")
    clones = clone_all(rig, life, "bk-002")
    (note,) = (finding for finding in rig.mechanism().doctor() if finding.severity != "ok")
    assert note.severity == "note" and f"target {taken} is named as ours are" in note.message
    delete_all(life.mechanism, clones)
    life.end()
    assert taken in rig.server.targets()


def test_a_lun_of_a_server_that_does_not_obey_us_is_refused_and_not_left_to_others_in_silence(rig: LunRig) -> None:
    disk = rig.disks()[0]

    def refused() -> list[str]:
        mechanism = rig.mechanism()
        assert mechanism.handles(disk) and not mechanism.list_owned()
        found = [[finding.severity, finding.message, finding.cure] for finding in mechanism.doctor()]
        with pytest.raises(DriverUnavailable) as caught:
            mechanism.plan(rig.vm, rig.disks(), "vmsnap-x", Window.FREE)
        assert found == [["missing", caught.value.message, caught.value.cure]]
        return found[0]

    assert plan_of(rig)
    _, message, cure = as_nobody(refused)
    assert "we may not tell" in message and "of this host" in message
    assert "run vmsnap as root" in cure and "--mechanism DISK=qcow2" in cure


def test_a_lun_in_use_is_not_removed_and_its_user_is_named(rig: LunRig) -> None:
    life = live(rig)
    clones = clone_all(rig, life, "bk001")
    with written_by_somebody(clones[0].disk.address):
        with pytest.raises(SnapshotInUse, match=r"is in use by iqn.2008-11.org.linux-kvm"):
            delete_all(life.mechanism, clones)
        assert rig.content(clones[0].disk)[:4096] == b"\7" * 4096
    delete_all(life.mechanism, clones)
    life.end()
    assert sorted(rig.server.targets()) == sorted(TARGETS)


@contextmanager
def written_by_somebody(address: str) -> Iterator[None]:
    """QEMU's initiator has written the first 4096 bytes of a LUN, and goes on using it."""
    qemu_io = subprocess.Popen(["qemu-io", "-f", "raw", address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert qemu_io.stdin is not None and qemu_io.stdout is not None
        qemu_io.stdin.write(b"write -P 7 0 4096\n")
        qemu_io.stdin.flush()
        assert b"wrote 4096" in qemu_io.stdout.readline() + qemu_io.stdout.readline()
        yield
    finally:
        qemu_io.communicate()


def test_a_lun_is_written_onto_as_long_as_nobody_uses_it(rig: LunRig) -> None:
    disk, size_bytes = rig.disks()[0], rig.disks()[0].size_bytes
    with written_by_somebody(disk.address), pytest.raises(Busy, match=r"is in use by iqn.2008-11.org.linux-kvm"):
        rig.mechanism().writer(disk)
    before = rig.content(disk)
    missing = replace(disk, address=rig.server.address("iqn.2009-12.com.example:nobody"))
    ours = rig.images / "vmsnap-x~0~bk001~clone.iscsi"
    ours.write_bytes(bytes(size_bytes))
    rig.server.add("iqn.2009-12.com.example:bk001", ours)
    for wrong, error, message in (
        (replace(disk, size_bytes=2 * size_bytes), UsageError, f"has {size_bytes} bytes, that in the backup"),
        (missing, NotFound, "serves no LUN 1"),
        (replace(disk, address=rig.server.address("iqn.2009-12.com.example:bk001")), UsageError, "of vmsnap's own"),
        (
            replace(disk, address="iscsi://192.0.2.1/iqn.2009-12.com.example:001/1"),
            UsageError,
            "of a place that is known",
        ),
    ):
        with pytest.raises(error, match=message):
            rig.mechanism().writer(wrong)
    with rig.mechanism().writer(disk) as writer:
        with pytest.raises(Busy, match="is in use by"):
            rig.mechanism().writer(disk)
        found = bytearray(size_bytes)
        writer.read_into(0, memoryview(found))
        assert found == before
        writer.write_zeros(0, 8192)
        writer.write(size_bytes - 4096, [b"a" * 1024, b"b" * 3072])
        writer.flush()
    assert rig.content(disk) == bytes(8192) + before[8192:-4096] + b"a" * 1024 + b"b" * 3072
    assert rig.mechanism().handles(disk)
    rig.mechanism().writer(disk).close()  # whoever has closed it does not use it any more


def test_a_snapshot_takes_no_writes_and_admits_this_host_alone(rig: LunRig) -> None:
    life = live(rig)
    address = rig.server.address("iqn.2009-12.com.example:" + life.plan.tag + ".0")
    target = address.split("/")[3]
    assert rig.server.read_only(target) and rig.server.access(target) == [rig.server.this_host]
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 4096", address], capture_output=True, text=True)
    assert done.returncode and "write protected" in done.stderr
    assert contents_of(rig.mechanism(), life) == list(life.contents)
    life.end()


@pytest.mark.parametrize("initiators", ["ALL", "127.0.0.1 all", "10.0.0.1;reboot"])
def test_nobody_and_everybody_are_no_initiators(rig: LunRig, initiators: str) -> None:
    rig.options["initiators"] = initiators
    life = live(rig, "snapshot")
    with pytest.raises(UsageError, match="initiators"):
        life.mechanism.settle(life.snapshots)
    life.end()
    assert sorted(rig.server.targets()) == sorted(TARGETS)


def test_initiators_can_be_named_and_then_nobody_else_is_admitted(rig: LunRig) -> None:
    rig.options["initiators"] = "iqn.2009-12.com.example:reader"
    life = live(rig)
    assert rig.server.access(f"iqn.2009-12.com.example:{life.plan.tag}.0") == ["iqn.2009-12.com.example:reader"]
    with pytest.raises(SnapshotError, match="cannot be reached"):
        life.mechanism.reader(life.snapshots[0])
    life.end()


def test_an_export_has_the_accounts_of_its_origin_and_no_secret_comes_into_sight(
    rig: LunRig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    word = "a word of chap 12"
    for target in TARGETS:
        rig.server.remove(target)
    for index, target in enumerate(TARGETS):
        rig.server.add(target, rig.images / f"disk{index}.img", user=f"keeper{index}", password=word)
    secret = tmp_path / "secret"
    secret.write_text(word)
    caplog.set_level("DEBUG")
    with unseen(word):
        life = live(rig)
        with pytest.raises(SnapshotError, match="cannot be reached"):
            life.mechanism.reader(life.snapshots[0])
        rig.options |= {"chap_user": "keeper0", "chap_password_file": str(secret)}
        with rig.mechanism().reader(life.snapshots[0]) as reader:
            assert read_all(reader) == life.contents[0]
        clones = clone_all(rig, life, "bk001")
        with rig.mechanism().clone_reader(clones[0].plan, clones[0].disk) as reader:
            assert read_all(reader) == life.contents[0]
        delete_all(life.mechanism, clones)
        with rig.mechanism().writer(rig.disks()[0]) as writer:
            writer.write_zeros(0, 4096)
        life.end()
        rig.options["chap_password_file"] = str(tmp_path / "other")
        (tmp_path / "other").write_text("another word 12")
        with pytest.raises(SnapshotError) as refused:
            rig.mechanism().writer(rig.disks()[0])
    assert "cannot be reached" in refused.value.message and "\n" not in str(refused.value)
    assert files_with(word, rig.context.state_dir) == [] and word not in caplog.text


def test_an_export_shows_who_it_is_as_its_origin_does(rig: LunRig, tmp_path: Path) -> None:
    """CHAP of both ways. QEMU's initiator does not ask for that, and is let in as before."""
    account, shown = ("keeper", "a word of chap 12"), ("storage", "its own word 34")
    for index, target in enumerate(TARGETS):
        rig.server.remove(target)
        user, password = account
        rig.server.add(target, rig.images / f"disk{index}.img", user=user, password=password, shown=shown)
    secret = tmp_path / "secret"
    secret.write_text(account[1])
    rig.options |= {"chap_user": account[0], "chap_password_file": str(secret)}
    life = live(rig)
    clones = clone_all(rig, life, "bk001")
    snapshot = rig.server.address(f"iqn.2009-12.com.example:{life.plan.tag}.0")
    for address in (rig.disks()[0].address, snapshot, clones[0].disk.address):
        assert log_in(address, QEMU, account, shown) == ""
        assert "CHAP" in log_in(address, QEMU, account, (shown[0], "another word 56")), "it does not show who it is"
    assert contents_of(rig.mechanism(), life) == list(life.contents)
    delete_all(life.mechanism, clones)
    life.end()


def test_what_cannot_be_snapshotted_where_it_lies_is_refused_before_anything_is_made(
    rig: LunRig, tmp_path: Path
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


def test_a_plan_that_names_others_removes_nothing(rig: LunRig) -> None:
    life = live(rig)
    before = rig.traces()
    (first, second) = life.plan.data["luns"]
    for forged in (
        {**first, "snapshot": first["origin"]},
        {**first, "target": TARGETS[0]},
        {**first, "origin": str(rig.images / "../images/disk0.img")},
        {**first, "kind": "other"},
        {**first, "server": "other"},
    ):
        with pytest.raises(SnapshotError, match=r"no snapshot of it|none of the mechanism iscsi|the server 'other'"):
            life.mechanism.delete(replace(life.plan, data={"luns": [forged, second]}))
    assert rig.traces() == before
    life.end()
