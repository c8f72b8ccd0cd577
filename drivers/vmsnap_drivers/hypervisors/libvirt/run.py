"""The run folder of a domain that we loaded: its mark, written before the domain is made, its sockets and logs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.durable import make_writable_folder
from vmsnap.model import to_json
from vmsnap_drivers.qemu.smallfile import read_whole, write_whole

MARK_NAME: Final = "loaded.json"


@dataclass(frozen=True)
class LoadedMark:
    """Which domain it is, of which libvirt.

    :ivar takeover: libvirt knew it before, so that it is ended, and not forgotten
    :ivar disks: the files that it writes to
    """

    vm: str
    uri: str
    domain: str
    uuid: str
    takeover: bool
    disks: tuple[str, ...]


def run_folder(state_folder: Path, vm: str) -> Path:
    """The folder of a loaded VM."""
    return state_folder / "run" / vm


def write_mark(folder: Path, mark: LoadedMark) -> None:
    """Make the folder, 0700, if it is not there, and mark it.

    :raises VmsnapError: it cannot be made
    """
    make_writable_folder(folder)
    write_whole(folder / MARK_NAME, to_json(mark))


def read_mark(folder: Path) -> LoadedMark | None:
    """Who was loaded into a run folder; None: nobody.

    :raises HypervisorError: the mark is damaged
    """
    return read_whole(folder / MARK_NAME, LoadedMark, "the mark of a loaded VM")


def all_marks(state_folder: Path) -> Iterator[LoadedMark]:
    """Those of all loaded VMs."""
    runs = state_folder / "run"
    for folder in sorted(runs.iterdir()) if runs.is_dir() else ():
        mark = read_mark(folder)
        if mark is not None:
            yield mark
