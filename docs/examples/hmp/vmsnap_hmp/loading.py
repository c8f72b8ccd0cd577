"""Bringing a captured machine to life: all or nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk, Json
from vmsnap_hmp.commandline import CommandLine
from vmsnap_hmp.locks import is_written_by_somebody
from vmsnap_hmp.monitor import MAX_SOCKET_PATH, Monitor
from vmsnap_hmp.places import LoadedPlace, LoadedRecord
from vmsnap_hmp.processes import Process
from vmsnap_hmp.state import load_devices


@dataclass(frozen=True)
class Definition:
    """What `describe` keeps of a machine, for a later `load`."""

    program: str
    variables: dict[str, str]
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, kept: Json) -> Definition:
        """The definition that came back from a manifest.

        :raises HypervisorError: it is none
        """
        try:
            return cls(str(kept["program"]), dict(kept["variables"]), tuple(kept["arguments"]))
        except (KeyError, TypeError, ValueError) as e:
            raise HypervisorError(f"this is no definition of a VM of the driver hmp: {e!r}") from e

    def plain(self) -> Json:
        """As JSON."""
        return {"program": self.program, "variables": self.variables, "arguments": list(self.arguments)}

    @property
    def line(self) -> CommandLine:
        """The arguments, understood."""
        return CommandLine.parse(self.arguments)


def check_disks(vm: str, line: CommandLine, disks: Sequence[Disk], own: Sequence[Disk] = ()) -> None:
    """See that these are all its disks, that they can be opened, and that nobody writes to them.

    :param own: those that it has already, and writes to itself
    :raises HypervisorError: one is wrong; nothing was touched
    """
    if sorted(disk.device for disk in disks) != sorted(line.drives()):
        raise HypervisorError(f"{vm} needs the disks {', '.join(line.drives())}, and no others")
    if len({os.path.realpath(disk.address) for disk in disks}) != len(disks):
        raise HypervisorError(f"{vm}: one image cannot be two disks")
    for disk in disks:
        try:
            mine = any(Path(disk.address).samefile(had.address) for had in own)
            in_use = not mine and disk.device not in line.read_only() and is_written_by_somebody(Path(disk.address))
        except OSError as e:
            raise HypervisorError(f"{disk.device} of {vm} at {disk.address}: {e.strerror}") from e
        if in_use:
            raise HypervisorError(f"{disk.device} of {vm} at {disk.address} is a disk of another VM that runs")


def start(place: LoadedPlace, record: LoadedRecord, timeout_seconds: float) -> None:
    """Start QEMU on the record's disks and the place's RAM and device state; it stands still afterwards.

    :raises HypervisorError: it did not come up; no process is left
    """
    definition = Definition.of(record.definition)
    place.pidfile.unlink(missing_ok=True)
    record.monitor.unlink(missing_ok=True)
    addresses = {disk.device: disk.address for disk in record.disks}
    arguments = definition.line.for_loaded(record.vm, place.ram, addresses, record.monitor, place.pidfile)
    place.keep(replace(record, process=None))
    try:
        done = subprocess.run(
            [definition.program, *arguments],
            env={"PATH": os.defpath, **definition.variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=place.folder,
            timeout=timeout_seconds,
        )
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise HypervisorError(f"{record.vm} did not start: {why}")
        place.keep(replace(record, process=Process.of(int(place.pidfile.read_text()))))
        load_devices(Monitor(record.vm, record.monitor), place.device_state, timeout_seconds)
    except (OSError, ValueError, subprocess.SubprocessError, HypervisorError) as e:
        stop(place, timeout_seconds)
        if isinstance(e, HypervisorError):
            raise
        raise HypervisorError(f"{record.vm} did not start: {e}") from e
    place.device_state.unlink()


def stop(place: LoadedPlace, timeout_seconds: float) -> None:
    """End its process, if it has one; idempotent."""
    process = place.process()
    if process is not None:
        process.kill(timeout_seconds)


def take_over_image(image: Path, ram: Path, *, disposable: bool) -> None:
    """Make an image the RAM of a VM: under a second name where nobody else needs it, else by a copy.

    :raises OSError: no room
    """
    if disposable and image.stat().st_dev == ram.parent.stat().st_dev:
        os.link(image, ram)
        return
    shutil.copyfile(image, ram)
    ram.chmod(0o600)


def check_monitor_path(path: Path) -> None:
    """See that a socket can have this name.

    :raises HypervisorError: it is too long
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise HypervisorError(f"{path} is too long for a socket", cure="give a shorter one: -o monitor=PATH")
