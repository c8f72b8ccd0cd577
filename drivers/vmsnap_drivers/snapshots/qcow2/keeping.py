"""Notes in vmsnap's state folder of the bitmaps that are kept on disks: by them these are found again to be removed,
also where the VM does not run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, OwnedResource, from_json, to_json
from vmsnap_drivers.snapshots.qcow2.names import MECHANISM


@dataclass(frozen=True)
class KeptBitmaps:
    """The bitmaps of one disk: of which VM, in which QEMU, in which image."""

    vm: str
    monitor: str
    file: str
    format: str
    names: tuple[str, ...]


class KeptNotes:
    """All notes, one file a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, vm: str, disk: Disk, names: Sequence[str]) -> None:
        """Note these as the ones kept for the disk; no names: no note.

        :raises SnapshotError: it cannot be written
        """
        self._write(KeptBitmaps(vm, disk.handle["qmp"], disk.handle["file"], disk.format, tuple(names)))

    def all(self, vm: str | None = None) -> Iterator[KeptBitmaps]:
        """Those of one VM or of all; what cannot be read is left out."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                found = from_json(path.read_bytes(), KeptBitmaps)
            except (OSError, ValueError):
                continue
            if vm in (None, found.vm):
                yield found

    def strike(self, kept: KeptBitmaps) -> None:
        """Remove a note."""
        self._write(replace(kept, names=()))

    def list_owned(self) -> list[OwnedResource]:
        """Each bitmap, named with its image."""
        return [
            OwnedResource("dirty bitmap", f"{name} of {kept.file}", name, MECHANISM)
            for kept in self.all()
            for name in kept.names
        ]

    def _write(self, kept: KeptBitmaps) -> None:
        path = self._folder / f"{hashlib.blake2s(kept.file.encode(), digest_size=12).hexdigest()}.json"
        try:
            if not kept.names:
                path.unlink(missing_ok=True)
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(to_json(kept))
            new.replace(path)
        except OSError as e:
            raise SnapshotError(f"the note {path} cannot be written: {e.strerror}") from e
