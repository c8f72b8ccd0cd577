"""Records of changes: bookmarks of snapshots, which hold no room, to be compared with later snapshots.

A bookmark bears no properties that could say whose it is. A note in the state folder does, which is written before the
bookmark is made and has the snapshot's guid, which the bookmark has too: another one of that name is somebody else's.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from vmsnap import durable
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, DiskSnapshot
from vmsnap_drivers.snapshots.zfs import stream
from vmsnap_drivers.snapshots.zfs.commands import Zfs
from vmsnap_drivers.snapshots.zfs.filehandle import handle_of
from vmsnap_drivers.snapshots.zfs.names import DiskNames, index_of, names_of_snapshot

_SUFFIX: Final = ".mark"


@dataclass(frozen=True)
class Note:
    """One bookmark of ours: what it is, and which disk it is of. `object_number` and `handle` say which file or volume
    that was, whatever it was called.
    """

    bookmark: str
    snapshot_guid: str
    tag: str
    vm: str
    address: str
    size_bytes: int
    dataset_guid: str
    path: str
    object_number: int
    handle: str
    time_ns: int


class Marks:
    """The records of this host; `folder` is for the notes."""

    def __init__(self, zfs: Zfs, folder: Path) -> None:
        self._zfs = zfs
        self._folder = folder

    def keep(self, snapshot: DiskSnapshot, disk_file: str, instead_of: str, most: int) -> None:
        """Keep the snapshot's mark, and at most so many of its disk. Idempotent.

        :param disk_file: where the snapshot's disk can be looked at
        :raises SnapshotError: it cannot be
        """
        names = names_of_snapshot(snapshot)
        guid = self._zfs.properties([names.snapshot], ["guid"])[names.snapshot]["guid"]
        note = Note(
            snapshot.mark, guid, snapshot.plan.tag, snapshot.plan.vm, snapshot.disk.address, snapshot.disk.size_bytes,
            names.guid, names.path, *_identity(names, disk_file), time.time_ns(),
        )  # fmt: skip
        self._write(note, index_of(snapshot))
        if not self._zfs.exists(note.bookmark):
            self._zfs.change("bookmark", names.snapshot, note.bookmark)
        elif not self._is_there(note):
            raise SnapshotError(f"there is a bookmark {note.bookmark} already, which is not ours")
        kept = [path for path, other in self._notes() if (other.dataset_guid, other.path) == (names.guid, names.path)]
        notes = {path: note for path, note in self._notes() if path in kept}
        gone = [path for path in kept if notes[path].bookmark == instead_of != snapshot.mark]
        left = sorted((path for path in kept if path not in gone), key=lambda path: notes[path].time_ns)
        for path in [*gone, *left[: max(0, len(left) - most)]]:
            self._remove(path, notes[path])

    def find(self, mark: str, names: DiskNames, disk: Disk, disk_file: str) -> Note:
        """The note of the mark, if it is one of this disk as it is in a later snapshot.

        :raises SnapshotError: it is no mark of this disk, is gone, or the disk was another one then
        """
        note = next((note for _, note in self._notes() if note.bookmark == mark), None)
        if note is None or (note.dataset_guid, note.path) != (names.guid, names.path):
            raise SnapshotError(f"no bookmark {mark!r} of this disk was kept to compare with")
        if note.size_bytes != disk.size_bytes:
            raise SnapshotError(f"the disk had {note.size_bytes} bytes at {mark}, now {disk.size_bytes}")
        if (note.object_number, note.handle) != _identity(names, disk_file):
            raise SnapshotError(f"{names.path} is another file than it was at {mark}")
        if not self._is_there(note):
            raise SnapshotError(f"the bookmark {mark} is gone")
        return note

    def forget(self, vm: str) -> None:
        """Remove all that are kept for this VM.

        :raises SnapshotError: one cannot be removed
        """
        for path, note in list(self._notes()):
            if note.vm == vm:
                self._remove(path, note)

    def remove(self, tag: str, shown: str) -> None:
        """Remove the one that is shown so."""
        for path, note in list(self._notes()):
            if note.tag == tag and shown_of(note) == shown:
                self._remove(path, note)

    def all(self) -> Sequence[Note]:
        """All that are kept."""
        return [note for _, note in self._notes()]

    def _is_there(self, note: Note) -> bool:
        if not self._zfs.exists(note.bookmark):
            return False
        return self._zfs.properties([note.bookmark], ["guid"])[note.bookmark]["guid"] == note.snapshot_guid

    def _remove(self, path: Path, note: Note) -> None:
        if self._is_there(note):
            self._zfs.remove(note.bookmark)
        durable.remove(path)

    def _write(self, note: Note, index: int) -> None:
        durable.make_writable_folder(self._folder)
        path = self._folder / f"{note.tag}.{index}{_SUFFIX}"
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(note)))
        durable.sync(partial)
        partial.rename(path)
        durable.sync(self._folder)

    def _notes(self) -> Iterator[tuple[Path, Note]]:
        for path in sorted(self._folder.glob(f"vmsnap-*{_SUFFIX}")):
            try:
                yield path, Note(**json.loads(path.read_bytes()))
            except FileNotFoundError:
                continue  # another process has just removed it
            except (ValueError, TypeError) as e:
                raise SnapshotError(f"{path} is no note of a bookmark: {e}", cure="remove the file") from e


def shown_of(note: Note) -> str:
    """As `OwnedResource` has it: what lies in a disk that the host knows is nobody's stray."""
    return f"{note.bookmark} of {note.address}"


def _identity(names: DiskNames, disk_file: str) -> tuple[int, str]:
    """Which file of its file system it is: its object, and a handle, which a file that is made anew does not have."""
    if not names.is_file:
        return stream.VOLUME_OBJECT, ""
    try:
        return Path(disk_file).stat().st_ino, handle_of(disk_file)
    except OSError as e:
        raise SnapshotError(f"{disk_file} cannot be looked at: {e.strerror}") from e
