"""The guardian, with workers that die or hang: whatever happens to the worker, the guest runs again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmsnap.guardian import Charge, Guardian
from vmsnap.host import HostFolders
from vmsnap.model import VmState
from vmsnap_drivers.hypervisors.simulated import SimulatedHypervisor, lifecycle

WORKER = """
import os, sys, time
from pathlib import Path
from vmsnap.guardian import start_for
from vmsnap.host import HostFolders
from vmsnap_drivers.hypervisors.simulated import SimulatedHypervisor

context = HostFolders.find(Path(sys.argv[1])).context()
guard = start_for(context, "vm001", "simulated", {})
hypervisor = SimulatedHypervisor("vm001", context, {})
guard.arm(float(sys.argv[2]))
hypervisor.pause()
print("paused", flush=True)
exec(sys.argv[3])
"""


@pytest.fixture
def vm(folders: HostFolders, tmp_path: Path) -> Iterator[SimulatedHypervisor]:
    started = lifecycle.start("vm001", 1 << 20, [1 << 20], tmp_path, state_dir=folders.state_dir)
    hypervisor = SimulatedHypervisor("vm001", folders.context(), started.options)
    yield hypervisor
    lifecycle.stop(Path(started.options["socket"]), force=True)


def _work(folders: HostFolders, seconds: float, then: str) -> subprocess.Popen[bytes]:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folders.state_dir), str(seconds), then],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    if worker.stdout is None or worker.stdout.readline() != b"paused\n":
        raise AssertionError("the worker did not pause the VM")
    return worker


def _soon(condition: Callable[[], bool], seconds: float = 60) -> float:
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.01)
    return time.monotonic() - begun


def _guardians(state_dir: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if b"vmsnap.guardian" in words and str(state_dir).encode() in environment:
            found.append(int(process.name))
    return found


def test_a_worker_that_is_killed_in_the_pause_leaves_a_running_vm(
    folders: HostFolders, vm: SimulatedHypervisor
) -> None:
    worker = _work(folders, 60, "os.kill(os.getpid(), 9)")
    assert worker.wait() == -signal.SIGKILL
    _soon(lambda: vm.state() is VmState.EXECUTING)


def test_a_worker_whose_whole_session_is_killed_leaves_a_running_vm(
    folders: HostFolders, vm: SimulatedHypervisor
) -> None:
    worker = _work(folders, 60, "time.sleep(600)")
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    _soon(lambda: vm.state() is VmState.EXECUTING)


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group of its own, such as a service manager makes for each service."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    group = Path(next(words[1] for words in mounts if words[2] == "cgroup2"), f"vmsnap-test-{os.getpid()}")
    group.mkdir()
    yield group
    group.rmdir()


@pytest.mark.lab
def test_a_worker_that_is_killed_with_all_that_is_in_its_control_group_leaves_a_running_vm(
    folders: HostFolders, vm: SimulatedHypervisor, control_group: Path
) -> None:
    """As a service manager does it, and the kernel where a group's memory is short."""
    join = f"open('{control_group}/cgroup.procs', 'w').write('0')"
    argv = [sys.executable, "-c", f"{join}\n{WORKER}", str(folders.state_dir), "60", "time.sleep(600)"]
    worker = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert worker.stdout is not None and worker.stdout.readline() == b"paused\n"
    assert (control_group / "cgroup.procs").read_text().split() == [str(worker.pid)]
    assert vm.state() is VmState.STOPPED
    (control_group / "cgroup.kill").write_text("1")
    assert worker.wait() == -signal.SIGKILL
    _soon(lambda: vm.state() is VmState.EXECUTING)
    _soon(lambda: not (control_group / "cgroup.procs").read_text())


def test_a_host_that_is_suspended_in_the_pause_wakes_up_with_a_running_vm(
    folders: HostFolders, vm: SimulatedHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker and guardian stand still together, and find the deadline past."""
    monkeypatch.setenv("VMSNAP_STATE_DIR", str(folders.state_dir))
    worker = _work(folders, 3, "time.sleep(600)")
    asleep = [worker.pid, *_guardians(folders.state_dir)]
    assert len(asleep) == 2
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3.5)
    assert vm.state() is VmState.STOPPED
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    _soon(lambda: vm.state() is VmState.EXECUTING)
    worker.kill()
    worker.wait()


def test_a_worker_that_hangs_is_killed_at_the_deadline_and_the_vm_runs(
    folders: HostFolders, vm: SimulatedHypervisor
) -> None:
    worker = _work(folders, 0.5, "os.kill(os.getpid(), 19)")
    _soon(lambda: vm.state() is VmState.EXECUTING)
    assert worker.wait() == -signal.SIGKILL
    _soon(lambda: "its pause passed the limit" in (folders.state_dir / "guardian.log").read_text())


def test_a_guardian_that_is_dismissed_does_nothing_more(
    folders: HostFolders, vm: SimulatedHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSNAP_STATE_DIR", str(folders.state_dir))
    guard = Guardian(Charge("vm001", "simulated", {}, folders.context(), os.getpid()))
    assert _guardians(folders.state_dir)
    guard.arm(0.2)
    guard.disarm()
    guard.dismiss()
    guard.dismiss()
    assert not _guardians(folders.state_dir)
    vm.pause()
    assert vm.state() is VmState.STOPPED
    assert (folders.state_dir / "guardian.log").read_text() == ""
