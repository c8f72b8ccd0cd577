"""The QEMU driver captures a real guest and brings it back, on both generations of QEMU."""

from __future__ import annotations

import time

import pytest

from tests.lab import serial
from tests.qemu_bench import Bench, bench, folder, machines, nothing_left, serial_log, with_capture
from vmsnap.model import Disk, VmState

pytestmark = pytest.mark.qemu

__all__ = ["bench", "folder", "machines"]


@pytest.mark.parametrize("capture", ["cow", "precopy"])
def test_a_second_guest_goes_on_from_the_instant_while_the_first_one_never_stops(bench: Bench, capture: str) -> None:
    with_capture(bench, capture)
    before = bench.settings()
    captured = bench.capture(copy_disks=True)
    first = bench.machine.latest_count()
    assert captured.duplicate.capture == capture
    assert bench.settings() == before
    loader, _ = bench.loaded(captured, "vm002", isolated=True)
    try:
        assert loader.state() is VmState.STOPPED
        expected = {str(path) for path in captured.disks.values()}
        assert {
            disk.address for disk in loader.switch_disks([Disk(d, str(p), 0) for d, p in captured.disks.items()])
        } == expected
        assert all(not nic.connected for nic in loader.cut_network())
        loader.resume()
        assert loader.state() is VmState.EXECUTING
        deadline = time.monotonic() + 30
        while len(serial.counts(text := serial_log(bench, "vm002").read_text())) < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert serial.faults(text) == []
        assert len(serial.counts(text)) >= 20
        assert serial.counts(text)[0] <= first + 100
        assert {owned.name for owned in loader.list_owned()} == {"bk001", "vm002"}
        assert loader.list_vms() == ["vm002"]
        loader.shut_down(30)
        assert serial.flushed(serial_log(bench, "vm002").read_text()) is not None
    finally:
        loader.destroy()
    assert not (bench.context.state_dir / "qemu" / "run" / "vm002").exists()
    bench.machine.wait_for_check(bench.machine.latest_check() + 1)
    assert bench.machine.faults() == []
    bench.driver.discard_duplicate("bk001")
    assert nothing_left(bench)


@pytest.mark.parametrize("capture", ["cow", "precopy", "auto"])
def test_several_captures_in_a_row(bench: Bench, capture: str) -> None:
    with_capture(bench, capture)
    for number in range(5):
        captured = bench.capture(f"bk{number}")
        bench.driver.discard_duplicate(f"bk{number}")
        assert 0 < captured.pause_seconds <= 5.0
    assert bench.machine.faults() == []
    assert nothing_left(bench)
