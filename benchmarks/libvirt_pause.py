"""How long a domain of libvirt's stands still for a live backup, beside what virsh offers, in one run.

    python -m benchmarks.libvirt_pause [--memory 1024] [--rounds 7] [--reference 3] [--docs]

Starts a libvirtd of its own (tests/lab/install.sh gets what it needs) with the lab's guest, so many MiB of touched,
non-zero RAM, which writes to its RAM and two disks all the time. It is backed up some times in a row by vmsnap, then
the same with ``-o memory=supported``; then come ``virsh snapshot-create-as --memspec … --live`` and ``virsh save`` with
``restore``. All pauses are from QEMU's event STOP to RESUME as libvirt tells them of, but that of save and restore:
from STOP until the restored domain runs again.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from benchmarks.document import markdown_table, replace_section
from benchmarks.pause_guest import LOAD, MIB, OWN_MIB, fill_memory, memory_mib_for
from tests.libvirt_stage import Stage, staged

DOCS = Path(__file__).resolve().parent.parent / "docs"
_FIRST_ROUNDS = 2
_TIMEOUT_SECONDS = 300.0


class Witness:
    """Sees every STOP and RESUME of a domain over a connection of its own."""

    def __init__(self, uri: str, name: str) -> None:
        """Connect, and listen."""
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._run, daemon=True).start()
        self._changed = threading.Condition()
        self._seen: list[tuple[str, float]] = []
        self._connection = libvirt.open(uri)
        libvirt_qemu.qemuMonitorEventRegister(
            self._connection, self._connection.lookupByName(name), None, self._told, None, 0
        )

    def pause_of(self, work: Callable[[], object]) -> float:
        """Seconds from the first STOP to the last RESUME during the work.

        :raises TimeoutError: the guest did not go on
        """
        with self._changed:
            begun = len(self._seen)
        work()
        with self._changed:
            if not self._changed.wait_for(lambda: self._names(begun)[-1:] == ["RESUME"], _TIMEOUT_SECONDS):
                raise TimeoutError(f"the guest does not go on: {self._seen[begun:]}")
            stops = [at for name, at in self._seen[begun:] if name == "STOP"]
            return self._seen[-1][1] - stops[0]

    def _names(self, begun: int) -> list[str]:
        return [name for name, _ in self._seen[begun:]]

    def _told(self, _: Any, __: Any, name: str, seconds: int, micros: int, *___: Any) -> None:
        if name in ("STOP", "RESUME"):
            with self._changed:
                self._seen.append((name, seconds + micros / 1e6))
                self._changed.notify_all()

    @staticmethod
    def _run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()


def main() -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args()
    memory_mib = memory_mib_for(options.memory * MIB)
    with staged(
        memory_mib=memory_mib,
        own_mib=OWN_MIB,
        stamp_mib=LOAD["stamp_mib"],
        dirty_pages=LOAD["dirty_pages"],
        pause_us=LOAD["pause_us"],
        stall_us=LOAD["stall_us"],
    ) as stage:
        fill_memory(stage.machine, _human_monitor(stage))
        rows = _measure(stage, options.rounds, options.reference)
    told = f"{os.cpu_count()} cores, Linux {platform.release()}, QEMU 7.2 under TCG, libvirt 9.0, {options.memory} MiB"
    text = f"{told}; load {os.getloadavg()[0]:.1f}\n\n{markdown_table(_HEAD, rows)}"
    print(text)
    if options.docs:
        replace_section("libvirt-pause", text, DOCS / "libvirt.md")
    return 0


def _human_monitor(stage: Stage) -> Callable[[str], str]:
    return lambda line: str(stage.machine.oracle.execute("human-monitor-command", command_line=line))


_HEAD = ("pause in milliseconds", "n", "first", "fifth", "median of the later", "min", "max")


def _measure(stage: Stage, rounds: int, reference: int) -> list[Sequence[str]]:
    witness = Witness(stage.libvirtd.uri, "vm001")
    rows = []
    for name, options in (("vmsnap", {}), ("vmsnap, `-o memory=supported`", {"memory": "supported"})):
        stage.controller.remove_vm("vm001")
        stage.controller.add_vm("vm001", "libvirt", {**stage.options, **options})
        pauses = []
        for number in range(rounds):
            pauses.append(
                witness.pause_of(lambda: stage.controller.backup("vm001", stage.repository, max_pause_seconds=20))
            )
            _say(f"{name}: {number + 1} of {rounds}: {pauses[-1] * 1000:.1f} ms")
        rows.append(_row(name, pauses))
    for name, work in (
        ("`virsh snapshot-create-as --memspec … --live`", _live_snapshot),
        ("`virsh save` and `restore`", _save_and_restore),
    ):
        pauses = []
        for number in range(reference):
            pauses.append(work(stage, witness))
            _say(f"{name}: {number + 1} of {reference}: {pauses[-1] * 1000:.1f} ms")
        rows.append(_row(name, pauses))
    stage.machine.note_process()
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    if faults := stage.machine.faults():
        raise SystemExit(f"the guest is not well: {faults}")
    return rows


def _live_snapshot(stage: Stage, witness: Witness) -> float:
    """Memory into a file in the host's memory, disks by overlays, which are put back afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-", dir="/dev/shm"))
    virsh, disks = stage.libvirtd.virsh, ("vda", "vdb")
    specs = [word for disk in disks for word in ("--diskspec", f"{disk},file={stage.place}/{disk}.over")]
    pause = witness.pause_of(
        lambda: virsh("snapshot-create-as", "vm001", "--memspec", f"{folder}/memory", "--live", "--no-metadata", *specs)
    )
    for disk in disks:
        virsh("blockcommit", "vm001", disk, "--active", "--pivot", "--wait")
        (stage.place / f"{disk}.over").unlink()
    (folder / "memory").unlink()
    folder.rmdir()
    return pause


def _save_and_restore(stage: Stage, witness: Witness) -> float:
    image = Path(tempfile.mkdtemp(prefix="vmsnap-", dir="/dev/shm")) / "memory"

    def work() -> None:
        stage.libvirtd.virsh("save", "vm001", str(image))
        stage.libvirtd.virsh("restore", str(image))

    try:
        return witness.pause_of(work)
    finally:
        image.unlink(missing_ok=True)
        image.parent.rmdir()


def _row(name: str, pauses: Sequence[float]) -> Sequence[str]:
    later = pauses[_FIRST_ROUNDS:] or pauses
    numbers = [statistics.median(later), min(later), max(later)]
    fifth = f"{pauses[4] * 1000:.1f}" if len(pauses) > 4 else "-"
    return [name, str(len(pauses)), f"{pauses[0] * 1000:.1f}", fifth, *(f"{number * 1000:.1f}" for number in numbers)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.libvirt_pause",
        description="How long a domain of libvirt's stands still for a live backup, beside what virsh offers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--memory", type=int, default=1024, metavar="MIB", help="touched, non-zero RAM, a multiple of 32")
    add("--rounds", type=int, default=7, help="live backups in each way, in a row")
    add("--reference", type=int, default=3, help="of each of virsh's")
    add("--docs", action="store_true", help="write the table into docs/libvirt.md")
    return parser


def _say(text: str) -> None:
    print(f"{time.strftime('%T')} {text} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
