"""Takes the measurements of one guest: live backups and stop-and-copies in turn, under the same load."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pause_guest import GIB, FilledMachine
from benchmarks.pause_reference import CopyPause, Witness
from tests.lab import QemuBuild
from tests.lab.serial import Stall
from vmsnap.controller import Controller
from vmsnap.errors import Interrupted, VmsnapError
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap.repository import Repository
from vmsnap.roles import CaptureRequest
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import mapped_memory

_QUIET_SECONDS = 5
_ROUND_TRIPS = 200


@dataclass(frozen=True)
class GuestView:
    """What the guest itself noticed in some seconds."""

    stopped_seconds: float
    """For how long the whole machine was stopped, by the mainboard's clock against the guest's own; all stops together,
    because the moment at which a second ends is seen late by a guest that waits just then, and that evens out."""
    waited_seconds: float
    """The longest time that a real-time thread waited although the machine was running, by the guest's own clock,
    which stands still while the machine is stopped: for a page, or for the host's processor.
    """

    @classmethod
    def of(cls, stalls: Sequence[Stall]) -> GuestView:
        """Sum up what the guest said each second."""
        return cls(sum(stall.stopped_us for stall in stalls) / 1e6, max(stall.longest_us for stall in stalls) / 1e6)


@dataclass(frozen=True)
class LivePause:
    """One live backup."""

    wanted_capture: str
    capture: str
    pause_seconds: float
    """STOP to RESUME by QEMU's events, as vmsnap reported it."""
    witnessed_seconds: float
    """The same, seen by the benchmark's own monitor."""
    predicted_seconds: float | None
    moments: tuple[tuple[str, float], ...]
    """What the manifest says of the pause: each moment's name and its time since STOP, in seconds."""
    steps: tuple[tuple[str, float], ...]
    """What QEMU says of its migration in the pause, likewise."""
    guest: GuestView
    small_page_bytes: int
    """Of QEMU's memory before the backup: in pages of 4 KiB, and in huge pages."""
    huge_page_bytes: int
    backup_seconds: float
    load: float
    """The host's load average when it began."""


@dataclass
class GuestResult:
    """All that was measured on one guest."""

    qemu: str
    memory_gib: float
    quiet: GuestView
    live: list[LivePause]
    copies: list[CopyPause]
    copy_views: list[GuestView]
    saved_seconds: list[float]
    """STOP to RESUME of ``savevm``."""
    round_trip_seconds: float
    """One question and its answer by vmsnap's own connection to QEMU's monitor, the median of many."""
    failures: dict[str, str]
    """Ways of capture that were refused or failed, with the first reason."""


@dataclass(frozen=True)
class Order:
    """What to measure on each guest."""

    captures: Sequence[str]
    rounds: int
    copies: int
    saves: int
    max_pause_seconds: float
    folder: Path
    repository_folder: Path


def measure(build: QemuBuild, memory_gib: float, order: Order, tell: Callable[[str], None]) -> GuestResult:
    """Start a guest, measure it, and remove all that was made for it. Blocks for minutes.

    :raises VmsnapError: vmsnap failed in a way that is no refusal of a capture
    :raises GuestMemoryError: the guest failed
    """
    with (
        _folder(order.folder) as folder,
        FilledMachine(folder / "guest", build, int(memory_gib * GIB)) as machine,
        _controller(folder / "state") as controller,
        _repository(order.repository_folder) as repository,
    ):
        machine.wait_for_check(100)
        machine.fill()
        tell("the guest runs, its memory is filled")
        witness = Witness(machine.witness_socket)
        begun = len(machine.serial_text())
        for _ in range(_QUIET_SECONDS):
            machine.stalls_since(len(machine.serial_text()))
        quiet = _view(machine, begun)
        result = GuestResult(build.version, memory_gib, quiet, [], [], [], [], _round_trip(machine), {})
        for capture in order.captures:
            options = {"qmp": str(machine.qmp_socket), "capture": capture}
            controller.add_vm(f"vm-{capture}", "qemu", options)
        for number in range(order.rounds):
            for capture in order.captures:
                if capture not in result.failures:
                    _back_up(machine, witness, controller, repository, capture, order, result)
            tell(f"round {number + 1} of {order.rounds}")
        for number in range(order.copies):
            begun = len(machine.serial_text())
            result.copies.append(witness.stop_and_copy())
            result.copy_views.append(_view(machine, begun))
            tell(f"stop-and-copy {number + 1} of {order.copies}")
        for number in range(order.saves):
            result.saved_seconds.append(witness.save_internally())
            tell(f"savevm {number + 1} of {order.saves}")
        machine.wait_for_check(machine.latest_count() + 1)
        witness.close()
        return result


def _back_up(
    machine: FilledMachine,
    witness: Witness,
    controller: Controller,
    repository: Repository,
    capture: str,
    order: Order,
    result: GuestResult,
) -> None:
    vm = f"vm-{capture}"
    load = os.getloadavg()[0]
    pages = mapped_memory(machine.pid)
    said, seen = len(machine.serial_text()), witness.seen()
    try:
        predicted = _predicted_seconds(controller, vm, order.max_pause_seconds)
        done = controller.backup(vm, repository, max_pause_seconds=order.max_pause_seconds)
    except Interrupted:
        raise
    except VmsnapError as e:
        result.failures[capture] = str(e)
        return
    moments = repository.manifest(done.backup).moments
    first = moments[0].wall_ns
    result.live.append(
        LivePause(
            wanted_capture=capture,
            capture=done.capture,
            pause_seconds=done.pause_seconds,
            witnessed_seconds=witness.pause_since(seen),
            predicted_seconds=predicted,
            moments=tuple((moment.name, (moment.wall_ns - first) / 1e9) for moment in moments),
            steps=witness.steps_since(seen),
            guest=_view(machine, said),
            small_page_bytes=pages.small_bytes,
            huge_page_bytes=pages.huge_bytes,
            backup_seconds=done.seconds,
            load=load,
        )
    )


def _round_trip(machine: FilledMachine) -> float:
    taken = []
    with Monitor.borrow(machine.qmp_socket) as monitor:
        for _ in range(_ROUND_TRIPS):
            begun = time.perf_counter()
            monitor.execute("query-status")
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _view(machine: FilledMachine, begun: int) -> GuestView:
    return GuestView.of(machine.stalls_since(begun))


def _predicted_seconds(controller: Controller, vm: str, max_pause_seconds: float) -> float | None:
    row = controller.table.get(vm)
    driver = controller.drivers.hypervisor(row.hypervisor, row.vm, row.options)
    try:
        return driver.plan_capture(CaptureRequest("bk-benchmark", max_pause_seconds)).predicted_pause_seconds
    finally:
        driver.close()


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-pause-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _controller(state_dir: Path) -> Iterator[Controller]:
    folders = HostFolders.find(state_dir)
    try:
        with Controller(folders) as controller:
            yield controller
    finally:
        shutil.rmtree(folders.memory_dir, ignore_errors=True)


@contextmanager
def _repository(parent: Path) -> Iterator[Repository]:
    with _folder(parent) as folder:
        yield create_repository(str(folder / "repository"))
