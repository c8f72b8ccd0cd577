"""How long a guest stands still by the mechanism of its disk, with and without ``--freeze overlay``.

    python -m benchmarks.mechanism_pause [--only KIND…] [--rounds 7] [--data 512] [--qemu 7.2] [--json FILE] [--docs]

For each mechanism one of the lab's guests is booted (tests/lab/install.sh gets what they need), with one raw disk to
which it writes all the time. It is backed up in both ways in turn, the first of each not counted. All pauses are from
QEMU's event STOP to RESUME, seen past vmsnap. With ``--json`` what was measured of other mechanisms before, and written
there, belongs to the table too. Ctrl-C removes everything, as the end does. docs/pause.md has results. Needs root.

What needs a kernel that this host may not have runs in the storage guest, with a guest in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Final

from benchmarks.document import host, markdown_table, replace_section
from benchmarks.mechanism_devices import DEVICES
from benchmarks.mechanism_disks import FILES_AND_LUNS, WITNESS, Candidate, Guest, Order
from benchmarks.pause_reference import Witness
from tests.lab import available_qemus, find_qemu
from tests.lab.user_mode import UserModeGuest
from vmsnap.controller import Controller, Drivers
from vmsnap.controller.freezing import NO_FREEZE, OVERLAY
from vmsnap.errors import Interrupted
from vmsnap.host import HostFolders
from vmsnap.model import from_json
from vmsnap.places import create_repository
from vmsnap.repository import Repository

CANDIDATES: Final[Mapping[str, Candidate]] = {**FILES_AND_LUNS, **DEVICES}
ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs"
MAX_PAUSE_SECONDS: Final = 100.0
COUNTS_BETWEEN: Final = 30
"""So far the guest counts, and writes, before each backup."""
BOOT_SECONDS: Final = 240.0
_INTERRUPTED: Final = 130
_STORAGE_GUEST_SECONDS: Final = 3600.0
_HEAD: Final = (
    "mechanism and disk", "n", "pause", "max", "`--freeze overlay`", "max", "ratio", "the overlay lives",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One guest: the pauses in seconds without and with frozen disks, and how long overlays lived; and on what."""

    kind: str
    rounds: int
    qemu: str
    data_mib: int
    load: float
    plain: tuple[float, ...]
    frozen: tuple[float, ...]
    lives: tuple[float, ...]


def main() -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    results = _measured_before(options.json)
    order = Order(find_qemu(options.qemu), options.data)
    code = 0
    try:
        for kind in options.only:
            if kind in DEVICES and not options.here:
                results[kind] = _measure_in_the_storage_guest(kind, options)
            else:
                results[kind] = _measure(kind, CANDIDATES[kind], order, options.rounds, options.folder)
            if options.json:
                options.json.write_text(json.dumps([asdict(result) for result in results.values()], indent=1) + "\n")
    except (KeyboardInterrupt, Interrupted):
        _say("interrupted; the mechanisms that were measured whole until then count")
        code = _INTERRUPTED
    if results and not options.here:
        text = _text(results)
        print(text)
        if options.docs:
            replace_section("mechanisms", text, DOCS / "pause.md")
    return code


def _measure(kind: str, candidate: Candidate, order: Order, rounds: int, parent: Path) -> Measured:
    """Back one guest up in both ways, in turn.

    :raises SystemExit: the guest found a fault
    """
    place = Path(tempfile.mkdtemp(prefix="vmsnap-", dir=parent))
    load = os.getloadavg()[0]
    pauses: dict[str, list[float]] = {NO_FREEZE: [], OVERLAY: []}
    lives: list[float] = []
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        guest = stack.enter_context(candidate.lay(place, order))
        machine = stack.enter_context(guest.machine)
        machine.wait_for_check(1, BOOT_SECONDS)
        controller = stack.enter_context(_controller(place, guest, stack.callback))
        repository = create_repository(str(place / "repository"))
        witness = Witness(machine.folder / WITNESS)
        stack.callback(witness.close)
        for number in range(rounds + 1):
            # Which comes first changes, as the first leaves the disk's data in the host's memory for the second.
            for freeze in (NO_FREEZE, OVERLAY) if number % 2 else (OVERLAY, NO_FREEZE):
                machine.wait_for_count(machine.latest_count() + COUNTS_BETWEEN)
                seen, begun = witness.seen(), time.monotonic()
                backup = controller.backup("vm001", repository, max_pause_seconds=MAX_PAUSE_SECONDS, freeze=freeze)
                pause = witness.pause_since(seen)
                _say(
                    f"{kind}, round {number} of {rounds}, --freeze {freeze}: {pause * 1000:.1f} ms,"
                    f" {time.monotonic() - begun:.1f} s in all"
                )
                if number:
                    pauses[freeze].append(pause)
                    lives += _overlay_life(controller, repository, backup.backup)
        machine.wait_for_check(machine.latest_check() + 1)
        if faults := machine.faults():
            raise SystemExit(f"the guest of {kind} is not well: {faults}")
    plain, frozen = (tuple(pauses[freeze]) for freeze in (NO_FREEZE, OVERLAY))
    return Measured(kind, rounds, order.build.version, order.data_mib, load, plain, frozen, tuple(lives))


def _measure_in_the_storage_guest(kind: str, options: argparse.Namespace) -> Measured:
    """The same by this program in there; the load is this host's.

    :raises SystemExit: it failed
    """
    # fmt: off
    words = [
        sys.executable, "-m", "benchmarks.mechanism_pause", "--here", "--only", kind, "--rounds", str(options.rounds),
        "--data", str(options.data), "--qemu", options.qemu, "--json", "/run/results/measured.json",
    ]
    # fmt: on
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vmsnap-") as folder, UserModeGuest(Path(folder)) as guest:
        script = f"export PATH=/usr/sbin:/usr/bin:/sbin:/bin\ncd {shlex.quote(str(ROOT))}\nexec {shlex.join(words)}\n"
        ended = guest.run("measure", script, _STORAGE_GUEST_SECONDS)
        sys.stderr.write(ended.output)
        if ended.status:
            raise SystemExit(f"in the storage guest it ended with {ended.status}")
        return replace(_measured_before(guest.results / "measured.json")[kind], load=load)


def _controller(place: Path, guest: Guest, at_the_end: Callable[..., object]) -> Controller:
    folders = HostFolders.find(place / "state")
    at_the_end(shutil.rmtree, folders.memory_dir, ignore_errors=True)
    controller = Controller(folders, drivers=Drivers(folders.context(), {guest.mechanism: dict(guest.options)}))
    reach = {"qmp": str(guest.machine.qmp_socket), "plain_files": "yes"}
    controller.add_vm("vm001", "qemu", reach, {"disk0": guest.mechanism})
    return controller


def _overlay_life(controller: Controller, repository: Repository, backup: str) -> list[float]:
    """For how long the guest wrote to an overlay, in seconds; nothing where it did not."""
    moments = {moment.name: moment.wall_ns for moment in repository.manifest(backup).moments}
    operation = controller.journal.operations("vm001")[-1].operation
    ends = {entry.instruction: entry.ended_ns for entry in controller.journal.open_operation(operation).entries()}
    begun, ended = moments.get("freeze"), ends.get("thaw")
    return [] if begun is None or ended is None else [(ended - begun) / 1e9]


def _text(results: Mapping[str, Measured]) -> str:
    measured = [results[kind] for kind in CANDIDATES if kind in results]
    loads = sorted(result.load for result in measured)
    qemus = " and ".join(sorted({result.qemu for result in measured}))
    data = " and ".join(str(data) for data in sorted({result.data_mib for result in measured}))
    told = f"{host()}; QEMU {qemus} under TCG, {data} MiB of data on a file; load {loads[0]:.1f} to {loads[-1]:.1f}"
    return f"{told}\n\n{markdown_table(_HEAD, map(_row, measured))}"


def _row(measured: Measured) -> Sequence[str]:
    candidate = CANDIDATES[measured.kind]
    pauses = [
        f"{of(pauses) * 1000:.1f} ms" for pauses in (measured.plain, measured.frozen) for of in (statistics.median, max)
    ]
    ratio = statistics.median(measured.plain) / statistics.median(measured.frozen)
    lives = f"{statistics.median(measured.lives):.2f} s" if measured.lives else "none is needed"
    return [f"{candidate.mechanism}: {candidate.disk}", str(measured.rounds), *pauses, f"{ratio:.1f}", lives]


def _measured_before(path: Path | None) -> dict[str, Measured]:
    if path is None or not path.exists():
        return {}
    return {result.kind: result for result in from_json(path.read_bytes(), list[Measured])}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mechanism_pause",
        description="How long a guest stands still by the mechanism of its disk, with and without --freeze overlay.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    versions = [build.version for build in available_qemus()]
    add = parser.add_argument
    add("--only", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES), help="which mechanisms")
    add("--rounds", type=int, default=7, help="backups of each guest in each way, in turn")
    add("--data", type=int, default=512, metavar="MIB", help="data on each disk that can hold it, a multiple of 4")
    add("--qemu", default=versions[0], choices=versions, help="version; LUNs need one that has an initiator")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for everything")
    add("--json", type=Path, metavar="FILE", help="keep all measurements there")
    add("--here", action="store_true", help="measure all of it here; for the storage guest itself")
    add("--docs", action="store_true", help="write the table into docs/pause.md")
    return parser


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"{time.strftime('%T')} {text} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
