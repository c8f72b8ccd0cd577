"""Where a thin volume has data, and where two of them differ, read from the pool's metadata while it is in use.

The pool reserves a snapshot of its metadata for the tools of thin-provisioning-tools 0.9 (thin_dump(8), thin_delta(8));
there is one such snapshot, which is released at once. Before it is reserved a note is written, so that one whose maker
was killed is known to be ours.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
_BLOCK_SIZE: Final = re.compile(r'data_block_size="(\d+)"')
_SINGLE: Final = re.compile(r'<single_mapping origin_block="(\d+)"')
_RANGE: Final = re.compile(r'<range_mapping origin_begin="(\d+)" data_begin="\d+" length="(\d+)"')
_DIFFERENCE: Final = re.compile(r'<(?:different|left_only|right_only) begin="(\d+)" length="(\d+)"')

Find = Callable[[str], tuple[int, int] | None]
"""Finds begin and length, in blocks of the pool, in a line."""


class ThinMaps:
    """Reads the metadata of thin pools. `folder` is for notes and locks."""

    def __init__(self, lvm: Lvm, folder: Path) -> None:
        self._lvm = lvm
        self._folder = folder

    def extents(self, volume: Volume) -> Iterator[Extent]:
        """All of the volume: what was never written, or discarded, is marked zero.

        :raises SnapshotError: it cannot be said
        :raises DriverUnavailable: thin_dump is not installed
        """
        argv = ["thin_dump", "--metadata-snap", "--dev-id", _id(volume)]
        at = 0
        for begin, end in self._runs(volume, argv, _mapped):
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

        :raises SnapshotError: it cannot be said
        :raises DriverUnavailable: thin_delta is not installed
        """
        argv = ["thin_delta", "--metadata-snap", "--snap1", _id(older), "--snap2", _id(newer)]
        for begin, end in self._runs(newer, argv, _different):
            if begin < newer.size_bytes:
                yield Extent(begin, min(end, newer.size_bytes) - begin)

    def release_left(self, group: str, pool: str) -> None:
        """Release the metadata snapshot that a process of ours left when it was killed; nothing where there is none.

        :raises SnapshotError: the pool refuses
        """
        if self._note(group, pool).exists():
            with self._turn(group, pool):
                self._release_noted(group, pool)

    def _runs(self, volume: Volume, argv: list[str], find: Find) -> Iterator[tuple[int, int]]:
        """Begin and end in bytes of what `find` finds in the command's lines; what adjoins is one."""
        # Everything is read before anything is given: the one metadata snapshot is not held while a backup goes on.
        with Runs(self._folder_made()) as runs:
            with self._reserved(volume.group, volume.pool):
                metadata = f"/dev/mapper/{device_name(volume.group, f'{volume.pool}_tmeta')}"
                try:
                    _add_runs(self._lvm.runner.lines([*argv, metadata], _ENDING_SECONDS), find, runs)
                except DriverUnavailable as e:
                    raise DriverUnavailable(e.message, cure=INSTALL) from e
            yield from runs

    @contextmanager
    def _reserved(self, group: str, pool: str) -> Iterator[None]:
        with self._turn(group, pool):
            self._release_noted(group, pool)
            note = self._note(group, pool)
            note.touch(mode=0o600)
            try:
                self._lvm.message_pool(group, pool, "reserve_metadata_snap")
            except SnapshotError:
                note.unlink()  # somebody else's, or none: not ours
                raise
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


def _id(volume: Volume) -> str:
    if volume.thin_id is None:
        raise SnapshotError(f"{volume.full_name} is no thin volume")
    return str(volume.thin_id)


def _mapped(line: str) -> tuple[int, int] | None:
    if found := _SINGLE.search(line):
        return int(found[1]), 1
    if found := _RANGE.search(line):
        return int(found[1]), int(found[2])
    return None


def _different(line: str) -> tuple[int, int] | None:
    found = _DIFFERENCE.search(line)
    return (int(found[1]), int(found[2])) if found else None


def _add_runs(lines: Iterator[str], find: Find, runs: Runs) -> None:
    block_bytes = 0
    for line in lines:
        if size := _BLOCK_SIZE.search(line):
            block_bytes = int(size[1]) * _SECTOR_BYTES
        elif found := find(line):
            runs.add(found[0] * block_bytes, (found[0] + found[1]) * block_bytes)
    if not block_bytes:
        raise SnapshotError("the pool's metadata does not say how large its blocks are")
