"""Targets of ours: made, found again, removed; those of others are left alone whatever they are called.

A target is ours by its backing store, which only we name so. One that has none yet, or none any more, is ours by a note
that was written before it was made or taken apart: whoever was killed in between has left it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.durable import make_writable_folder
from vmsnap.errors import SnapshotError, SnapshotInUse
from vmsnap_drivers.snapshots.iscsi.address import LunAddress
from vmsnap_drivers.snapshots.iscsi.places import Place
from vmsnap_drivers.snapshots.iscsi.targets import NotRunning, Taken, Target, Targets

_LOOK_EACH_SECONDS: Final = 0.05


@dataclass(frozen=True)
class Export:
    """A target of ours: what serves it where, and the backing store of its one LUN."""

    place: Place
    server: Targets
    target: str
    path: str


class Exports:
    """The targets of ours. `folder` is for the notes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(
        self,
        export: Export,
        beside: LunAddress,
        initiators: Sequence[str],
        duplicate: str,
        *,
        read_only: bool,
        served: Sequence[Target] | None = None,
    ) -> None:
        """Export a backing store beside a LUN, with the accounts of the target that this has: to these initiators, or
        where there are none, to this host alone. Does nothing where that was done.

        :param duplicate: the VM whose disk it will be; empty for a snapshot
        :param served: the targets of its server, where they have been asked for just now: a name that was taken since
            is refused by the server
        :raises SnapshotError: the name is taken, the LUN's target is gone, or it was refused
        :raises UsageError: an initiator cannot be admitted
        """
        place, server, target = export.place, export.server, export.target
        for initiator in initiators:
            server.check_initiator(initiator)
        targets = {each.name: each for each in (server.targets() if served is None else served)}
        there, origin = targets.get(target), targets.get(beside.target)
        if there is not None:
            if _is_on(there, export.path):
                return
            raise Taken(target)
        if origin is None:
            raise SnapshotError(f"the target {beside.target} is gone from {place.name}")
        note = self._note(place, target)
        _write(note)
        admitted = initiators or server.admitted(beside, origin, duplicate)
        try:
            server.export(target, export.path, origin, admitted, read_only=read_only)
        except Taken:
            note.unlink()  # in between, by somebody: it must not be thought ours
            raise
        note.unlink()

    def remove(self, export: Export, *, force: bool, patience_seconds: float = 0.0) -> None:
        """Remove the target if it is ours; idempotent. Where nothing serves there is none.

        :param force: cut off whoever is connected
        :param patience_seconds: how long somebody who has just logged out may still be shown as connected
        :raises SnapshotInUse: somebody uses it
        :raises SnapshotError: it was refused
        """
        place, server, target = export.place, export.server, export.target
        note = self._note(place, target)
        deadline = time.monotonic() + patience_seconds
        try:
            found = server.find(target)
            while found is not None and found.sessions and not force and time.monotonic() < deadline:
                time.sleep(_LOOK_EACH_SECONDS)
                found = server.find(target)
        except NotRunning:
            note.unlink(missing_ok=True)
            return
        if found is not None and (_is_on(found, export.path) or (not found.disks and note.exists())):
            if found.sessions and not force:
                raise SnapshotInUse(
                    f"the LUN {target} on {place.name} is in use by {', '.join(sorted(set(found.sessions)))}",
                    cure="end the VM that uses it, then: vmsnap recover",
                )
            _write(note)
            server.delete(found, force=force)
        if found is None or not found.disks:
            server.release(export.path)
        note.unlink(missing_ok=True)

    def _note(self, place: Place, target: str) -> Path:
        name = hashlib.sha256(f"{place.name} {target}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.making"


def _write(note: Path) -> None:
    make_writable_folder(note.parent)
    note.touch(mode=0o600)


def _is_on(target: Target, path: str) -> bool:
    return [lun.path for lun in target.disks] == [path]
