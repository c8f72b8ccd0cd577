"""A QEMU VM is shown not to run, or nothing takes its place: processes that live, hang, are zombies or are others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_qcow2_mechanism_machine import Machine, await_true, machine
from vmsnap.errors import Busy, HypervisorError
from vmsnap.model import to_json
from vmsnap.roles import DriverContext
from vmsnap_drivers.hypervisors.qemu import QemuHypervisor
from vmsnap_drivers.qemu import process
from vmsnap_drivers.qemu.peer import listener

pytestmark = pytest.mark.qemu
__all__ = ["machine"]


@pytest.fixture
def driver(machine: Machine, tmp_path: Path) -> Iterator[QemuHypervisor]:
    """For the machine, whose process was noted, as a capture does."""
    made = QemuHypervisor("vm001", DriverContext(tmp_path, tmp_path), {"qmp": str(machine.monitor_path)})
    process.note(tmp_path / "qemu", "vm001", machine.process.pid, str(machine.monitor_path), machine.disks())
    yield made
    made.close()


def forget(driver: QemuHypervisor) -> None:
    (driver.context.state_dir / "qemu" / "processes" / "vm001.json").unlink()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("known", [True, False])
def test_a_vm_that_lives_is_left_alone_or_killed_where_that_is_asked_for(
    machine: Machine, driver: QemuHypervisor, known: bool
) -> None:
    if not known:
        forget(driver)
    with pytest.raises(Busy, match="is running: "):
        driver.fence()
    assert machine.oracle.status()
    proof = driver.fence(kill=True)
    assert f"process {machine.process.pid} was killed and has ended" in proof and "nobody listens on" in proof
    assert machine.process.wait() == -signal.SIGKILL
    if known:
        assert "nobody writes to its 3 disks" in proof
        assert f"its process {machine.process.pid} has ended" in driver.fence()
    else:
        with pytest.raises(HypervisorError, match="it was never captured"):
            driver.fence()


@pytest.mark.parametrize("known", [True, False])
def test_not_answering_is_no_proof(machine: Machine, driver: QemuHypervisor, known: bool) -> None:
    if not known:
        forget(driver)
    machine.process.send_signal(signal.SIGSTOP)
    with pytest.raises(Busy, match="is running: "):
        driver.fence()
    assert "was killed and has ended" in driver.fence(kill=True)
    assert machine.process.wait() == -signal.SIGKILL


def test_a_vm_that_nobody_ever_saw_could_run_all_the_same(machine: Machine, driver: QemuHypervisor) -> None:
    forget(driver)
    machine.stop()
    for kill in (False, True):
        with pytest.raises(HypervisorError, match="it was never captured"):
            driver.fence(kill=kill)


def test_a_killed_process_is_dead_before_its_parent_has_heard_of_it(machine: Machine, driver: QemuHypervisor) -> None:
    machine.process.kill()
    await_true(lambda: listener(machine.monitor_path) is None, "the end of the socket")
    assert is_alive(machine.process.pid), "a zombie still has its number"
    assert f"its process {machine.process.pid} has ended" in driver.fence()


def test_a_vm_that_was_started_again_is_found(machine: Machine, driver: QemuHypervisor) -> None:
    old = machine.process.pid
    machine.stop()
    assert f"its process {old} has ended" in driver.fence()
    machine.start()
    with pytest.raises(Busy, match=f"process {machine.process.pid} listens on"):
        driver.fence()
    # At another socket it is found by what it does to the disks.
    machine.stop()
    machine.monitor_path = machine.folder / "elsewhere.qmp"
    machine.start()
    with pytest.raises(Busy, match="open for writing"):
        driver.fence(kill=True)
    assert machine.oracle.status()


def test_another_process_of_the_same_number_is_neither_waited_for_nor_killed(
    machine: Machine, driver: QemuHypervisor
) -> None:
    machine.stop()
    state_dir = driver.context.state_dir
    known = process.read(state_dir / "qemu", "vm001")
    assert known is not None
    with subprocess.Popen(["sleep", "600"]) as other:
        record = state_dir / "qemu" / "processes" / "vm001.json"
        record.write_text(to_json(replace(known, pid=other.pid)))
        try:
            assert f"its process {other.pid} has ended" in driver.fence(kill=True)
            assert other.poll() is None
            # Of another start of the host even the time of the start may agree.
            record.write_text(to_json(replace(known, pid=other.pid, boot="another")))
            assert "the host was started again since it ran" in driver.fence(kill=True)
            assert other.poll() is None
        finally:
            other.kill()


def test_who_opened_the_socket_is_killed_only_if_it_is_a_qemu(machine: Machine, driver: QemuHypervisor) -> None:
    machine.stop()
    machine.monitor_path.unlink(missing_ok=True)
    program = (
        f"import socket, time; s = socket.socket(socket.AF_UNIX); s.bind({str(machine.monitor_path)!r}); s.listen()"
    )
    with subprocess.Popen([sys.executable, "-c", f"{program}; time.sleep(600)"]) as other:
        try:
            await_true(lambda: listener(machine.monitor_path) == other.pid, "it listens")
            with pytest.raises(HypervisorError, match="no QEMU, which is not killed"):
                driver.fence(kill=True)
            assert other.poll() is None
        finally:
            other.kill()
    assert "nobody listens on" in driver.fence()


def test_a_socket_on_which_nobody_listens_any_more_has_no_listener(tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    assert listener(path) is None
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert listener(path) == os.getpid()
    assert path.is_socket() and listener(path) is None
