"""Snapshots that somebody asked for by hand, without a VM: kept until he deletes them, known by a file each.

A file is written before anything is made, so that whatever a crash leaves can be deleted by its name.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from vmsnap import durable
from vmsnap.controller.drivers import Drivers
from vmsnap.errors import AlreadyExists, NotFound, SnapshotError, UsageError
from vmsnap.locks import vm_lock
from vmsnap.model import ClonePlan, Disk, DiskSnapshot, SnapshotPlan, Window, check_name, from_json, to_json

_TAG = re.compile(r"vmsnap-by-hand-[0-9a-f]{10}")


@dataclass(frozen=True)
class KeptClone:
    """A writable disk of a kept snapshot; `disk` is None until it is made."""

    plan: ClonePlan
    disk: Disk | None = None


@dataclass(frozen=True)
class KeptSnapshot:
    """One snapshot; `taken` is empty where taking it did not come to its end."""

    plan: SnapshotPlan
    taken: tuple[DiskSnapshot, ...] = ()
    clones: tuple[KeptClone, ...] = ()

    @property
    def one_instant(self) -> bool:
        """Whether all disks were taken at the very same instant, by what the mechanism says of each."""
        return len({snapshot.instant.monotonic_ns for snapshot in self.taken}) == 1


class KeptSnapshots:
    """Takes, lists, clones and deletes them. `folder` holds their files, `FOLDER` of the state folder as a rule."""

    FOLDER: ClassVar[str] = "snapshots"

    def __init__(self, drivers: Drivers, folder: Path) -> None:
        self._drivers = drivers
        self._folder = folder

    def take(self, mechanism: str, addresses: Sequence[str]) -> KeptSnapshot:
        """Take a snapshot of disks, all at one instant where the mechanism can, see `KeptSnapshot.one_instant`. Whoever
        writes to them is not stopped: what is found there is what a power cut would leave. Blocks.

        :raises DriverUnavailable: the mechanism cannot be used here, or not by us
        :raises NotFound: there is nothing at an address
        :raises UsageError: the mechanism does not serve an address
        :raises SnapshotError: it failed; nothing is left
        """
        with closing(self._drivers.mechanism(mechanism)) as driver:
            driver.check_usable()
            disks = [driver.disk_at(f"disk{index}", address) for index, address in enumerate(addresses)]
            for disk in disks:
                if not driver.handles(disk):
                    raise UsageError(f"mechanism {mechanism!r} does not serve {disk.address}")
            plan = driver.plan("by-hand", disks, f"vmsnap-by-hand-{secrets.token_hex(5)}", Window.FREE)
            self._write(KeptSnapshot(plan))
            try:
                driver.prepare(plan)
                kept = KeptSnapshot(plan, driver.snapshot(plan))
                driver.settle(kept.taken)
                self._write(kept)
            except BaseException:
                driver.delete(plan)
                self._strike(plan.tag)
                raise
        return kept

    def all(self, mechanism: str) -> list[KeptSnapshot]:
        """Those of one mechanism, by name."""
        found = [from_json(path.read_bytes(), KeptSnapshot) for path in sorted(self._folder.glob("vmsnap-*.json"))]
        return [kept for kept in found if kept.plan.mechanism == mechanism]

    def clone(self, mechanism: str, snapshot: str, name: str) -> tuple[Disk, ...]:
        """Make writable disks of all disks of a snapshot; they live on when it is deleted. Blocks.

        :raises NotFound: there is no such snapshot
        :raises AlreadyExists: it has clones of that name
        :raises Busy: another process clones or deletes it
        :raises SnapshotError: it failed; nothing is left
        """
        self._get(mechanism, snapshot)
        with vm_lock(self._folder, snapshot, "clone", kind="snapshot"):
            return self._clone(mechanism, self._get(mechanism, snapshot), name)

    def _clone(self, mechanism: str, kept: KeptSnapshot, name: str) -> tuple[Disk, ...]:
        snapshot = kept.plan.tag
        check_name(name, "name of a clone")
        if any(clone.plan.name == name for clone in kept.clones):
            raise AlreadyExists(f"snapshot {snapshot} has clones named {name!r}", cure="choose another name")
        if not kept.taken:
            raise SnapshotError(f"snapshot {snapshot} was not taken to its end", cure="delete it")
        folder = self._folder / "clones"
        durable.make_writable_folder(folder)
        with closing(self._drivers.mechanism(mechanism)) as driver:
            plans = [driver.plan_clone(taken, name, folder, lasting=True) for taken in kept.taken]
            self._write(replace(kept, clones=(*kept.clones, *(KeptClone(plan) for plan in plans))))
            try:
                disks = tuple(driver.clone(plan, taken) for plan, taken in zip(plans, kept.taken, strict=True))
            except BaseException:
                for plan in plans:
                    driver.delete_clone(plan)
                self._write(kept)
                raise
        made = (KeptClone(plan, disk) for plan, disk in zip(plans, disks, strict=True))
        self._write(replace(kept, clones=(*kept.clones, *made)))
        return disks

    def delete(self, mechanism: str, snapshot: str, clone: str = "") -> None:
        """Delete a snapshot that has no clones, or the clones of one name. Blocks.

        :raises NotFound: there is no such snapshot, or no such clone of it
        :raises Busy: another process clones or deletes it, or somebody uses it
        :raises SnapshotError: it cannot be removed now, or clones are left; a later call tries again
        """
        self._get(mechanism, snapshot)
        with vm_lock(self._folder, snapshot, "delete", kind="snapshot"):
            self._delete(mechanism, self._get(mechanism, snapshot), clone)

    def _delete(self, mechanism: str, kept: KeptSnapshot, clone: str) -> None:
        snapshot = kept.plan.tag
        gone = [each for each in kept.clones if each.plan.name == clone]
        if clone and not gone:
            raise NotFound(f"snapshot {snapshot} has no clones named {clone!r}")
        with closing(self._drivers.mechanism(mechanism)) as driver:
            if clone:
                for each in gone:
                    driver.delete_clone(each.plan)
                self._write(replace(kept, clones=tuple(each for each in kept.clones if each not in gone)))
                return
            if kept.clones:
                names = ", ".join(sorted({each.plan.name for each in kept.clones}))
                raise SnapshotError(f"snapshot {snapshot} has clones: {names}", cure="delete them first, with --clone")
            driver.delete(kept.plan)
            self._strike(snapshot)

    def known(self) -> str:
        """The text of all files: what stands in it is nobody's stray."""
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("vmsnap-*.json")))

    def _get(self, mechanism: str, snapshot: str) -> KeptSnapshot:
        path = self._path(snapshot)
        try:
            kept = from_json(path.read_bytes(), KeptSnapshot)
        except FileNotFoundError as e:
            raise NotFound(f"there is no snapshot {snapshot!r}", cure=f"see: vmsnap-{mechanism} list") from e
        if kept.plan.mechanism != mechanism:
            raise NotFound(f"snapshot {snapshot} is one of {kept.plan.mechanism}", cure=f"vmsnap-{kept.plan.mechanism}")
        return kept

    def _path(self, snapshot: str) -> Path:
        if not _TAG.fullmatch(snapshot):
            raise NotFound(f"{snapshot!r} is no name of a snapshot", cure="names are like vmsnap-by-hand-0123456789")
        return self._folder / f"{snapshot}.json"

    def _write(self, kept: KeptSnapshot) -> None:
        durable.make_writable_folder(self._folder)
        path = self._path(kept.plan.tag)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(to_json(kept))
        durable.sync(partial)
        partial.rename(path)
        durable.sync(self._folder)

    def _strike(self, snapshot: str) -> None:
        self._path(snapshot).unlink(missing_ok=True)
        (self._folder / "locks" / f"{snapshot}.lock").unlink(missing_ok=True)
