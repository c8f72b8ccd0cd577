"""The lab's guest runs on both QEMU generations, and its self-check does fail when it should."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import DEFAULT_DISKS, Disk, LabMachine, QemuBuild, disk_records, find_qemu, qmp, serial
from tests.left_out import some_of

pytestmark = pytest.mark.qemu

RAW_DISKS = (Disk("raw"), Disk("raw"))


@pytest.fixture(params=some_of(["7.2", "10.0"], 2))
def qemu(request: pytest.FixtureRequest) -> QemuBuild:
    return find_qemu(request.param)


@pytest.fixture
def raw_machine(tmp_path: Path) -> Iterator[LabMachine]:
    """A running guest whose disks can be tampered with as plain files, past its first turn of the ring."""
    settings = {"slots": 64, "check_every": 50, "count_every": 1, "stall_us": 500}
    with LabMachine(tmp_path, find_qemu("7.2"), memory_mib=256, disks=RAW_DISKS, settings=settings) as machine:
        machine.wait_for_check(100)
        yield machine


def tamper(machine: LabMachine, disk: int, change: Callable[[bytes], bytes]) -> None:
    """Change the ring of a raw disk while the guest stands still."""
    machine.oracle.execute("stop")
    image = machine.disk_path(disk)
    disk_records.write_ring(image, change(disk_records.read_ring(image, slots=64)))
    machine.oracle.execute("cont")


@pytest.mark.parametrize("machine_type", ["pc", "q35"])
def test_a_guest_boots_counts_agrees_with_itself_and_flushes_at_the_power_button(
    tmp_path: Path, qemu: QemuBuild, machine_type: str
) -> None:
    with LabMachine(tmp_path, qemu, machine_type=machine_type, disks=RAW_DISKS) as machine:
        machine.wait_for_count(10)
        machine.wait_for_check(300)
        assert machine.oracle.execute("query-version")["qemu"]["major"] == int(qemu.version.split(".")[0])
        last = machine.powerdown()
        assert machine.faults() == []
        assert last >= 300
        assert disk_records.flushed_count(machine.disk_path(0)) == last
        assert [disk_records.newest_record(machine.disk_path(disk), disk) for disk in (0, 1)] == [last, last]


def test_the_default_disks_are_what_the_block_graph_shows(tmp_path: Path, qemu: QemuBuild) -> None:
    with LabMachine(tmp_path, qemu) as machine:
        nodes = machine.oracle.execute("query-named-block-nodes", flat=True)
        formats = {node["node-name"]: node["drv"] for node in nodes}
        assert [formats[f"disk{index}"] for index in (0, 1)] == [disk.format for disk in DEFAULT_DISKS]
        assert machine.oracle.execute("query-block-jobs") == []
        assert machine.oracle.status() == "running"


def test_bulk_memory_is_filled_and_verified(tmp_path: Path, qemu: QemuBuild) -> None:
    with LabMachine(tmp_path, qemu, settings={"touch_mib": 16, "check_every": 20, "pause_us": 1000}) as machine:
        machine.wait_for_check(100)
        assert serial.bulk_checks(machine.serial_text())


def test_memory_can_be_filled_from_outside_the_guest(tmp_path: Path, qemu: QemuBuild) -> None:
    with LabMachine(tmp_path, qemu, memory_mib=448, loaded_mib=128) as machine:
        machine.wait_for_check(100)
        page = tmp_path / "page"
        machine.oracle.execute("pmemsave", val=(256 + 127) << 20, size=4096, filename=str(page))
        assert b"half a page that compresses well" in page.read_bytes()


def test_no_qemu_gets_memory_of_a_size_for_which_it_loses_pages(tmp_path: Path) -> None:
    old, new = (LabMachine(tmp_path, find_qemu(version), memory_mib=256) for version in ("7.2", "10.0"))
    assert old.memory_bytes % (256 * 1024) != 0
    assert new.memory_bytes == 256 * 1024 * 1024
    assert LabMachine(tmp_path, old.qemu, memory_mib=256, round_memory=True).memory_bytes == new.memory_bytes


def test_a_setting_that_the_guest_does_not_know_is_a_fault(tmp_path: Path) -> None:
    with LabMachine(tmp_path, find_qemu("7.2"), memory_mib=256, settings={"tuch_mib": 1}) as machine:
        assert "vmsnap.tuch_mib=1" in machine.wait_for_fault()[0]


def test_another_qemu_starts_from_what_proc_shows_of_a_running_one(tmp_path: Path, qemu: QemuBuild) -> None:
    with LabMachine(tmp_path, qemu, disks=()) as machine:
        proc = Path("/proc", str(machine.pid))
        argv = [word.decode() for word in (proc / "cmdline").read_bytes().split(b"\0")[:-1]]
        variables = dict(pair.split(b"=", 1) for pair in (proc / "environ").read_bytes().split(b"\0")[:-1])
        binary = (proc / "exe").readlink()
    prefix = argv[1 : 1 + len(qemu.prefix_arguments)]
    second = subprocess.run(
        [binary, *prefix, "-display", "none", "-S", "-monitor", "stdio"],
        env=variables, input=b"info version\nquit\n", capture_output=True, timeout=30, check=True,
    )  # fmt: skip
    assert qemu.version.encode() in second.stdout


def test_a_damaged_record_is_a_fault(raw_machine: LabMachine) -> None:
    tamper(raw_machine, disk=1, change=lambda ring: os.urandom(len(ring)))
    assert "damaged record on disk 1" in raw_machine.wait_for_fault()[0]


def test_a_disk_older_than_ram_is_a_fault(raw_machine: LabMachine) -> None:
    earlier = disk_records.read_ring(raw_machine.disk_path(0), slots=64)
    raw_machine.wait_for_count(raw_machine.latest_count() + 3)
    tamper(raw_machine, disk=0, change=lambda ring: earlier)
    assert "too old a record on disk 0" in raw_machine.wait_for_fault()[0]


def test_a_disk_newer_than_ram_is_a_fault(raw_machine: LabMachine) -> None:
    ready = re.search(r"READY disks=2 seed=(\d+)", raw_machine.serial_text())
    assert ready

    def one_more_record(ring: bytes) -> bytes:
        newest = disk_records.newest_record(raw_machine.disk_path(1), disk=1, slots=64)
        # Two ahead: the record of the next count may be in flight, and would then be right.
        at = (newest + 2) % 64 * disk_records.RECORD_BYTES
        forged = disk_records.record(int(ready[1]), newest + 2, disk=1)
        return ring[:at] + forged + ring[at + len(forged) :]

    tamper(raw_machine, disk=1, change=one_more_record)
    assert "too new a record on disk 1" in raw_machine.wait_for_fault()[0]


def test_a_stop_shows_in_the_guests_own_measurement_and_in_the_hosts(raw_machine: LabMachine) -> None:
    with serial.SerialWatch(raw_machine.serial_socket) as watch:
        raw_machine.wait_for_count(raw_machine.latest_count() + 20)
        raw_machine.oracle.execute("stop")
        # Nothing to poll for: this is the length of the stop that is then measured.
        stopped = raw_machine.oracle.wait_event("STOP", 60)
        with pytest.raises(TimeoutError):
            raw_machine.oracle.wait_event("NEVER", 0.4)
        raw_machine.oracle.execute("cont")
        resumed = raw_machine.oracle.wait_event("RESUME", 60)
        raw_machine.wait_for_count(raw_machine.latest_count() + 300)
        by_lines = serial.longest_gap_seconds(watch.lines())
    by_qemu = qmp.seconds_between(stopped, resumed)
    by_guest = serial.longest_stop_seconds(serial.stalls(raw_machine.serial_text()))
    # A busy host lets it stand still for longer; that is no less true.
    assert by_qemu >= 0.4 and by_guest >= by_qemu - 0.05 and by_lines >= by_qemu - 0.2
