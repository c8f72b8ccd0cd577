"""The writable disks of one duplicate: made of a capture's snapshots, journaled before they are made, removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vmsnap.controller.folders import Folders, make_standing
from vmsnap.errors import VmsnapError
from vmsnap.heldduplicates import HeldDisk
from vmsnap.journal import Operation
from vmsnap.model import ClonePlan, Disk, DiskSnapshot, to_json
from vmsnap.roles import DiskReader, SnapshotMechanism


class Clones:
    """The disks of the duplicate `name`, files of theirs in `folder`. `mechanisms` are connected already."""

    def __init__(
        self, name: str, folder: Path, operation: Operation, mechanisms: Mapping[str, SnapshotMechanism]
    ) -> None:
        self.folder = folder
        self.made: list[tuple[DiskSnapshot, HeldDisk]] = []
        self.positions: list[int] = []
        """Where all of it stands in the journal."""
        self._name = name
        self._operation = operation
        self._mechanisms = mechanisms
        self._planned: list[tuple[int, ClonePlan]] = []
        self._folders = Folders(operation)

    @property
    def disks(self) -> tuple[Disk, ...]:
        """What was made."""
        return tuple(held.disk for _, held in self.made)

    def make(self, snapshots: Sequence[DiskSnapshot], *, lasting: bool) -> None:
        """Clone every disk. Blocks, with `lasting` for long.

        :raises SnapshotError: a mechanism could not
        """
        make_standing(self.folder.parent)
        self.positions += self._folders.make(self.folder)
        for snapshot in snapshots:
            mechanism = self._mechanisms[snapshot.plan.mechanism]
            plan = mechanism.plan_clone(snapshot, self._name, self.folder, lasting=lasting)
            position = self._operation.will_make("clone", plan.mechanism, to_json(plan))
            self.positions.append(position)
            self._planned.append((position, plan))
            self.made.append((snapshot, HeldDisk(plan, mechanism.clone(plan, snapshot))))

    def reader(self, held: HeldDisk) -> DiskReader:
        """The present content of one of them; its VM must not run."""
        return self._mechanisms[held.plan.mechanism].clone_reader(held.plan, held.disk)

    def delete(self) -> None:
        """Remove those that are still the operation's, and their folder; idempotent.

        :raises VmsnapError: the first that could not be removed, after all were tried; the journal keeps it
        """
        failed: VmsnapError | None = None
        for position, plan in self._planned:
            try:
                if self._operation.owns(position):
                    self._mechanisms[plan.mechanism].delete_clone(plan)
                    self._operation.is_gone(position)
            except VmsnapError as e:
                failed = failed or e
        if failed is not None:
            raise failed
        self._folders.remove()
