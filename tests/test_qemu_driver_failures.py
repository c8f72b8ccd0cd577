"""Whatever goes wrong during a capture, the guest runs, its settings are as before, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine, QemuBuild, available_qemus, find_qemu
from tests.qemu_bench import VERSIONS, Bench, bench, captures, folder, machines, nothing_left, with_capture
from vmsnap.errors import (
    AlreadyExists,
    Busy,
    CannotCapture,
    HypervisorError,
    PauseExceeded,
    StorageFull,
    UnknownVm,
    VmGone,
)
from vmsnap.model import VmState
from vmsnap.roles import CaptureRequest, DriverContext
from vmsnap_drivers.hypervisors.qemu import QemuHypervisor

__all__ = ["bench", "folder", "machines"]
pytestmark = pytest.mark.qemu
REQUEST = CaptureRequest("bk001", 5.0)


def prepared(bench: Bench) -> None:
    bench.driver.prepare(REQUEST, bench.driver.plan_capture(REQUEST))


def paused(bench: Bench) -> None:
    prepared(bench)
    bench.driver.pause()


def duplicated(bench: Bench) -> None:
    paused(bench)
    bench.driver.duplicate()


STAGES = [prepared, paused, duplicated]


def assert_well(bench: Bench) -> None:
    before = bench.machine.latest_count()
    bench.machine.wait_for_count(before + 20)
    assert bench.machine.oracle.execute("query-status")["status"] == "running"
    assert bench.machine.faults() == []
    assert nothing_left(bench)


@pytest.mark.parametrize("stage", STAGES)
@captures()
def test_a_capture_can_be_abandoned_at_any_stage(bench: Bench, capture: str, stage: Callable[[Bench], None]) -> None:
    with_capture(bench, capture)
    before = bench.settings()
    stage(bench)
    bench.driver.abandon()
    bench.driver.resume()
    bench.driver.abandon()
    assert_well(bench)
    assert bench.settings() == before
    bench.capture("bk002")
    bench.driver.discard_duplicate("bk002")
    assert_well(bench)


@pytest.mark.parametrize("stage", STAGES)
@captures(other=True)
def test_another_process_resumes_and_cleans_up_after_the_death_of_the_first(
    bench: Bench, capture: str, stage: Callable[[Bench], None]
) -> None:
    before = bench.settings()
    child = os.fork()
    if child == 0:
        try:
            bench.driver = bench.new_driver(capture=capture)
            stage(bench)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    fresh = bench.new_driver()
    fresh.resume()
    assert fresh.state() is VmState.EXECUTING
    fresh.abandon()
    fresh.close()
    assert_well(bench)
    assert bench.settings() == before


@pytest.mark.parametrize("stage", STAGES)
@captures()
def test_a_qemu_that_dies_in_the_middle_ends_every_call(
    bench: Bench, capture: str, stage: Callable[[Bench], None]
) -> None:
    with_capture(bench, capture)
    stage(bench)
    bench.machine.kill()
    begin = time.monotonic()
    for call in (bench.driver.pause, bench.driver.duplicate, bench.driver.resume, bench.driver.describe):
        with pytest.raises(VmGone):
            call()
    assert bench.driver.state() is VmState.ABSENT
    bench.driver.abandon()
    assert time.monotonic() - begin < 30, "each call ends at once, not with its time-out"
    assert nothing_left(bench)


def test_a_qemu_that_dies_while_its_memory_is_copied(bench: Bench) -> None:
    with_capture(bench, "cow")
    paused(bench)
    duplicate = bench.driver.duplicate()
    bench.driver.resume()
    bench.machine.kill()
    with pytest.raises(HypervisorError):
        bench.driver.finish_duplicate(duplicate, lambda _: None)
    bench.driver.abandon()
    assert nothing_left(bench)


def test_a_vm_that_its_operator_paused_stays_paused_whether_it_can_be_captured_or_not(bench: Bench) -> None:
    bench.machine.oracle.execute("stop")
    if bench.machine.qemu.version == "7.2":
        with pytest.raises(CannotCapture, match=r"stands still, and QEMU 7\.2.* would make it run"):
            bench.capture(resume=False)
    else:
        captured = bench.capture(resume=False)
        assert captured.plan.capture == "cow"
        assert "pc.ram" in [image.region for image in captured.duplicate.images]
        bench.driver.discard_duplicate("bk001")
    assert bench.driver.state() is VmState.STOPPED
    assert bench.machine.oracle.status() == "paused"
    bench.machine.oracle.execute("cont")
    assert_well(bench)


@pytest.mark.parametrize("more", [(), ("-vga", "std")], ids=["one piece of RAM", "RAM and VGA"])
@pytest.mark.parametrize("build", available_qemus(), ids=lambda build: build.version)
def test_a_pre_copy_that_could_lose_pages_is_refused(build: QemuBuild, folder: Path, more: tuple[str, ...]) -> None:
    with LabMachine(folder / "vm", build, round_memory=True, extra_arguments=more) as machine:
        context = DriverContext(folder / "state", folder / "memory")
        context.memory_dir.mkdir()
        driver = QemuHypervisor("vm001", context, {"qmp": str(machine.qmp_socket), "capture": "precopy"})
        lost = ["pc.ram"] * (build.version == "7.2") + ["0000:00:02.0/vga.vram"] * bool(more)
        try:
            if lost:
                with pytest.raises(CannotCapture) as refused:
                    driver.plan_capture(CaptureRequest("bk001", 5.0))
                assert f"loses track of pages written in {', '.join(lost)};" in str(refused.value)
                assert "use -o capture=cow" in str(refused.value)
            else:
                assert driver.plan_capture(CaptureRequest("bk001", 5.0)).capture == "precopy"
        finally:
            driver.close()


@captures(other=True)
def test_somebody_who_resumes_the_guest_within_the_pause_is_found_out(bench: Bench, capture: str) -> None:
    with_capture(bench, capture)
    paused(bench)
    bench.machine.oracle.execute("cont" if capture == "cow" else "migrate_cancel")
    with pytest.raises(HypervisorError):
        bench.driver.duplicate()
    bench.driver.abandon()
    bench.driver.resume()
    assert_well(bench)


@captures()
def test_a_pause_that_lasts_too_long_is_given_up(bench: Bench, capture: str) -> None:
    with_capture(bench, capture)
    request = CaptureRequest("bk001", 2.0)
    bench.driver.prepare(request, bench.driver.plan_capture(request))
    bench.driver.pause()
    threading.Event().wait(2.1)
    with pytest.raises(PauseExceeded):
        bench.driver.duplicate()
    bench.driver.abandon()
    bench.driver.resume()
    assert_well(bench)


def test_a_second_capture_at_once_is_refused(bench: Bench) -> None:
    prepared(bench)
    other = bench.new_driver()
    with pytest.raises((Busy, CannotCapture)):
        other.prepare(CaptureRequest("bk002", 5.0), other.plan_capture(CaptureRequest("bk002", 5.0)))
    other.close()
    bench.driver.abandon()
    bench.driver.resume()
    assert_well(bench)


def test_a_device_that_is_plugged_in_meanwhile_costs_the_capture(bench: Bench) -> None:
    """Its state would be in the image, and itself in no definition. Once the capture is prepared QEMU takes none."""
    driver, machine = bench.driver, bench.machine
    request = CaptureRequest("bk001", 5.0)
    plan = driver.plan_capture(request)
    machine.oracle.execute("device_add", driver="virtio-serial-pci", id="late")
    driver.prepare(request, plan)
    driver.pause()
    duplicate = driver.duplicate()
    driver.resume()
    with pytest.raises(HypervisorError, match="was changed during its capture: late was plugged in"):
        driver.finish_duplicate(duplicate, lambda _: None)
    driver.abandon()
    driver.discard_duplicate("bk001")
    machine.wait_for_count(machine.latest_count() + 20)
    assert machine.faults() == [] and nothing_left(bench)
    captured = bench.capture("bk002")
    assert captured.pause_seconds > 0, "now it is one of those that it begins with"
    driver.discard_duplicate("bk002")
    machine.kill()


@pytest.mark.parametrize("moment", ["before it is planned", "before the pause"])
def test_a_disk_that_is_resized_meanwhile_costs_the_capture(bench: Bench, moment: str) -> None:
    """The guest's memory knows the new size, and its snapshot would be read to the old one."""
    driver, machine = bench.driver, bench.machine
    disk = driver.describe().disks[-1]

    def resize_if(now: str) -> None:
        if now == moment:
            machine.oracle.execute("block_resize", node_name=disk.handle["node"], size=disk.size_bytes + (1 << 20))

    resize_if("before it is planned")
    prepared(bench)
    resize_if("before the pause")
    driver.pause()
    duplicate = driver.duplicate()
    driver.resume()
    why = f"{disk.device} was resized from {disk.size_bytes} to {disk.size_bytes + (1 << 20)} bytes"
    with pytest.raises(HypervisorError, match=f"was changed during its capture: disk {why}"):
        driver.finish_duplicate(duplicate, lambda _: None)
    driver.abandon()
    driver.discard_duplicate("bk001")
    assert_well(bench)
    machine.kill()


def test_no_room_is_found_before_anything_is_done(bench: Bench) -> None:
    small = DriverContext(bench.context.state_dir, bench.context.memory_dir, None, 100 << 20)
    driver = QemuHypervisor("vm001", small, {"qmp": str(bench.machine.qmp_socket)})
    with pytest.raises(StorageFull, match="the memory budget leaves 100 MiB"):
        driver.plan_capture(REQUEST)
    driver.close()
    spool = bench.folder / "spool"
    roomy = DriverContext(bench.context.state_dir, bench.context.memory_dir, spool, 100 << 20)
    driver = QemuHypervisor("vm001", roomy, {"qmp": str(bench.machine.qmp_socket)})
    driver.prepare(REQUEST, driver.plan_capture(REQUEST))
    assert (spool / "bk001").is_dir()
    driver.abandon()
    driver.resume()
    driver.close()
    assert_well(bench)


def test_a_load_onto_a_living_name_is_refused_and_a_failed_one_leaves_nothing(bench: Bench) -> None:
    captured = bench.capture(copy_disks=True)
    loader, _ = bench.loaded(captured, "vm002", isolated=True)
    try:
        with pytest.raises(AlreadyExists):
            bench.loaded(captured, "vm002", isolated=True)
    finally:
        loader.destroy()
        loader.destroy()
    captured.disks["disk0"].unlink()
    with pytest.raises(HypervisorError, match="No such file"):
        bench.loaded(captured, "vm003", isolated=True)
    assert not (bench.context.state_dir / "qemu" / "run" / "vm003").exists()
    bench.driver.discard_duplicate("bk001")
    assert_well(bench)


def test_a_vm_of_somebody_else_is_not_destroyed(bench: Bench) -> None:
    with pytest.raises(HypervisorError, match="was not started by vmsnap"):
        bench.driver.destroy()
    assert_well(bench)


@pytest.fixture
def context(folder: Path) -> DriverContext:
    return DriverContext(folder, folder)


def test_unreachable_vms(context: DriverContext, folder: Path) -> None:
    absent = QemuHypervisor("vm001", context, {"qmp": str(folder / "none.sock")})
    assert absent.state() is VmState.ABSENT
    with pytest.raises(UnknownVm):
        absent.describe()


def test_a_capture_that_another_process_is_at_is_left_alone_by_who_only_looks(bench: Bench) -> None:
    with_capture(bench, "cow")
    prepared(bench)
    bench.driver.pause()
    duplicate = bench.driver.duplicate()
    bench.driver.resume()
    onlooker = bench.new_driver()
    assert onlooker.state() is VmState.EXECUTING
    onlooker.close()
    bench.driver.finish_duplicate(duplicate, lambda _: None)
    bench.driver.discard_duplicate("bk001")
    assert_well(bench)


def dies_while_the_memory_is_copied(bench: Bench) -> None:
    """A process of its own captures by copy on write, up to the resume, and is killed then."""
    child = os.fork()
    if child == 0:
        try:
            bench.driver = bench.new_driver(capture="cow")
            duplicated(bench)
            bench.driver.resume()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


def can_migrate(bench: Bench) -> None:
    """An ordinary migration works: nothing is left of a background snapshot."""
    with_capture(bench, "precopy")
    bench.capture("bk002")
    bench.driver.discard_duplicate("bk002")
    assert_well(bench)


def test_a_guest_goes_on_when_the_process_dies_that_copies_its_memory(bench: Bench) -> None:
    """QEMU 7.2 would stand still at the guest's next write, and its monitor with it."""
    dies_while_the_memory_is_copied(bench)
    threading.Event().wait(1)
    fresh = bench.new_driver()
    assert fresh.state() is VmState.EXECUTING
    fresh.resume()
    fresh.abandon()
    fresh.close()
    assert_well(bench)
    can_migrate(bench)


def test_who_sets_a_broken_capture_right_is_not_disturbed_by_a_guardian_that_comes_late(bench: Bench) -> None:
    """It waits for the monitor, and keeps the guest's memory unprotected for that time; but not the memory that the
    other one has to protect once more."""
    dies_while_the_memory_is_copied(bench)
    bench.driver.resume()
    ready, say_ready = os.pipe()
    late = os.fork()
    if late == 0:
        try:
            guardian = bench.new_driver()
            os.write(say_ready, b"x")
            while True:
                with contextlib.suppress(Busy):
                    guardian.resume()
        finally:
            os._exit(1)
    os.read(ready, 1)
    bench.driver.abandon()
    os.kill(late, signal.SIGKILL)
    os.waitpid(late, 0)
    os.close(ready)
    os.close(say_ready)
    assert_well(bench)
    can_migrate(bench)


def test_a_broken_capture_is_set_right_though_somebody_cancels_that(bench: Bench) -> None:
    dies_while_the_memory_is_copied(bench)
    bench.driver.resume()
    cancelled = threading.Event()

    def cancel_once_it_runs() -> None:
        while bench.machine.oracle.execute("query-migrate").get("status") != "active":
            if cancelled.is_set():
                return
        bench.machine.oracle.execute("migrate_cancel")

    somebody = threading.Thread(target=cancel_once_it_runs)
    somebody.start()
    bench.driver.abandon()
    cancelled.set()
    somebody.join()
    assert_well(bench)
    can_migrate(bench)


@pytest.fixture
def strange(folder: Path) -> Iterator[Callable[..., tuple[str, ...]]]:
    """Refusals of a guest that was started with some more arguments."""
    machines: list[LabMachine] = []

    def refusals(*arguments: str) -> tuple[str, ...]:
        machine = LabMachine(folder / f"guest{len(machines)}", find_qemu(VERSIONS[0]), extra_arguments=arguments)
        machines.append(machine)
        machine.start()
        driver = QemuHypervisor("vm001", DriverContext(folder, folder), {"qmp": str(machine.qmp_socket)})
        found = driver.describe().refusals
        driver.close()
        machine.kill()
        return found

    yield refusals
    for machine in machines:
        machine.kill()


def test_what_cannot_be_captured_truthfully_is_refused(
    strange: Callable[..., tuple[str, ...]], tmp_path: Path, folder: Path
) -> None:
    ram = tmp_path / "ram"
    file_backed = f"memory-backend-file,id=extra,mem-path={ram},size=16M,share=on"
    (reason,) = strange("-object", file_backed)
    assert "'extra' lies in a file on ext4" in reason
    assert strange("-object", f"memory-backend-file,id=extra,mem-path={folder}/ram,size=16M,share=on") == ()
    (reason,) = strange("-object", "secret,id=key0,data=hunter2")
    assert "secret 'key0' stands in QEMU's command line" in reason
    assert "hunter2" not in reason


def test_doctor_names_what_is_there(bench: Bench) -> None:
    findings = bench.driver.doctor()
    subjects = [finding.subject for finding in findings]
    assert {"QEMU", "userfaultfd", "huge pages", "memory for duplicates", "VM vm001"} <= set(subjects)
    assert all(finding.severity != "missing" for finding in findings)
    with socket.socket(socket.AF_UNIX) as other:
        bench.driver.close()
        # Waits for QEMU to see that the driver has hung up.
        other.settimeout(60)
        other.connect(str(bench.machine.qmp_socket))
        other.recv(4096)
        (finding,) = [f for f in bench.new_driver().doctor() if f.subject == "VM vm001"]
        assert finding.severity == "missing"
        assert "serves another client" in finding.message
