"""How long it takes from the command to the running guest when a held duplicate takes the place of a killed VM.

    python -m benchmarks.failover [--memory 1 2 4 6] [--rounds 3] [--qemu 7.2 10.0] [--docs]

Boots the lab's guest (tests/lab/install.sh gets what it needs) with so many GiB of touched, non-zero RAM and two disks.
Each round backs it up with `--keep-duplicate`, kills it, and runs the command `vmsnap failover`. Beside it, once for
each guest: the same state loaded the ordinary way, every page of RAM sent to `-incoming`, and `vmsnap restore --run` of
its newest backup. Ctrl-C removes everything, as the end does. --docs writes the table into docs/failover.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from benchmarks.document import host, markdown_table, replace_section
from benchmarks.pause_guest import GIB, FilledMachine, room_for
from tests.lab import available_qemus, find_qemu
from vmsnap.controller import Controller
from vmsnap.heldduplicates import HeldDuplicate, HeldDuplicates
from vmsnap.host import HostFolders
from vmsnap.model import Disk
from vmsnap.places import create_repository
from vmsnap.roles import LoadRequest
from vmsnap_drivers.hypervisors.qemu import QemuHypervisor, launch
from vmsnap_drivers.qemu.peer import listener

PAGE = Path(__file__).resolve().parent.parent / "docs" / "failover.md"
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Failovers:
    """What was measured on one guest: seconds.

    `commands` is from the start of the process `vmsnap` to its end, the guest running; `calls` what it says itself,
    from the call of the verb to the running guest; `mapped` and `ordinary` are load and resume alone, beside nothing;
    `restored` is `vmsnap restore --run`, from the start of the process to its end.
    """

    qemu: str
    memory_gib: float
    commands: tuple[float, ...]
    calls: tuple[float, ...]
    mapped: float
    ordinary: float
    restored: float


def main() -> int:
    """Measure, print, write; returns the exit code."""
    options = _options()
    signal.signal(signal.SIGTERM, _interrupt)
    results: list[Failovers] = []
    try:
        for memory_gib in options.memory:
            for version in options.qemu:
                room = room_for(int(memory_gib * GIB), options.folder)
                if not room.suffices:
                    print(f"LEFT OUT: QEMU {version}, {memory_gib:g} GiB: does not fit: {room}", file=sys.stderr)
                    continue
                results.append(measure(version, memory_gib, options.rounds, options.folder))
                print(results[-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted; the guests that were measured whole until then count", file=sys.stderr)
    results.sort(key=lambda result: (float(result.qemu), result.memory_gib))
    text = _table(results)
    print(text)
    if options.docs and results:
        replace_section("failover", text, PAGE)
    return 0 if results else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def measure(version: str, memory_gib: float, rounds: int, folder: Path) -> Failovers:
    """Boot a guest and let its duplicates take over, one after the other."""
    with ExitStack() as stack:
        place = Path(tempfile.mkdtemp(prefix="vmsnap-failover-", dir=folder))
        stack.callback(shutil.rmtree, place)
        folders = HostFolders.find(place / "state")
        stack.callback(shutil.rmtree, folders.memory_dir, ignore_errors=True)
        controller = stack.enter_context(Controller(folders))
        machine = stack.enter_context(FilledMachine(place / "vm001", find_qemu(version), int(memory_gib * GIB)))
        machine.wait_for_count(20, timeout_seconds=180)
        machine.fill()
        controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        stack.callback(_kill, machine.qmp_socket)
        url = str(place / "repository")
        repository = create_repository(url)
        commands, calls, beside = [], [], (0.0, 0.0)
        for number in range(rounds):
            backup = controller.backup("vm001", repository, keep_duplicate=True).backup
            _kill(machine.qmp_socket)
            machine.kill()
            if not number:
                (held,) = HeldDuplicates(controller.table.database).all("vm001")
                beside = (_load_beside(controller, held, place, 0), _load_beside(controller, held, place, 1 << 62))
            command, answer = _vmsnap(place / "state", "failover", "vm001")
            commands.append(command)
            calls.append(float(answer["seconds"]))
        _kill(machine.qmp_socket)
        restored, answer = _vmsnap(place / "state", "--repository", url, "restore", backup, "--as", "vm002", "--run")
        _kill(Path(answer["options"]["qmp"]))
        return Failovers(version, memory_gib, tuple(commands), tuple(calls), *beside, restored)


def _vmsnap(state_dir: Path, *words: str) -> tuple[float, dict[str, Any]]:
    """Run a command; returns its seconds and its answer."""
    argv = [str(Path(sys.executable).parent / "vmsnap"), "--state-dir", str(state_dir), "--json", *words]
    begun = time.monotonic()
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    seconds = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(f"vmsnap {' '.join(words)} failed: {done.stderr}")
    return seconds, json.loads(done.stdout)


def _load_beside(controller: Controller, held: HeldDuplicate, place: Path, smallest_mapped_bytes: int) -> float:
    """Load the duplicate beside everything, isolated, on copies of its disks; blocks of RAM smaller than so much are
    sent through the stream, all others mapped."""
    disks = tuple(replace(each.disk, address=str(_copied(each.disk, place))) for each in held.disks)
    capture = held.capture
    request = LoadRequest(
        held.definition, capture.images, capture.device_state, disks, isolated=True, details=capture.details
    )
    driver = QemuHypervisor("beside", controller.folders.context(), {})
    smallest = max(smallest_mapped_bytes, launch.SMALLEST_MAPPED_BYTES)
    with mock.patch.object(launch, "SMALLEST_MAPPED_BYTES", smallest):
        begun = time.monotonic()
        driver.load(request)
        driver.resume()
        seconds = time.monotonic() - begun
    driver.destroy()
    for disk in disks:
        Path(disk.address).unlink()
    return seconds


def _copied(disk: Disk, place: Path) -> Path:
    copy = place / f"beside-{Path(disk.address).name}"
    subprocess.run(["cp", "--sparse=always", disk.address, str(copy)], check=True)
    return copy


def _kill(socket: Path) -> None:
    """Kill the VM behind a monitor, if one is there, and wait until it is gone."""
    pid = listener(socket)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    while listener(socket) is not None:
        time.sleep(_POLL_SECONDS)


def _table(results: Sequence[Failovers]) -> str:
    rows = []
    for result in results:
        worst = max(result.commands)
        rows.append(
            (
                f"{result.qemu}, {result.memory_gib:g} GiB",
                f"{statistics.median(result.commands):.2f} s",
                f"{worst:.2f} s",
                f"{statistics.median(result.calls):.2f} s",
                f"{result.mapped:.2f} s",
                f"{result.ordinary:.2f} s",
                f"{result.restored:.2f} s",
            )
        )
    head = ("QEMU, RAM", "command, median", "worst", "its own count", "load alone", "ordinary load", "restore --run")
    line = f"`python -m benchmarks.failover {' '.join(sys.argv[1:])}` on {host()}; load {os.getloadavg()[0]:.1f}"
    return f"{line}\n\n{markdown_table(head, rows)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failover", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    versions = [build.version for build in available_qemus()]
    add = parser.add_argument
    add("--memory", type=float, nargs="+", default=[1, 2, 4, 6], metavar="GIB", help="touched, non-zero RAM")
    add("--rounds", type=int, default=3, help="failovers of each guest")
    add("--qemu", nargs="+", default=versions, choices=versions, help="versions")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for guest, disks and repository")
    add("--docs", action="store_true", help="write the table into docs/failover.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
