"""Where this driver keeps what: duplicates, and the VMs that it loaded. Each is found again by its name alone."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmsnap.model import Disk, Json, check_name, from_json, to_json
from vmsnap.roles import DriverContext
from vmsnap_hmp.processes import Process

NAME = "hmp"


@dataclass(frozen=True)
class DuplicateMark:
    """Says in a duplicate's folder whose it is."""

    vm: str
    finished: bool


class DuplicatePlace:
    """The folder of one duplicate."""

    def __init__(self, context: DriverContext, name: str) -> None:
        """No I/O.

        :raises UsageError: the name would leave its folder
        """
        self.folder = context.memory_dir / check_name(name, "duplicate name")
        self.ram = self.folder / "ram"
        self.device_state = self.folder / "device-state"
        self._mark = self.folder / f"{NAME}.json"

    def make(self, vm: str) -> None:
        """Make it, for a capture of `vm`.

        :raises FileExistsError: there is one of that name
        """
        self.folder.mkdir(mode=0o700)
        self.mark(DuplicateMark(vm, finished=False))

    def mark(self, mark: DuplicateMark) -> None:
        """Say whose it is, at once or not at all."""
        partial = self._mark.with_suffix(".partial")
        partial.write_text(to_json(mark))
        partial.rename(self._mark)

    def marked(self) -> DuplicateMark | None:
        """Whose it is; None where it is none of this driver's."""
        try:
            return from_json(self._mark.read_text(), DuplicateMark)
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        """Remove it, if it is one of ours; the mark last, so that it is found again if we die here. Idempotent."""
        if self.marked() is None:
            return
        for path in self.folder.iterdir():
            if path != self._mark:
                path.unlink()
        shutil.rmtree(self.folder)


def duplicates(context: DriverContext) -> Iterator[tuple[DuplicatePlace, DuplicateMark]]:
    """All duplicates of this driver."""
    for mark in sorted(context.memory_dir.glob(f"*/{NAME}.json")):
        place = DuplicatePlace(context, mark.parent.name)
        found = place.marked()
        if found is not None:
            yield place, found


@dataclass(frozen=True)
class LoadedRecord:
    """What is kept of a VM that was loaded; `process` is None until QEMU runs. `takeover`: in place of another."""

    vm: str
    monitor: Path
    definition: Json
    disks: tuple[Disk, ...]
    process: Process | None = None
    takeover: bool = False


class LoadedPlace:
    """The folder of one loaded VM, and its RAM."""

    def __init__(self, context: DriverContext, vm: str) -> None:
        """No I/O."""
        self.folder = context.state_dir / NAME / "run" / check_name(vm, "VM name")
        # "~" stands in no name: it cannot be a duplicate's
        self.ram = context.memory_dir / f"{vm}~ram"
        self.pidfile = self.folder / "pid"
        self.monitor = self.folder / "monitor"
        self.device_state = self.folder / "device-state"
        self._record = self.folder / "vm.json"

    def keep(self, record: LoadedRecord) -> None:
        """Write the record, at once or not at all."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self._record.with_suffix(".partial")
        partial.write_text(to_json(record))
        partial.rename(self._record)

    def record(self) -> LoadedRecord | None:
        """The record; None where nothing was loaded."""
        try:
            return from_json(self._record.read_text(), LoadedRecord)
        except (OSError, ValueError):
            return None

    def process(self) -> Process | None:
        """QEMU, if it lives, also where we died between its start and the record of it."""
        record = self.record()
        if record is not None and record.process is not None:
            return record.process if record.process.lives() else None
        try:
            return Process.of(int(self.pidfile.read_text()))
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        """Remove folder and RAM; idempotent.

        The socket of a VM whose place was taken stays, dead, as it was found: that nobody listens on it is what shows
        that the VM does not run.
        """
        self.ram.unlink(missing_ok=True)
        record = self.record()
        if record is not None and record.takeover:
            _leave_dead(record.monitor)
        elif record is not None and record.monitor != self.monitor:
            record.monitor.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _leave_dead(path: Path) -> None:
    """See that there is a socket on which nobody listens; QEMU removes its own when it is told to end."""
    if not path.exists():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))


def loaded(context: DriverContext) -> Iterator[tuple[LoadedPlace, LoadedRecord]]:
    """All VMs that were loaded and not destroyed."""
    for path in sorted((context.state_dir / NAME / "run").glob("*/vm.json")):
        place = LoadedPlace(context, path.parent.name)
        record = place.record()
        if record is not None:
            yield place, record
