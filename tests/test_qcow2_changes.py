"""The mechanism qcow2 knows what has changed, on real QEMUs; and where it does not know, it says so."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_qcow2_mechanism_machine import (
    KIB,
    MIB,
    SIZE_BYTES,
    TAGS,
    WINDOWS,
    Machine,
    context,
    machine,
    mechanism,
)
from vmsnap.errors import SnapshotError, VmsnapError
from vmsnap.model import Disk, DiskSnapshot, SnapshotPlan, Window, from_json, to_json
from vmsnap.roles import DriverContext
from vmsnap_drivers.snapshots.qcow2 import Qcow2Mechanism

__all__ = ["context", "machine"]
pytestmark = pytest.mark.qemu
GRANULE = 64 * KIB


class Instant:
    """A snapshot that the guest wrote around, and what the disks held at its instant."""

    def __init__(self, driver: Qcow2Mechanism, machine: Machine, window: Window, disks: tuple[Disk, ...] = ()) -> None:
        self.driver = driver
        self.disks = disks or machine.disks()[:3]
        self.plan = driver.plan("vm001", self.disks, next(TAGS), window)
        driver.prepare(self.plan)
        machine.scribble(self.disks, 2)
        machine.pause(window)
        self.contents = [machine.content(disk) for disk in self.disks]
        self.snapshots = driver.snapshot(self.plan)
        machine.resume(window)
        machine.scribble(self.disks, 2)
        driver.settle(self.snapshots)
        machine.scribble(self.disks, 2)

    def keep(self, instead_of: Instant | None = None) -> None:
        """What follows the commit of a backup."""
        for index, snapshot in enumerate(self.snapshots):
            self.driver.keep_mark(snapshot, instead_of.snapshots[index].mark if instead_of else "")

    def changed_since(self, older: Instant, index: int) -> int:
        """See that all changes of a disk are named; returns how many bytes are."""
        brought_up = bytearray(older.contents[index])
        named = 0
        for extent in self.driver.changed_extents(self.snapshots[index], older.snapshots[index].mark):
            end = extent.offset + extent.length
            brought_up[extent.offset : end] = self.contents[index][extent.offset : end]
            named += extent.length
        assert bytes(brought_up) == self.contents[index], self.disks[index].device
        return named

    def unknown_since(self, older: Instant, index: int) -> str:
        """See that what has changed on a disk cannot be said; returns why."""
        with pytest.raises(SnapshotError) as raised:
            list(self.driver.changed_extents(self.snapshots[index], older.snapshots[index].mark))
        return raised.value.message

    def delete(self) -> None:
        self.driver.delete(from_json(to_json(self.plan), SnapshotPlan))


def bitmaps(machine: Machine, disk: Disk) -> dict[str, bool]:
    """The disk's bitmaps that have a name, past the mechanism, and whether each is persistent."""
    nodes = machine.oracle.execute("query-named-block-nodes", flat=True)
    node = next(node for node in nodes if node["node-name"] == disk.handle["node"])
    return {found["name"]: found["persistent"] for found in node.get("dirty-bitmaps", ()) if "name" in found}


def end(machine: Machine) -> None:
    """Let QEMU end in order, so that it stores its bitmaps."""
    machine.oracle.hmp("quit")
    machine.process.wait(30)
    machine.stop()


def restart(machine: Machine, *, orderly: bool) -> None:
    if orderly:
        end(machine)
    else:
        machine.stop()
    machine.start()


@pytest.fixture
def driver(context: DriverContext) -> Iterator[Qcow2Mechanism]:
    made = mechanism(context)
    yield made
    made.close()


def test_every_change_between_two_instants_is_named_and_little_else(machine: Machine, driver: Qcow2Mechanism) -> None:
    older = Instant(driver, machine, Window.FREE)
    older.keep()
    older.delete()
    for window in (*reversed(WINDOWS), *WINDOWS):
        machine.write(older.disks[1], 5 * MIB, b"once more" * 100)
        newer = Instant(driver, machine, window)
        for index, disk in enumerate(older.disks):
            assert 0 < newer.changed_since(older, index) < SIZE_BYTES // 2
            assert len(bitmaps(machine, disk)) == 2, "the kept one and the pending one, and no copy of it"
        newer.keep(older)
        newer.delete()
        for disk in older.disks:
            (persistent,) = bitmaps(machine, disk).values()
            assert persistent == (disk.format == "qcow2")
        older = newer
    unchanged = driver.plan("vm001", older.disks, next(TAGS), Window.FREE)
    driver.delete(unchanged)


def test_a_disk_that_nobody_wrote_has_not_changed(machine: Machine, driver: Qcow2Mechanism) -> None:
    def still() -> tuple[SnapshotPlan, tuple[DiskSnapshot, ...]]:
        plan = driver.plan("vm001", machine.disks(), next(TAGS), Window.FREE)
        driver.prepare(plan)
        machine.pause(Window.FREE)
        snapshots = driver.snapshot(plan)
        machine.resume(Window.FREE)
        driver.settle(snapshots)
        return plan, snapshots

    plan, first = still()
    for snapshot in first[:3]:
        driver.keep_mark(snapshot)
    assert first[3].mark == "", "nobody writes to a read-only disk"
    driver.delete(plan)
    machine.write(machine.disks()[0], 3 * MIB, bytes(512))
    plan, second = still()
    changes = [list(driver.changed_extents(new, old.mark)) for new, old in zip(second[:3], first[:3], strict=True)]
    assert [(found.offset, found.length) for found in changes[0]] == [(3 * MIB, GRANULE)]
    assert changes[1:] == [[], []]
    driver.delete(plan)


@pytest.mark.parametrize("orderly", [True, False], ids=["ended", "killed"])
def test_after_a_restart_only_a_whole_record_counts(machine: Machine, driver: Qcow2Mechanism, orderly: bool) -> None:
    first = Instant(driver, machine, Window.FREE)
    first.keep()
    first.delete()
    restart(machine, orderly=True)
    second = Instant(driver, machine, Window.NO_BLOCK_JOBS)
    assert second.changed_since(first, 1)
    assert "started anew" in second.unknown_since(first, 0)
    second.keep(first)
    second.delete()
    restart(machine, orderly=True)
    machine.scribble(machine.disks()[:3])
    restart(machine, orderly=orderly)
    disk = machine.disks()[1]
    assert len(bitmaps(machine, disk)) == 1
    third = Instant(driver, machine, Window.FREE)
    if orderly:
        assert third.changed_since(second, 1)
    else:
        third.unknown_since(second, 1)
        assert len(bitmaps(machine, disk)) == 1, "the inconsistent one, which forbids to resize the disk, is gone"
    third.keep(second)
    third.delete()
    machine.oracle.execute("block_resize", node_name=disk.handle["node"], size=SIZE_BYTES + MIB)


def test_what_qemu_s_own_tools_do_to_an_image_while_its_vm_is_off_is_recorded_or_refused(
    machine: Machine, driver: Qcow2Mechanism, tmp_path: Path
) -> None:
    first = Instant(driver, machine, Window.FREE)
    first.keep()
    first.delete()
    image = first.disks[1].address
    end(machine)
    content = bytearray(first.contents[1])
    content[MIB : 2 * MIB] = bytes(MIB)
    content[2 * MIB : 2 * MIB + 5000] = b"other" * 1000
    (tmp_path / "other").write_bytes(content)

    def qemu_img(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(machine.build.img_binary), *arguments], capture_output=True, text=True)

    converted = qemu_img("convert", "-n", "-f", "raw", "-O", "qcow2", str(tmp_path / "other"), image)
    assert converted.returncode == 0, converted.stderr
    # It would change the disk unrecorded.
    assert "dirty bitmaps" in qemu_img("snapshot", "-a", "before", image).stderr
    machine.start()
    second = Instant(driver, machine, Window.FREE)
    assert second.changed_since(first, 1)
    second.delete()


def test_an_image_that_was_written_past_qemu_is_not_trusted(
    machine: Machine, context: DriverContext, driver: Qcow2Mechanism
) -> None:
    """The overlay that QEMU left when it ended is committed by qemu-img."""
    first = Instant(driver, machine, Window.FREE)
    first.keep()
    first.delete()
    plan = driver.plan("vm001", first.disks, next(TAGS), Window.NO_BLOCK_JOBS)
    driver.prepare(plan)
    machine.pause(Window.NO_BLOCK_JOBS)
    driver.snapshot(plan)
    machine.resume(Window.NO_BLOCK_JOBS)
    machine.scribble(first.disks)
    driver.close()
    end(machine)
    mechanism(context).delete(plan)
    machine.start()
    second = Instant(driver, machine, Window.FREE)
    for index in range(3):
        second.unknown_since(first, index)
    second.delete()


def test_vmsnap_killed_while_an_overlay_is_there(
    machine: Machine, context: DriverContext, driver: Qcow2Mechanism
) -> None:
    first = Instant(driver, machine, Window.FREE)
    first.keep()
    first.delete()
    plan = driver.plan("vm001", first.disks, next(TAGS), Window.NO_BLOCK_JOBS)
    driver.prepare(plan)
    machine.pause(Window.NO_BLOCK_JOBS)
    driver.snapshot(plan)
    assert True not in bitmaps(machine, first.disks[1]).values(), "QEMU would store it in the pause"
    machine.resume(Window.NO_BLOCK_JOBS)
    machine.scribble(first.disks)
    driver.close()
    mechanism(context).delete(plan)
    assert list(bitmaps(machine, first.disks[1]).values()) == [True]
    second = Instant(driver, machine, Window.NO_BLOCK_JOBS)
    for index in range(3):
        assert second.changed_since(first, index)
    second.delete()


def test_what_was_resized_or_replaced_or_switched_off_is_said(machine: Machine, driver: Qcow2Mechanism) -> None:
    first = Instant(driver, machine, Window.FREE)
    first.keep()
    first.delete()
    resized, disk, tampered = first.disks
    machine.oracle.execute("block_resize", node_name=resized.handle["node"], size=SIZE_BYTES * 2)
    kept = next(iter(bitmaps(machine, tampered)))
    machine.oracle.execute("block-dirty-bitmap-disable", node=tampered.handle["node"], name=kept)
    second = Instant(driver, machine, Window.FREE, (replace(resized, size_bytes=2 * SIZE_BYTES), disk, tampered))
    assert "resized" in second.unknown_since(first, 0)
    assert second.changed_since(first, 1)
    second.unknown_since(first, 2)
    for mark in ("", "another mechanism's", f"{first.snapshots[1].mark}0", "vmsnap-since-0/8"):
        with pytest.raises(SnapshotError):
            list(driver.changed_extents(second.snapshots[1], mark))
    second.delete()


def test_backups_of_other_repositories_and_bitmaps_of_others(machine: Machine, context: DriverContext) -> None:
    driver = mechanism(context, bitmaps="2")
    disk = machine.disks()[1]
    others = {"node": disk.handle["node"], "name": "theirs"}
    machine.oracle.execute("block-dirty-bitmap-add", **others, persistent=True)
    instants = []
    for _ in range(3):
        instants.append(Instant(driver, machine, Window.FREE))
        instants[-1].keep()
        instants[-1].delete()
    last = Instant(driver, machine, Window.NO_BLOCK_JOBS)
    assert "other backups needed the place" in last.unknown_since(instants[0], 1)
    assert last.changed_since(instants[1], 1) > last.changed_since(instants[2], 1) > 0
    last.delete()
    listed = [owned for owned in driver.list_owned() if disk.address in owned.name]
    assert {owned.tag for owned in listed} == set(bitmaps(machine, disk)) - {"theirs"}
    driver.forget_marks("another VM")
    assert len(bitmaps(machine, disk)) == 3
    driver.forget_marks("vm001")
    driver.close()
    assert bitmaps(machine, disk) == {"theirs": True}
    assert not driver.list_owned()

    none = mechanism(context, bitmaps="0")
    without = Instant(none, machine, Window.FREE)
    assert {snapshot.mark for snapshot in without.snapshots} == {""}
    without.delete()
    none.close()
    assert bitmaps(machine, disk) == {"theirs": True}
    with pytest.raises(VmsnapError, match="bitmaps='many' is no whole number"):
        mechanism(context, bitmaps="many").plan("vm001", machine.disks(), next(TAGS), Window.FREE)


def test_marks_are_forgotten_in_the_image_of_a_vm_that_ended(machine: Machine, driver: Qcow2Mechanism) -> None:
    first = Instant(driver, machine, Window.FREE)
    first.keep()
    first.delete()
    driver.close()
    machine.oracle.hmp("quit")
    machine.process.wait(30)
    image = first.disks[1].address

    def bitmaps_in_image() -> bool:
        answer = subprocess.run(["qemu-img", "info", image], check=True, capture_output=True, text=True)
        return "vmsnap-since-" in answer.stdout

    assert bitmaps_in_image()
    driver.forget_marks("vm001")
    assert not bitmaps_in_image()
    assert not driver.list_owned()


def test_a_backup_that_broke_off_while_changes_were_read_leaves_nothing(
    machine: Machine, driver: Qcow2Mechanism
) -> None:
    first = Instant(driver, machine, Window.FREE)
    first.keep()
    first.delete()
    second = Instant(driver, machine, Window.FREE)
    changes = driver.changed_extents(second.snapshots[0], first.snapshots[0].mark)
    assert len(list(itertools.islice(changes, 1))) == 1
    second.delete()
    with contextlib.suppress(VmsnapError):  # what it would remove is gone, and so may be its monitor
        changes.close()
    assert sorted(bitmaps(machine, first.disks[0])) == sorted(mark.mark.split("/")[0] for mark in first.snapshots[:1])
    assert not Path(second.plan.data["socket"]).exists()
