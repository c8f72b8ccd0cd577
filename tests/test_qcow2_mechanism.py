"""Snapshots by QEMU's block layer, on real QEMUs: what they show, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Sequence
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
    run_until,
)
from vmsnap.errors import Busy, SnapshotError, VmsnapError
from vmsnap.model import Disk, SnapshotPlan, Window, from_json, to_json
from vmsnap.roles import DriverContext
from vmsnap.testing.rigs import read_all

__all__ = ["context", "machine"]
pytestmark = pytest.mark.qemu
THROTTLE = {"throttle-group": "group0"}
STEPS = ("plan", "prepare", "snapshot", "settle", "read")


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.value)
def test_the_snapshot_shows_the_instant_and_the_disk_goes_on(
    machine: Machine, context: DriverContext, window: Window
) -> None:
    before = machine.traces()
    disks = machine.disks()
    driver = mechanism(context)
    for _ in range(2):
        plan = from_json(to_json(driver.plan("vm001", disks, next(TAGS), window)), SnapshotPlan)
        driver.prepare(plan)
        machine.scribble(disks)
        machine.pause(window)
        at_the_instant = [machine.content(disk) for disk in disks]
        snapshots = driver.snapshot(plan)
        machine.resume(window)
        machine.scribble(disks)
        driver.settle(snapshots)
        assert not list(machine.folder.glob("*.overlay*"))
        machine.scribble(disks)
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(driver.reader(snapshot)) for snapshot in snapshots]
            for reader, disk, expected in zip(readers, disks, at_the_instant, strict=True):
                machine.scribble([disk])
                assert read_all(reader) == expected, disk.device
        now = [machine.content(disk) for disk in disks]
        assert all(a != b for a, b in zip(now[:3], at_the_instant, strict=False))
        driver.delete(plan)
        assert [machine.content(disk) for disk in disks] == now
        assert machine.traces() == before
        assert machine.disks() == disks
    assert not list((context.state_dir / "qcow2").iterdir())
    driver.close()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.value)
def test_delete_after_any_step_leaves_nothing(
    machine: Machine, context: DriverContext, window: Window, step: str
) -> None:
    before = machine.traces()
    disks = machine.disks()
    driver = mechanism(context)
    plan, _ = run_until(step, driver, machine, window)
    driver.close()
    now = [machine.content(disk) for disk in disks]
    for _ in range(2):
        fresh = mechanism(context)
        fresh.delete(from_json(to_json(plan), SnapshotPlan))
        fresh.close()
        assert [machine.content(disk) for disk in disks] == now
        assert machine.traces() == before
        assert not fresh.list_owned()
    machine.scribble(disks)


def test_what_is_there_is_listed_private_and_tagged(machine: Machine, context: DriverContext) -> None:
    driver = mechanism(context)
    plan, _ = run_until("snapshot", driver, machine, Window.NO_BLOCK_JOBS)
    listed = mechanism(context).list_owned()
    assert {resource.kind for resource in listed} == {"record", "socket", "old blocks", "overlay"}
    for resource in listed:
        assert resource.tag == plan.tag
        assert plan.tag in resource.name
        assert Path(resource.name).stat().st_mode & 0o077 == 0
    names = [node["node-name"] for node in machine.oracle.execute("query-named-block-nodes", flat=True)]
    assert all(len(name) <= 31 for name in names)
    driver.delete(plan)
    assert not driver.list_owned()
    driver.close()


def test_a_snapshot_that_runs_full_is_lost_and_the_guest_is_not(
    machine: Machine, context: DriverContext, tmp_path: Path
) -> None:
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90M", "tmpfs", str(tiny)], check=True)
    try:
        driver = mechanism(context, folder=str(tiny))
        disks = machine.disks()
        machine.write(disks[0], 0, machine.random.randbytes(SIZE_BYTES))
        plan, snapshots = run_until("settle", driver, machine, Window.FREE)
        with (tiny / "filler").open("wb") as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(64 * KIB))
                filler.flush()
        written = machine.random.randbytes(SIZE_BYTES)
        machine.write(disks[0], 0, written)
        assert machine.content(disks[0]).startswith(written)
        assert machine.oracle.status() == "running"
        with driver.reader(snapshots[0]) as reader, pytest.raises(SnapshotError, match="lost"):
            read_all(reader)
        driver.delete(plan)
        assert machine.content(disks[0]).startswith(written)
        assert [path.name for path in tiny.iterdir()] == ["filler"]
        driver.close()
    finally:
        subprocess.run(["umount", "-l", str(tiny)], check=True)
        shutil.rmtree(tiny)


def test_what_cannot_be_done_is_said_before_anything_is_made(
    machine: Machine, context: DriverContext, tmp_path: Path
) -> None:
    before = machine.traces()
    disks = machine.disks()
    driver = mechanism(context)

    def refused(match: str, disks: Sequence[Disk] = disks, tag: str = "vmsnap-x", **options: str) -> None:
        other = mechanism(context, **options)
        with pytest.raises(VmsnapError, match=match):
            other.plan("vm001", disks, tag, Window.FREE)
        other.close()

    disk = disks[0]
    refused(f"has {SIZE_BYTES} bytes now", [replace(disk, size_bytes=MIB)])
    refused("no block node nowhere", [replace(disk, handle={**disk.handle, "node": "nowhere"})])
    refused("block job or filter", [replace(disk, format="qcow2")])
    refused("no device gone", [replace(disk, handle={**disk.handle, "qdev": "gone"})])
    refused("none that QEMU's block layer", [replace(disk, format="vmdk")])
    refused("those of one VM", [disk, replace(disk, handle={**disk.handle, "qmp": "/nowhere"})])
    refused("no QMP socket", [replace(disk, handle={**disk.handle, "qmp": "/nowhere"})])
    refused("not a valid tag", tag="vmsnap-../x")
    refused("does not begin", tag="mine")
    refused("is no folder", folder=str(tmp_path / "none"))
    refused("no whole number", copy_seconds="-1")
    refused("is not installed", qemu_img="/nowhere/qemu-img")
    machine.oracle.execute("blockdev-add", driver="throttle", node_name="other", file=disk.handle["node"], **THROTTLE)
    machine.oracle.execute("qom-set", path=disk.handle["qdev"], property="drive", value="other")
    refused("covered by the block node other")
    machine.oracle.execute("qom-set", path=disk.handle["qdev"], property="drive", value=disk.handle["node"])
    machine.oracle.execute("blockdev-del", node_name="other")
    plan = driver.plan("vm001", disks, "vmsnap-x", Window.FREE)
    assert machine.traces() == before
    assert not (context.state_dir / "qcow2").exists()

    machine.oracle.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
    with pytest.raises(Busy, match="NBD server is in use"):
        driver.prepare(plan)
    driver.delete(plan)
    assert (tmp_path / "nbd").exists()
    machine.oracle.execute("nbd-server-stop")
    driver.prepare(plan)
    with pytest.raises(SnapshotError, match="executes"):
        driver.snapshot(plan)
    driver.delete(plan)
    assert machine.traces() == before
    driver.close()


def test_no_room_is_said_with_its_cure(machine: Machine, context: DriverContext, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(tiny)], check=True)
    try:
        driver = mechanism(context, folder=str(tiny))
        with pytest.raises(SnapshotError, match=f"{tiny} has 1 MiB free, the snapshot needs 28 MiB") as raised:
            driver.plan("vm001", machine.disks(), "vmsnap-x", Window.FREE)
        assert "-o folder=" in raised.value.cure
        driver.close()
    finally:
        subprocess.run(["umount", "-l", str(tiny)], check=True)


def test_doctor_names_what_is_missing(context: DriverContext) -> None:
    assert [finding.severity for finding in mechanism(context).doctor()] == ["ok"]
    (finding,) = mechanism(context, qemu_img="/nowhere/qemu-img").doctor()
    assert finding.severity == "missing" and "qemu-utils" in finding.cure
