"""Targets of ours: made, found again, removed; those of others are left alone whatever they are called.

A target is ours by its backing store, which only we name so. One that has none yet is ours by a note that was written
before it was made: whoever was killed in between has left it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vmsnap.errors import SnapshotError
from vmsnap_drivers.snapshots.iscsi.places import Place
from vmsnap_drivers.snapshots.iscsi.tgt import NotRunning, Target, taken


class Exports:
    """The targets of ours. `folder` is for the notes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(
        self, place: Place, target: str, path: str, like: str, initiators: Sequence[str], *, read_only: bool
    ) -> None:
        """Export the backing store `path` as `target`, to these initiators, with the accounts of the target `like`.
        Does nothing where that was done.

        :raises SnapshotError: the name is taken, the target `like` is gone, or tgtd refused
        """
        targets = {each.name: each for each in place.tgt.targets()}
        there, origin = targets.get(target), targets.get(like)
        if there is not None:
            if _is_on(there, path):
                return
            raise taken(target)
        if origin is None:
            raise SnapshotError(f"the target {like} is gone from {place.name}")
        note = self._note(place, target)
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        note.touch(mode=0o600)
        place.tgt.export(target, path, origin, initiators, read_only=read_only)
        note.unlink()

    def remove(self, place: Place, target: str, path: str, *, force: bool) -> None:
        """Remove the target if it is ours; idempotent. Where no tgtd runs there is none.

        :param force: cut off whoever is connected
        :raises SnapshotError: it is in use, or tgtd refused
        """
        note = self._note(place, target)
        try:
            found = place.tgt.find(target)
        except NotRunning:
            found = None
        if found is not None and (_is_on(found, path) or (not found.disks and note.exists())):
            if found.sessions and not force:
                raise SnapshotError(
                    f"the LUN {target} on {place.name} is in use by {', '.join(sorted(set(found.sessions)))}",
                    cure="end the VM that uses it, then: vmsnap recover",
                )
            place.tgt.delete(found, force=force)
        note.unlink(missing_ok=True)

    def _note(self, place: Place, target: str) -> Path:
        name = hashlib.sha256(f"{place.portal} {target}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.making"


def _is_on(target: Target, path: str) -> bool:
    return [lun.path for lun in target.disks] == [path]
