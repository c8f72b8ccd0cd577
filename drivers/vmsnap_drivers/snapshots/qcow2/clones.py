"""Writable disks for a duplicate, made of a snapshot: a sparse raw copy, which leans on nothing.

An overlay over the snapshot's NBD export would be made faster, but it would let the duplicate's QEMU choose the
requests to the working one's, and those are not all harmless: before 9.2 two requests in flight that share a sector
can end the working QEMU (see `Qcow2Reader`). So the snapshot is read by our own reader, as for a backup, zeros left
out; raw, because that is what restored disks are, too, and every reader can tell its holes.

The names are those of the plan; a note of each clone in vmsnap's state folder finds it without the journal.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np

from vmsnap.durable import remove
from vmsnap.errors import SnapshotError, UsageError
from vmsnap.model import ClonePlan, Disk, DiskSnapshot, OwnedResource, check_name, from_json, to_json
from vmsnap.pagecache import write_all
from vmsnap.roles import DiskReader
from vmsnap_drivers.qemu.blocks.image import sync
from vmsnap_drivers.snapshots.qcow2.names import MECHANISM

_CHUNK_BYTES: Final = 4 << 20
_PIECE_BYTES: Final = 64 << 10
"""Zeros are left out in pieces of this size, that of a cluster."""
_NOTE_SUFFIX: Final = ".clone"


def plan_clone(snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
    """Choose the clone's name; see `SnapshotMechanism.plan_clone`. A read-only disk needs none, it is shared.

    :raises SnapshotError: the name is none, or there is no room
    """
    try:
        check_name(name, "duplicate name")
    except UsageError as e:
        raise SnapshotError(e.message, cure=e.cure) from e
    plan, disk = snapshot.plan, snapshot.disk
    file = ""
    if not disk.read_only:
        number = plan.disks.index(disk)
        file = str(folder.absolute() / f"{plan.tag}.{number}.{name}{_NOTE_SUFFIX}.raw")
        _check_room(disk, folder)
    return ClonePlan(MECHANISM, plan, disk.device, name, folder.absolute(), lasting, {"file": file})


def file_of(plan: ClonePlan) -> Path | None:
    """The clone's file; None for a read-only disk, of which no clone is made.

    :raises SnapshotError: the plan names another file than ours, which is not to be written or removed
    """
    data = plan.data if isinstance(plan.data, dict) else {}
    if data.get("file") == "":
        return None
    path = Path(str(data.get("file")))
    ours = path.name.startswith(f"{plan.snapshot.tag}.") and path.name.endswith(f".{plan.name}{_NOTE_SUFFIX}.raw")
    if plan.mechanism != MECHANISM or not ours or path.parent != plan.folder or not path.is_absolute():
        raise SnapshotError(f"the plan of a clone for {plan.name!r} names {path}, which is no clone of it")
    return path


def make(plan: ClonePlan, snapshot: DiskSnapshot, reader: DiskReader, notes: Path) -> Disk:
    """Copy what `reader` reads; see `SnapshotMechanism.clone`. A lasting clone is durable on return.

    :raises SnapshotError: the file exists, cannot be written, or the snapshot is lost
    """
    path = file_of(plan)
    if path is None:
        return snapshot.disk
    note = _note(plan, path, notes)
    try:
        notes.mkdir(mode=0o700, parents=True, exist_ok=True)
        note.write_text(to_json(plan))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, reader.size_bytes)
            _copy(reader, fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise SnapshotError(f"the clone {path} cannot be made: {e.strerror}", cure="see whether there is room") from e
    if plan.lasting:
        sync(path)
        sync(path.parent)
    return Disk(snapshot.disk.device, str(path), reader.size_bytes, "raw")


def delete(plan: ClonePlan, notes: Path) -> None:
    """Remove the clone and its note; see `SnapshotMechanism.delete_clone`. Idempotent.

    :raises SnapshotError: it cannot be removed
    """
    path = file_of(plan)
    if path is None:
        return
    for file in (path, _note(plan, path, notes)):
        try:
            remove(file)
        except NotADirectoryError:
            continue
        except OSError as e:
            raise SnapshotError(f"{file} could not be removed: {e.strerror}") from e


def list_owned(notes: Path) -> list[OwnedResource]:
    """The clones that exist, by their notes."""
    found = []
    for note in sorted(notes.glob(f"*{_NOTE_SUFFIX}")):
        try:
            plan = from_json(note.read_bytes(), ClonePlan)
            path = file_of(plan)
        except (OSError, ValueError, SnapshotError):
            found.append(OwnedResource("record", str(note), note.stem, MECHANISM))
            continue
        if path is not None:
            found.append(OwnedResource("clone", str(path), plan.snapshot.tag, MECHANISM))
    return found


def plan_of(owned: OwnedResource, notes: Path) -> ClonePlan | None:
    """The noted plan of a clone that `list_owned` named; None where it is none, or its note cannot be read."""
    if owned.kind != "clone":
        return None
    try:
        return from_json((notes / Path(owned.name).name.removesuffix(".raw")).read_bytes(), ClonePlan)
    except (OSError, ValueError):
        return None


def _note(plan: ClonePlan, path: Path, notes: Path) -> Path:
    return notes / path.name.removesuffix(".raw")


def _copy(reader: DiskReader, fd: int) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for extent in reader.extents():
        if extent.zero:
            continue
        end = extent.offset + extent.length
        for at in range(extent.offset, end, _CHUNK_BYTES):
            chunk = buffer[: min(_CHUNK_BYTES, end - at)]
            reader.read_into(at, chunk)
            for begin, stop in _runs_of_data(chunk):
                write_all(fd, [chunk[begin:stop]], at + begin)


def _runs_of_data(chunk: memoryview) -> list[tuple[int, int]]:
    """Begin and end of each run of pieces that are not all zeros."""
    content = np.frombuffer(chunk, np.uint8)
    has_data = np.bitwise_or.reduceat(content, np.arange(0, len(content), _PIECE_BYTES)) != 0
    edges = np.flatnonzero(np.diff(np.concatenate(([False], has_data, [False])).astype(np.int8)))
    return [
        (int(first) * _PIECE_BYTES, min(int(last) * _PIECE_BYTES, len(content))) for first, last in edges.reshape(-1, 2)
    ]


def _check_room(disk: Disk, folder: Path) -> None:
    try:
        image = Path(disk.handle["file"])
        needed = image.stat().st_blocks * 512 if image.is_file() else disk.size_bytes
        state = os.statvfs(folder)
    except OSError as e:
        raise SnapshotError(f"a clone of disk {disk.device} cannot be made in {folder}: {e.strerror}") from e
    free = state.f_bavail * state.f_frsize
    if min(needed, disk.size_bytes) > free:
        raise SnapshotError(
            f"{folder} has {free >> 20} MiB free, a clone of disk {disk.device} needs {needed >> 20} MiB",
            cure="make room there",
        )
