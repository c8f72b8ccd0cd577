"""Where a thin volume has data, and where two of them differ, read from the pool's metadata while it is in use.

The pool reserves a snapshot of its metadata for the tools of thin-provisioning-tools 0.9 (thin_dump(8), thin_delta(8));
there is one such snapshot, which is released at once. Before it is reserved a note is written, so that one whose maker
was killed is known to be ours. What the tools say and nobody here knows is an error: taken for nothing, it would be
data that is not read.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.durable import make_writable_folder
from vmsnap.errors import DriverUnavailable, SnapshotError
from vmsnap.model import Extent
from vmsnap_drivers.runs import Runs
from vmsnap_drivers.snapshots.lvm.commands import Lvm, device_name
from vmsnap_drivers.snapshots.lvm.volumes import Volume

INSTALL: Final = "install thin-provisioning-tools"
_SECTOR_BYTES: Final = 512
_ENDING_SECONDS: Final = 60.0
_TURN_SECONDS: Final = 600.0
_POLL_SECONDS: Final = 0.05
_BLOCK_SIZE: Final = re.compile(r'<superblock [^>]*data_block_size="(\d+)"')
_SINGLE: Final = re.compile(r'<single_mapping origin_block="(\d+)"')
_RANGE: Final = re.compile(r'<range_mapping origin_begin="(\d+)" data_begin="\d+" length="(\d+)"')
_DIFFERENCE: Final = re.compile(r'<(?:different|left_only|right_only) begin="(\d+)" length="(\d+)"')
_END: Final = "</superblock>"

Find = Callable[[str], tuple[int, int] | None]
"""Finds begin and length, in blocks of the pool, in a line."""


@dataclass(frozen=True)
class Report:
    """What is expected of a tool's XML, an element a line, in ascending order.

    :ivar find: finds what is looked for
    :ivar begins: the element that it stands in
    :ivar others: what else may begin a line
    """

    find: Find
    begins: str
    others: tuple[str, ...]


class ThinMaps:
    """Reads the metadata of thin pools. `folder` is for notes and locks."""

    def __init__(self, lvm: Lvm, folder: Path) -> None:
        self._lvm = lvm
        self._folder = folder

    def extents(self, volume: Volume) -> Iterator[Extent]:
        """All of a volume that has no external origin: what was never written, or discarded, is marked zero. Raises
        before anything is yielded.

        :raises SnapshotError: it cannot be said, or thin_dump is not installed
        """
        argv = ["thin_dump", "--metadata-snap", "--dev-id", _id(volume)]
        report = Report(mapped, f'<device dev_id="{_id(volume)}"', ("</device>",))
        at = 0
        for begin, end in self._runs(volume, argv, report):
            if begin >= volume.size_bytes:
                break
            if begin > at:
                yield Extent(at, begin - at, zero=True)
            at = min(end, volume.size_bytes)
            yield Extent(begin, at - begin)
        if at < volume.size_bytes:
            yield Extent(at, volume.size_bytes - at, zero=True)

    def differences(self, older: Volume, newer: Volume) -> Iterator[Extent]:
        """Where two volumes of one pool, of one size, may differ.

        :raises SnapshotError: it cannot be said, or thin_delta is not installed
        """
        argv = ["thin_delta", "--metadata-snap", "--snap1", _id(older), "--snap2", _id(newer)]
        report = Report(different, "<diff ", ("</diff>", "<same "))
        for begin, end in self._runs(newer, argv, report):
            if begin < newer.size_bytes:
                yield Extent(begin, min(end, newer.size_bytes) - begin)

    def release_left(self, group: str, pool: str) -> None:
        """Release the metadata snapshot that a process of ours left when it was killed; nothing where there is none.

        :raises SnapshotError: the pool refuses
        """
        if self._note(group, pool).exists():
            with self._turn(group, pool):
                self._release_noted(group, pool)

    def _runs(self, volume: Volume, argv: list[str], report: Report) -> Iterator[tuple[int, int]]:
        """Begin and end in bytes of what is found in the command's lines; what adjoins is one."""
        # Everything is read before anything is given: the one metadata snapshot is not held while a backup goes on.
        with Runs(self._folder_made()) as runs:
            with self._reserved(volume.group, volume.pool):
                metadata = f"/dev/mapper/{device_name(volume.group, f'{volume.pool}_tmeta')}"
                try:
                    add_runs(self._lvm.runner.lines([*argv, metadata], _ENDING_SECONDS), report, runs)
                except DriverUnavailable as e:
                    raise SnapshotError(e.message, cure=INSTALL) from e  # all can be read without it
            yield from runs

    @contextmanager
    def _reserved(self, group: str, pool: str) -> Iterator[None]:
        with self._turn(group, pool):
            self._release_noted(group, pool)
            note = self._note(group, pool)
            note.touch(mode=0o600)
            try:
                self._lvm.message_pool(group, pool, "reserve_metadata_snap")
            except SnapshotError as e:
                note.unlink()  # somebody else's, or none: not ours
                if not self._lvm.holds_metadata(group, pool):
                    raise
                raise SnapshotError(
                    f"another program holds the metadata snapshot of the thin pool {group}/{pool}",
                    cure=release_by_hand(group, pool),
                ) from e
            try:
                yield
            finally:
                self._lvm.message_pool(group, pool, "release_metadata_snap")
                note.unlink()

    def _release_noted(self, group: str, pool: str) -> None:
        note = self._note(group, pool)
        if note.exists():
            if self._lvm.holds_metadata(group, pool):
                self._lvm.message_pool(group, pool, "release_metadata_snap")
            note.unlink()

    @contextmanager
    def _turn(self, group: str, pool: str) -> Iterator[None]:
        """One at a time; the lock of a process that dies is gone with it."""
        with (self._folder_made() / f"{group}~{pool}.lock").open("w") as lock:
            deadline = time.monotonic() + _TURN_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SnapshotError(f"the metadata of {group}/{pool} is being read by another vmsnap") from None
                    time.sleep(_POLL_SECONDS)
            yield

    def _note(self, group: str, pool: str) -> Path:
        return self._folder / f"{group}~{pool}.reserved"

    def _folder_made(self) -> Path:
        make_writable_folder(self._folder)
        return self._folder


def release_by_hand(group: str, pool: str) -> str:
    """What to do about a metadata snapshot of the pool that is somebody else's."""
    return f"if that has died: dmsetup message {device_name(group, pool)}-tpool 0 release_metadata_snap"


def _id(volume: Volume) -> str:
    if volume.thin_id is None:
        raise SnapshotError(f"{volume.full_name} is no thin volume")
    return str(volume.thin_id)


def mapped(line: str) -> tuple[int, int] | None:
    """The blocks that a line of thin_dump says a volume has."""
    if found := _SINGLE.search(line):
        return int(found[1]), 1
    if found := _RANGE.search(line):
        return int(found[1]), int(found[2])
    return None


def different(line: str) -> tuple[int, int] | None:
    """The blocks in which, as a line of thin_delta says, two volumes differ."""
    found = _DIFFERENCE.search(line)
    return (int(found[1]), int(found[2])) if found else None


def add_runs(lines: Iterator[str], report: Report, runs: Runs) -> None:
    """Add what is found, in bytes.

    :raises SnapshotError: the lines are not as expected, or not all that there are
    """
    block_bytes = at = 0
    begun = ended = False
    for line in lines:
        if found := report.find(line):
            if not begun or found[0] < at:
                raise _not_understood(line)
            at = found[0] + found[1]
            runs.add(found[0] * block_bytes, at * block_bytes)
        elif size := _BLOCK_SIZE.search(line):
            block_bytes = int(size[1]) * _SECTOR_BYTES
        elif (element := line.strip()).startswith(report.begins):
            begun = block_bytes > 0
        elif element == _END:
            ended = True
        elif element and not element.startswith(report.others):
            raise _not_understood(line)
    if not begun or not ended:
        raise SnapshotError(f"the pool's metadata has no {report.begins.strip('< ')}, or is cut short")


def _not_understood(line: str) -> SnapshotError:
    return SnapshotError(f"the pool's metadata is told of in another way than is known here: {line.strip()!r}")
