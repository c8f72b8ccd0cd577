"""How long a guest stands still for a live backup, beside a plain stop-and-copy of the same guest.

    python -m benchmarks.pause [--memory 1 2 4 6] [--rounds 5] [--qemu 7.2 10.0] [--capture auto cow precopy]
                               [--json FILE] [--docs]

Boots the lab's guest (tests/lab/install.sh gets what it needs) with so many GiB of touched, non-zero RAM and one qcow2
disk, writing to its RAM and the disk all the time. It is backed up some times in a row; the first two pauses are told
apart from the later ones, as it is these that a machine lives with. Then come stop-and-copies and ``savevm``. With
``--json`` what was measured of other guests before, and written there, belongs to the tables too, so that a long
run can be made in pieces. Ctrl-C removes everything, as the end does. docs/pause.md has results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.document import replace_section
from benchmarks.pause_guest import GIB, room_for
from benchmarks.pause_measure import GuestResult, Order, measure
from benchmarks.pause_table import short_table, tables
from tests.lab import available_qemus, find_qemu
from vmsnap.errors import Interrupted
from vmsnap.model import from_json

_INTERRUPTED = 130
DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    order = Order(
        options.capture,
        options.rounds,
        options.copies,
        options.saves,
        options.max_pause,
        options.folder,
        options.repository_folder or options.folder,
    )
    results = _measured_before(options.json)
    left_out: list[str] = []
    code = 0
    try:
        for version in options.qemu:
            for memory_gib in options.memory:
                _measure_one(version, memory_gib, order, results, left_out)
    except (KeyboardInterrupt, Interrupted):
        _say("interrupted; the guests that were measured whole until then count")
        code = _INTERRUPTED
    if results:
        text = f"{_host()}\n\n{tables(results)}"
        print(f"\n{text}")
        if options.docs:
            replace_section("pause", f"```\n{text}\n```", DOCS / "pause.md")
            replace_section("pause", short_table(results), DOCS.parent / "README.md")
    for line in left_out:
        print(f"\nLEFT OUT: {line}")
    if options.json:
        options.json.write_text(json.dumps(_document(results, left_out), indent=1) + "\n")
    return code or (1 if left_out or not results else 0)


def _measure_one(
    version: str, memory_gib: float, order: Order, results: list[GuestResult], left_out: list[str]
) -> None:
    what = f"QEMU {version}, {memory_gib:g} GiB"
    room = room_for(int(memory_gib * GIB), order.repository_folder)
    if not room.suffices:
        left_out.append(f"{what}: does not fit: {room}")
        _say(left_out[-1])
        return
    begun = time.monotonic()

    def tell(text: str) -> None:
        _say(f"{what}: {text} ({time.monotonic() - begun:.0f} s, load {os.getloadavg()[0]:.1f})")

    result = measure(find_qemu(version), memory_gib, order, tell)
    results[:] = [old for old in results if (old.qemu, old.memory_gib) != (version, memory_gib)]
    results.append(result)
    results.sort(key=lambda result: (float(result.qemu), result.memory_gib))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pause",
        description="How long a guest stands still for a live backup, beside a plain stop-and-copy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    versions = [build.version for build in available_qemus()]
    add = parser.add_argument
    add("--memory", type=float, nargs="+", default=[1, 2, 4, 6], metavar="GIB", help="touched, non-zero RAM")
    add("--rounds", type=int, default=7, help="live backups of each guest in each way of capture, in a row")
    add("--copies", type=int, default=3, help="stop-and-copies of each guest, after them")
    add("--saves", type=int, default=1, help="savevm of each guest, after these")
    add("--qemu", nargs="+", default=versions, choices=versions, help="versions")
    add("--capture", nargs="+", default=["auto"], choices=["auto", "cow", "precopy"])
    add("--max-pause", type=float, default=5.0, metavar="SECONDS", help="give a backup up rather than pause longer")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the guest and its disks")
    add("--repository-folder", type=Path, help="for the repository; the same as --folder where it is not given")
    add("--json", type=Path, metavar="FILE", help="keep all measurements there")
    add("--docs", action="store_true", help="write the tables into docs/pause.md and README.md")
    return parser


def _measured_before(path: Path | None) -> list[GuestResult]:
    if path is None or not path.exists():
        return []
    return from_json(json.dumps(json.loads(path.read_text())["results"]), list[GuestResult])


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _host() -> str:
    found = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    total = int(found[1]) / (1 << 20) if found else 0
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, {total:.0f} GiB, Linux {platform.release()}, QEMU's TCG; load {load:.1f}"


def _document(results: list[GuestResult], left_out: list[str]) -> dict[str, Any]:
    return {
        "command": sys.argv[1:],
        "host": _host(),
        "results": [asdict(result) for result in results],
        "left_out": left_out,
    }


if __name__ == "__main__":
    sys.exit(main())
