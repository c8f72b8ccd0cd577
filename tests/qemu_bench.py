"""What the tests of the QEMU driver share: a real guest, a driver for it, and a place for everything."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.lab import WITH_BARE_DISK, LabMachine, available_qemus, find_qemu
from tests.left_out import EXHAUSTIVE
from vmsnap.model import CapturePlan, Duplicate, Moment
from vmsnap.roles import CaptureRequest, DriverContext, LoadedVm, LoadRequest
from vmsnap_drivers.hypervisors.qemu import QemuHypervisor

VERSIONS = [build.version for build in available_qemus()]
_EACH = [(version, capture) for version in VERSIONS for capture in ("cow", "precopy")]


def captures(*, other: bool = False) -> pytest.MarkDecorator:
    """Parametrizes `bench` and ``capture``: each QEMU by one way of capturing, in the suite; `other` by its other."""
    straight = [_EACH[0], *_EACH[3:]]
    chosen = [pair for pair in _EACH if (pair in straight) != other]
    return pytest.mark.parametrize(("bench", "capture"), _EACH if EXHAUSTIVE else chosen, indirect=["bench"])


@dataclass
class Captured:
    """What came of one capture of the lab's guest."""

    plan: CapturePlan
    duplicate: Duplicate
    paused: Moment
    resumed: Moment
    disks: dict[str, Path]

    @property
    def pause_seconds(self) -> float:
        return (self.resumed.wall_ns - self.paused.wall_ns) / 1e9


class Bench:
    """A guest, a driver for it, and a place for everything."""

    def __init__(self, folder: Path, machine: LabMachine) -> None:
        self.folder = folder
        self.machine = machine
        self.context = DriverContext(folder / "state", folder / "memory")
        self.context.state_dir.mkdir()
        self.context.memory_dir.mkdir()
        self.driver = self.new_driver()

    def new_driver(self, **options: str) -> QemuHypervisor:
        return QemuHypervisor("vm001", self.context, {"qmp": str(self.machine.qmp_socket), **options})

    def capture(
        self,
        name: str = "bk001",
        *,
        copy_disks: bool = False,
        during: Callable[[], None] | None = None,
        resume: bool = True,
    ) -> Captured:
        request = CaptureRequest(name, 60.0)
        driver = self.driver
        plan = driver.plan_capture(request)
        driver.prepare(request, plan)
        paused = driver.pause()
        disks = {}
        if copy_disks:
            for index, _ in enumerate(self.machine.disks):
                source = self.machine.disk_path(index)
                target = self.folder / f"{name}-{source.name}"
                shutil.copyfile(source, target)
                disks[f"disk{index}"] = target
        if during is not None:
            during()
        duplicate = driver.duplicate()
        resumed = driver.resume() if resume else paused
        duplicate = driver.finish_duplicate(duplicate, lambda _: None)
        return Captured(plan, duplicate, paused, resumed, disks)

    def loaded(self, captured: Captured, name: str, **changes: bool) -> tuple[QemuHypervisor, LoadedVm]:
        description = self.driver.describe()
        disks = tuple(replace(disk, address=str(captured.disks[disk.device]), handle={}) for disk in description.disks)
        loader = QemuHypervisor(name, self.context, {})
        request = LoadRequest(
            description.definition,
            captured.duplicate.images,
            captured.duplicate.device_state,
            disks,
            details=captured.duplicate.details,
            **changes,
        )
        return loader, loader.load(request)

    def settings(self) -> tuple[object, object]:
        oracle = self.machine.oracle
        return oracle.execute("query-migrate-parameters"), oracle.execute("query-migrate-capabilities")


@pytest.fixture
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="vmsnap-test-", dir="/dev/shm"))
    yield place
    shutil.rmtree(place)


class Machines:
    """One guest of each version, started when first needed, and again when a test has ended it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._machines: dict[str, LabMachine] = {}
        self._started = 0

    def running(self, version: str) -> LabMachine:
        machine = self._machines.get(version)
        if machine is None or machine.ended() or machine.faults():
            if machine is not None:
                machine.kill()
            self._started += 1
            machine = LabMachine(self._folder / f"guest{self._started}", find_qemu(version), disks=WITH_BARE_DISK)
            machine.start()
            self._machines[version] = machine
        machine.wait_for_count(machine.latest_count() + 20)
        return machine

    def kill(self) -> None:
        for machine in self._machines.values():
            machine.kill()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    place = Path(tempfile.mkdtemp(prefix="vmsnap-guests-", dir="/dev/shm"))
    machines = Machines(place)
    yield machines
    machines.kill()
    shutil.rmtree(place)


@pytest.fixture(params=VERSIONS)
def bench(request: pytest.FixtureRequest, folder: Path, machines: Machines) -> Iterator[Bench]:
    bench = Bench(folder, machines.running(request.param))
    yield bench
    bench.driver.close()


def with_capture(bench: Bench, capture: str) -> None:
    bench.driver.close()
    bench.driver = bench.new_driver(capture=capture)


def nothing_left(bench: Bench) -> bool:
    captures = bench.context.state_dir / "qemu" / "captures"
    return not any(bench.context.memory_dir.iterdir()) and not any(captures.glob("*"))


def serial_log(bench: Bench, name: str) -> Path:
    return bench.context.state_dir / "qemu" / "run" / name / "serial.log"
