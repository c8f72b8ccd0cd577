"""The second way into a QEMU, by its stub for debuggers: a guest that stands still goes on by it, whatever state a
capture left, while the first monitor's owner does nothing; and nothing of it is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine
from tests.qemu_bench import Bench, Machines, bench, folder, machines
from vmsnap.errors import VmGone
from vmsnap.roles import CaptureRequest
from vmsnap_drivers.qemu.capture.record import place
from vmsnap_drivers.qemu.capture.turn import kept_free
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.second_monitor import NAME, SecondMonitor

__all__ = ["Machines", "bench", "folder", "machines"]
pytestmark = pytest.mark.qemu


def goes_on(machine: LabMachine) -> None:
    """It counts on, and finds RAM and disks in agreement."""
    machine.wait_for_check(machine.latest_count() + 1)
    assert machine.faults() == []


def labels(machine: LabMachine) -> set[str]:
    """The character devices, without the one that QEMU makes for its stub once, and keeps: nothing is behind it."""
    found = {entry["label"] for entry in machine.oracle.execute("query-chardev")}
    return {label for label in found if not label.startswith("#")}


@pytest.fixture
def monitor(bench: Bench) -> Iterator[Monitor]:
    with Monitor.borrow(bench.machine.qmp_socket) as borrowed:
        yield borrowed


@pytest.fixture
def second(bench: Bench) -> SecondMonitor:
    # Longer than the address of a UNIX socket may be.
    return SecondMonitor(bench.folder / ("long" * 30) / "vm001.monitor")


def test_it_is_there_while_it_is_needed_and_leaves_nothing(
    bench: Bench, monitor: Monitor, second: SecondMonitor
) -> None:
    before = labels(bench.machine)
    assert second.make_run() is None, "nobody listens"
    for _ in range(2):
        assert second.open(monitor) == ""
    assert labels(bench.machine) - before == {NAME} and second.is_there()
    for _ in range(2):
        second.close(monitor)
        assert labels(bench.machine) == before and not second.is_there()
    assert second.make_run() is None
    goes_on(bench.machine)


def test_a_guest_that_stands_still_goes_on_and_one_that_runs_goes_on_too(
    bench: Bench, monitor: Monitor, second: SecondMonitor
) -> None:
    second.open(monitor)
    mark = monitor.mark()
    monitor.execute("stop")
    moment = second.make_run()
    events = [event for event in monitor.events_since(mark) if event.name in ("STOP", "RESUME")]
    assert [event.name for event in events] == ["STOP", "RESUME"]
    assert moment is not None and moment.monotonic_ns >= events[0].monotonic_ns
    goes_on(bench.machine)
    assert second.make_run() is not None
    goes_on(bench.machine)
    second.close(monitor)
    # What QEMU's stub remembers of the one who was connected stops nothing later.
    monitor.execute("stop")
    monitor.execute("cont")
    goes_on(bench.machine)


@pytest.mark.parametrize("way", ["cow", "precopy"])
@pytest.mark.parametrize("step", ["prepare", "pause", "duplicate"])
def test_a_capture_that_was_left_anywhere(
    bench: Bench, monitor: Monitor, second: SecondMonitor, way: str, step: str
) -> None:
    driver = bench.driver = bench.new_driver(capture=way)
    settings = bench.settings()
    request = CaptureRequest("bk001", 5.0)
    second.open(monitor)
    driver.prepare(request, driver.plan_capture(request))
    if step != "prepare":
        driver.pause()
    if step == "duplicate":
        driver.duplicate()
    # As whoever resumes a VM does it: a QEMU 7.2 needs that.
    with kept_free(place(bench.context.state_dir / "qemu", "vm001"), giving_up=True):
        assert second.make_run() is not None
    assert monitor.execute("query-status")["running"]
    driver.abandon()
    goes_on(bench.machine)
    second.close(monitor)
    assert bench.settings() == settings
    # The next capture is none the worse for it.
    driver.discard_duplicate("bk001")
    captured = bench.capture("bk002")
    assert captured.plan.capture == way
    driver.discard_duplicate("bk002")
    goes_on(bench.machine)


def test_a_debugger_of_somebody_else_is_left_alone(bench: Bench, monitor: Monitor, second: SecondMonitor) -> None:
    line = f"gdbserver unix:{bench.folder / 'gdb.sock'},server=on,wait=off"
    assert "Waiting" in monitor.execute("human-monitor-command", {"command-line": line})
    before = labels(bench.machine)
    try:
        assert "debugger of somebody else's" in second.open(monitor)
        assert not second.is_there() and labels(bench.machine) == before
    finally:
        monitor.execute("human-monitor-command", {"command-line": "gdbserver none"})
    goes_on(bench.machine)


def test_a_record_that_was_lost_and_a_worker_that_died_between_two_steps(
    bench: Bench, monitor: Monitor, second: SecondMonitor, tmp_path: Path
) -> None:
    before = labels(bench.machine)
    second.open(monitor)
    second.forget()
    other = SecondMonitor(tmp_path / "vm001.monitor")
    assert other.open(monitor) == "", "what was left there is taken away first"
    other.close(monitor)
    # QEMU has the socket, and was not told yet that it is for debuggers.
    other.open(monitor)
    monitor.execute("human-monitor-command", {"command-line": "gdbserver none"})
    address = {"type": "unix", "data": {"path": str(tmp_path / "other")}}
    data = {"addr": address, "server": True, "wait": False}
    monitor.execute("chardev-add", {"id": NAME, "backend": {"type": "socket", "data": data}})
    other.close(monitor)
    assert labels(bench.machine) == before
    goes_on(bench.machine)


def test_a_qemu_that_has_ended(bench: Bench, monitor: Monitor, second: SecondMonitor) -> None:
    second.open(monitor)
    bench.machine.kill()
    assert second.make_run() is None
    assert second.is_there()
    with pytest.raises(VmGone):
        second.close(monitor)
    second.forget()
    assert not list((bench.folder / ("long" * 30)).iterdir())
