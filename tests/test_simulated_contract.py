"""The simulated hypervisor fulfils the contract of its role."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk, Duplicate
from vmsnap.roles import DriverContext, Hypervisor, LoadedVm, LoadRequest
from vmsnap.testing.crashes import HypervisorCrashes
from vmsnap.testing.figures import HypervisorFigures
from vmsnap.testing.hypervisor import HypervisorContract
from vmsnap.testing.rigs import HypervisorRig, Packets, eventually
from vmsnap_drivers.hypervisors.simulated import SimulatedHypervisor, lifecycle, record
from vmsnap_drivers.hypervisors.simulated.control import Reply, ask
from vmsnap_drivers.hypervisors.simulated.duplicates import duplicates_in
from vmsnap_drivers.hypervisors.simulated.layout import PAGE, read_disk, read_ram


class SimulatedRig(HypervisorRig):
    """Two simulated VMs on one bridge; the oracle reads image files and asks the guests, never the driver."""

    vm, foreign_vm = "vm001", "vm900"
    watch_seconds = 0.06
    examples = 60

    def __init__(self, folder: Path, driver: type[SimulatedHypervisor] = SimulatedHypervisor) -> None:
        self.driver_class = driver
        self.root = folder
        self.scratch = folder / "scratch"
        self.context = DriverContext(folder / "state", folder / "memory")
        for made in (self.scratch, self.context.state_dir, self.context.memory_dir):
            made.mkdir(mode=0o700)
        self.sockets: dict[str, Path] = {}
        for name in (self.vm, self.foreign_vm):
            lifecycle.start(
                name,
                1 << 20,
                [256 << 10, 512 << 10],
                folder / "disks",
                state_dir=self.context.state_dir,
                ticks_per_second=150,
            )

    def driver(self, vm: str, options: Mapping[str, str] | None = None) -> Hypervisor:
        if options and "socket" in options:
            self.sockets[vm] = Path(options["socket"])
        return self.driver_class(vm, self.context, {"timeout": "5", **(options or {})})

    def _socket(self, vm: str) -> Path:
        return self.sockets.get(vm) or lifecycle.socket_of(self.context.state_dir, vm)

    def status(self, vm: str) -> Reply:
        return ask(self._socket(vm), "status")

    def progress(self, vm: str) -> int:
        return int(self.status(vm)["counter"])

    def image_progress(self, duplicate: Duplicate) -> int | None:
        content = read_ram(duplicate.images[0].path)
        assert content is not None, "the RAM image holds no guest"
        assert content.wrong_pages == (), "the RAM image is of several instants"
        return content.counter

    def verdict(self, vm: str) -> str:
        return str(ask(self._socket(vm), "check")["fault"])

    def undrained(self, vm: str) -> str:
        status = self.status(vm)
        for disk, completed in zip(status["disks"], status["completed"], strict=True):
            content = read_disk(Path(disk["path"]))
            if content is None or content.latest != completed:
                return f"{disk['device']} has {content}, the guest completed {completed}"
        return ""

    def clean(self, disks: Sequence[Disk]) -> bool:
        found = [read_disk(Path(disk.address)) for disk in disks]
        first = found[0]
        if first is None or not all(content is not None and content.clean for content in found):
            return False
        return first.log[-1:] == (first.counter,) and first.log == tuple(sorted(first.log))

    def kill(self, vm: str) -> None:
        os.kill(self.status(vm)["pid"], signal.SIGKILL)
        eventually(lambda: not record.alive(self._socket(vm)), f"{vm} is dead")

    def resume_past_driver(self, vm: str) -> None:
        ask(self._socket(vm), "resume")

    def ignore_shutdown(self, vm: str) -> None:
        ask(self._socket(vm), "inject", call="shut_down", effect="ignore")

    def packets(self, vm: str) -> Packets | None:
        nic = self.status(vm)["nic"]
        return Packets(nic["sent"], nic["received"])

    def traces(self) -> frozenset[str]:
        found = {str(path) for path in self.root.rglob("*") if not path.is_relative_to(self.scratch)}
        for path, entry in record.records_in(lifecycle.run_folder(self.context.state_dir)):
            if record.alive(path):
                children = Path(f"/proc/{entry.pid}/task/{entry.pid}/children").read_text().split()
                found |= {f"process {entry.vm}", *(f"child of {entry.vm}" for pid in children if _runs(pid))}
        return frozenset(found)

    def end(self) -> None:
        """End everything that was started or loaded."""
        for listed in lifecycle.list_vms(self.context.state_dir):
            lifecycle.stop(listed.socket, force=True)
        for place, _ in duplicates_in(self.context.memory_dir):
            place.remove(5.0)


def _runs(pid: str) -> bool:
    """Whether it is more than a process that has closed everything and is about to be reaped."""
    try:
        return any(Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def simulated_rig(driver: type[SimulatedHypervisor] = SimulatedHypervisor) -> Iterator[SimulatedRig]:
    """A rig in host memory, where flushing costs nothing."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-test-", dir="/dev/shm"))
    rig = SimulatedRig(folder, driver)
    try:
        yield rig
    finally:
        rig.end()
        shutil.rmtree(folder)


class TestSimulatedHypervisor(HypervisorContract):
    @pytest.fixture
    def rig(self) -> Iterator[SimulatedRig]:
        yield from simulated_rig()

    def test_12b_drained_means_past_the_page_cache(self, tmp_path: Path) -> None:
        """ "(O_DIRECT readers see it)": on a file system that has a disk below it."""
        started = lifecycle.start("vm001", 1 << 20, [256 << 10], tmp_path, state_dir=tmp_path)
        socket = Path(started.options["socket"])
        try:
            driver = SimulatedHypervisor("vm001", DriverContext(tmp_path, tmp_path), started.options)
            eventually(lambda: ask(socket, "status")["counter"] > 3, "the guest counts")
            driver.pause()
            image = tmp_path / "vm001-disk0.img"
            descriptor = os.open(image, os.O_RDONLY | os.O_DIRECT)
            buffer = mmap.mmap(-1, 256 << 10)
            assert os.preadv(descriptor, [buffer], 0) == len(buffer)
            os.close(descriptor)
            assert buffer[:] == image.read_bytes() and len(buffer) % PAGE == 0
        finally:
            lifecycle.stop(socket, force=True)


class TestFigures(HypervisorFigures):
    rounds = 2
    rig = TestSimulatedHypervisor.rig


class TestCrashes(HypervisorCrashes):
    rig = TestSimulatedHypervisor.rig


def test_a_driver_that_leaves_something_after_a_crash_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedHypervisor, "discard_duplicate", lambda driver, name: None)
    for rig in simulated_rig():
        rig.patience_seconds = 2.0
        suite = HypervisorCrashes()
        with pytest.raises(AssertionError, match="nothing is left"):
            suite.test_killed_at_this_call_the_guest_goes_on_and_nothing_is_left(rig, "finish_duplicate")


def test_a_driver_that_does_not_destroy_what_a_killed_restore_loaded_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedHypervisor, "destroy", lambda driver: None)
    for rig in simulated_rig():
        rig.patience_seconds = 2.0
        with pytest.raises(AssertionError, match="nothing is left after kill-after load"):
            HypervisorCrashes().test_a_restore_that_is_killed_leaves_nothing_and_works_again(rig, "load")


def test_a_driver_that_uses_a_duplicate_up_in_a_killed_failover_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rightly = SimulatedHypervisor.load

    def load(driver: SimulatedHypervisor, request: LoadRequest) -> LoadedVm:
        loaded = rightly(driver, request)
        request.images[0].path.unlink()
        return loaded

    monkeypatch.setattr(SimulatedHypervisor, "load", load)
    for rig in simulated_rig():
        with pytest.raises(HypervisorError, match="has lost"):
            HypervisorCrashes().test_a_failover_that_is_killed_loses_no_duplicate(rig, "load")
