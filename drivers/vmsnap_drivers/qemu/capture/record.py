"""What a capture has changed, written down before it is changed, so that any process can undo it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.durable import make_writable_folder
from vmsnap.model import Json, check_name, to_json
from vmsnap_drivers.qemu.capture.settings import Settings
from vmsnap_drivers.qemu.peer import boot_id, start_time
from vmsnap_drivers.qemu.smallfile import read_whole, write_whole

_DUPLICATE_MARK: Final = "-duplicate.json"


@dataclass(frozen=True)
class CaptureRecord:
    """One capture that is going on.

    :ivar pid: the QEMU whose settings were changed, with the time of its start
    :ivar worker_pid: the process that captures, with the time of its start
    """

    vm: str
    duplicate: str
    folder: Path
    capture: str
    boot: str
    pid: int
    pid_started: int
    worker_pid: int
    worker_started: int
    settings: Settings

    @classmethod
    def of_this_process(cls, vm: str, folder: Path, capture: str, pid: int, settings: Settings) -> CaptureRecord:
        """A capture by this process, of the QEMU `pid`, into `folder`, which has the duplicate's name."""
        us = os.getpid()
        times = (start_time(pid) or 0, start_time(us) or 0)
        return cls(vm, folder.name, folder, capture, boot_id(), pid, times[0], us, times[1], settings)

    def qemu_lives(self) -> bool:
        """Whether the very QEMU of the capture still runs."""
        return start_time(self.pid) == self.pid_started

    def worker_lives(self) -> bool:
        """Whether the very process that captures still runs."""
        return start_time(self.worker_pid) == self.worker_started


def place(folder: Path, vm: str) -> Path:
    """Where the record of a VM's capture is; `folder` is what the driver has for its state."""
    return folder / "captures" / f"{check_name(vm, 'VM name')}.json"


def write(path: Path, record: CaptureRecord) -> None:
    """Write the record, all or nothing.

    :raises VmsnapError: its folder cannot be written to
    """
    make_writable_folder(path.parent)
    write_whole(path, to_json(record))


def read(path: Path) -> CaptureRecord | None:
    """The record, or None where there is none or it is from before the host's last start.

    :raises HypervisorError: it is damaged
    """
    record = read_whole(path, CaptureRecord, "the record of a capture")
    return record if record is not None and record.boot == boot_id() else None


def duplicate_mark(driver: str) -> str:
    """A file of this name makes a folder a duplicate of the driver of that name."""
    return f"{driver}{_DUPLICATE_MARK}"


def make_duplicate_folder(driver: str, folder: Path, vm: str, details: Json) -> None:
    """Make the folder of a duplicate, 0700, and mark it as the driver's.

    :raises FileExistsError: there is one
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(mode=0o700)
    write_whole(folder / duplicate_mark(driver), to_json({"vm": vm, "details": details}))
