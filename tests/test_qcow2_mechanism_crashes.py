"""The disk of the guest outlives crashes: of vmsnap, of QEMU, of both, at every step of an overlay's life."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_qcow2_mechanism_machine import (
    MIB,
    SIZE_BYTES,
    TAGS,
    WINDOWS,
    Machine,
    await_true,
    context,
    machine,
    mechanism,
    run_until,
)
from vmsnap.errors import SnapshotError, VmGone
from vmsnap.model import Disk, DiskSnapshot, SnapshotPlan, Window, to_json
from vmsnap.roles import DriverContext
from vmsnap_drivers.snapshots.qcow2 import Qcow2Mechanism
from vmsnap_drivers.snapshots.qcow2.names import PlanNames

__all__ = ["context", "machine"]
pytestmark = pytest.mark.qemu

CLIENT = """
import os, pathlib, sys
from vmsnap.model import SnapshotPlan, from_json
from vmsnap.roles import DriverContext
from vmsnap_drivers.snapshots.qcow2 import Qcow2Mechanism
driver = Qcow2Mechanism(DriverContext(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1])), {})
plan = from_json(sys.stdin.read(), SnapshotPlan)
driver.prepare(plan)
driver.snapshot(plan)
os.kill(os.getpid(), 9)
"""


def overlaid(machine: Machine, context: DriverContext) -> tuple[Qcow2Mechanism, SnapshotPlan, tuple[DiskSnapshot, ...]]:
    """A guest that writes to overlays, some of it flushed to them."""
    driver = mechanism(context)
    plan, snapshots = run_until("snapshot", driver, machine, Window.NO_BLOCK_JOBS)
    driver.close()
    return driver, plan, snapshots


def offline_content(machine: Machine, disk: Disk) -> bytes:
    return machine.convert(Path(disk.address), disk.format)


def files(machine: Machine) -> list[str]:
    return sorted(path.name for path in machine.folder.iterdir())


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.value)
def test_vmsnap_killed_with_the_snapshot_taken(machine: Machine, context: DriverContext, window: Window) -> None:
    before = machine.traces()
    disks = machine.disks()
    driver = mechanism(context)
    plan = driver.plan("vm001", disks, next(TAGS), window)
    driver.close()
    machine.pause(window)
    argv = [sys.executable, "-c", CLIENT, str(context.state_dir)]
    assert subprocess.run(argv, input=to_json(plan), text=True, check=False).returncode == -9
    machine.resume(window)
    machine.scribble(disks)
    now = [machine.content(disk) for disk in disks]
    mechanism(context).delete(plan)
    assert [machine.content(disk) for disk in disks] == now
    assert machine.traces() == before
    assert not driver.list_owned()


def test_qemu_killed_while_the_snapshot_is_read(machine: Machine, context: DriverContext) -> None:
    before = files(machine)
    disks = machine.disks()
    driver = mechanism(context)
    plan, snapshots = run_until("settle", driver, machine, Window.FREE)
    now = [machine.content(disk) for disk in disks]
    with driver.reader(snapshots[0]) as reader:
        machine.kill()
        begun = time.monotonic()
        with pytest.raises((SnapshotError, VmGone)):
            reader.read_into(0, memoryview(bytearray(MIB)))
        with pytest.raises((SnapshotError, VmGone)):
            driver.reader(snapshots[1])
        assert time.monotonic() - begun < 30, "a read that nobody answers is given up after 60 seconds"
    for _ in range(2):
        driver.delete(plan)
        assert files(machine) == before
    assert [offline_content(machine, disk) for disk in disks] == now
    driver.close()


@pytest.mark.parametrize("restarted", [False, True], ids=["dead", "started-again"])
def test_qemu_killed_while_the_guest_writes_to_overlays(
    machine: Machine, context: DriverContext, restarted: bool
) -> None:
    before = files(machine)
    disks = machine.disks()
    driver, plan, _ = overlaid(machine, context)
    now = [machine.content(disk) for disk in disks]
    machine.kill()
    machine.oracle.close()
    assert [offline_content(machine, disk) for disk in disks[:3]] != now[:3]
    if restarted:
        machine.start()
        with pytest.raises(SnapshotError, match="lock"):
            driver.delete(plan)
        machine.stop()
    driver.delete(plan)
    assert files(machine) == before
    assert [offline_content(machine, disk) for disk in disks] == now
    assert not driver.list_owned()


def test_a_disk_that_was_used_since_is_not_mixed_with_its_overlay(machine: Machine, context: DriverContext) -> None:
    disks = machine.disks()
    driver, plan, _ = overlaid(machine, context)
    machine.flush()
    machine.kill()
    machine.oracle.close()
    machine.start()
    machine.scribble([disks[0]], 2)
    machine.flush()
    used = offline_content(machine, disks[0])
    machine.stop()
    overlay = Path(PlanNames.of(plan).disks[0].overlay_file)
    kept = overlay.read_bytes()
    for _ in range(2):
        with pytest.raises(SnapshotError, match=r"is kept: .* was written to after it") as raised:
            driver.delete(plan)
        assert f"qemu-img commit {overlay}" in raised.value.cure
        assert overlay.read_bytes() == kept
        assert offline_content(machine, disks[0]) == used
    assert {path for path in files(machine) if plan.tag in path} == {overlay.name, f"{plan.tag}.plan.json"}
    overlay.unlink()
    driver.delete(plan)
    assert not driver.list_owned()


def test_qemu_killed_in_the_middle_of_a_commit(machine: Machine, context: DriverContext) -> None:
    before = files(machine)
    disks = machine.disks()
    driver, plan, _ = overlaid(machine, context)
    machine.write(disks[0], 0, machine.random.randbytes(8 * MIB))
    now = [machine.content(disk) for disk in disks]
    own = PlanNames.of(plan).disks[0]
    Path(own.overlay_file).rename(own.committing_file)
    job = {"job_id": own.commit_job, "device": own.overlay, "base_node": disks[0].handle["node"], "speed": 256 * 1024}
    machine.oracle.execute("block-commit", **job)
    await_true(lambda: machine.oracle.execute("query-block-jobs")[0]["offset"] > 0, "the commit's first bytes")
    machine.kill()
    driver.delete(plan)
    assert files(machine) == before
    assert [offline_content(machine, disk) for disk in disks] == now


def test_a_commit_that_a_dead_vmsnap_began_is_ended_by_the_next(machine: Machine, context: DriverContext) -> None:
    before = machine.traces()
    disks = machine.disks()
    driver, plan, _ = overlaid(machine, context)
    own = PlanNames.of(plan).disks[0]
    Path(own.overlay_file).rename(own.pivoting_file)
    arguments = {"job_id": own.commit_job, "device": own.overlay, "base_node": disks[0].handle["node"]}
    machine.oracle.execute("block-commit", **arguments)
    machine.scribble(disks)
    now = [machine.content(disk) for disk in disks]
    driver.delete(plan)
    assert [machine.content(disk) for disk in disks] == now
    assert machine.traces() == before


@pytest.mark.parametrize("complete", [True, False])
def test_both_dead_in_the_moment_of_going_back(machine: Machine, context: DriverContext, complete: bool) -> None:
    disks = machine.disks()
    driver, plan, _ = overlaid(machine, context)
    machine.flush()
    machine.kill()
    own = PlanNames.of(plan).disks[0]
    base = Path(disks[0].address)
    if complete:
        subprocess.run(["qemu-img", "commit", "-q", "-d", own.overlay_file], check=True)
    content = base.read_bytes()
    Path(own.overlay_file).rename(own.pivoting_file)
    if complete:
        driver.delete(plan)
        assert not Path(own.pivoting_file).exists()
    else:
        with pytest.raises(SnapshotError, match="is kept: QEMU died in the moment"):
            driver.delete(plan)
        assert Path(own.pivoting_file).exists()
    assert base.read_bytes() == content
    assert len(content) == SIZE_BYTES


def test_an_overlay_that_somebody_runs_on_is_left_alone(machine: Machine, context: DriverContext) -> None:
    driver, plan, _ = overlaid(machine, context)
    machine.flush()
    machine.kill()
    overlay = PlanNames.of(plan).disks[0].overlay_file
    socket = machine.folder.parent / "other.sock"
    other = subprocess.Popen(["qemu-nbd", "-t", "-k", str(socket), "-f", "qcow2", overlay], start_new_session=True)
    # Its socket is there before it opens the image, and locks it.
    served = ["qemu-img", "info", f"nbd+unix:///?socket={socket}"]
    try:
        await_true(lambda: subprocess.run(served, capture_output=True).returncode == 0, "the other program")
        with pytest.raises(SnapshotError, match="lock"):
            driver.delete(plan)
        assert Path(overlay).exists()
    finally:
        other.kill()
        other.wait()
    driver.delete(plan)
    assert not Path(overlay).exists()
