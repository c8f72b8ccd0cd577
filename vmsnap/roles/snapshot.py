"""The role of a snapshot mechanism: the content of virtual disks at one point in time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from vmsnap.errors import DriverUnavailable, NotFound, SnapshotError, UsageError
from vmsnap.model import ClonePlan, Disk, DiskSnapshot, Extent, Finding, OwnedResource, SnapshotPlan, Window
from vmsnap.roles.diskwriter import DiskWriter
from vmsnap.roles.needs import Need
from vmsnap.roles.options import DriverContext, Option


class DiskReader(ABC):
    """Random access to the content of one disk as it was at the snapshot's instant."""

    size_bytes: int
    parallel_reads: ClassVar[bool] = False
    """`read_into` may be called by several threads at once, and gains by it."""

    @abstractmethod
    def extents(self) -> Iterator[Extent]:
        """Yield the whole disk from 0 to `size_bytes`, without gap or overlap, in ascending order.

        A range is marked `zero` only where it surely reads as zeros. Lazily, in bounded memory.
        """

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill all of `buffer` (writable, bytes) from `offset`. Blocks.

        :raises SnapshotError: the snapshot is lost (deleted, overflowed, the VM gone) or the range leaves the disk
        """

    def remark(self) -> str:
        """What whoever has the backup should know of how the disk was read, to be said of it: ``was read whole: …``.
        Asked when all is read; empty where there is nothing to say.
        """
        return ""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections; idempotent. The snapshot stays."""

    def __enter__(self) -> DiskReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SnapshotMechanism(ABC):
    """Takes point-in-time copies of disks, reads them and removes them.

    The life of a snapshot, in the order in which the core calls (each step may be the last one: `delete` follows
    any of them)::

        plan → (journal) → prepare → [pause] → snapshot → [resume] → settle → reader … → delete

    Where a duplicate is to run, writable disks are made of settled snapshots::

        plan_clone → (journal) → clone → (the duplicate runs and ends) → clone_reader … → delete_clone

    Contract:

    - **Named before made.** `plan` has no side effects and its result holds the names of all that will be made;
      `prepare` and the later calls make nothing else. `delete(plan)` is therefore enough, in any process, after any
      crash.
    - **One point in time.** `snapshot` fixes all disks of the plan at one instant between its call and its return;
      writes that the guest completed before the call are in, writes that it begins after the return are not.
    - **Within the pause.** `snapshot` does only what must be done while the guest stands still; all else belongs to
      `prepare` or `settle`.
    - **Beside others.** A VM may have disks of several mechanisms: `snapshot` is then called on a thread of its own, at
      the same time as theirs. No two calls go to one object at once, `health` excepted.
    - **The guest is never harmed.** When the snapshot runs full or breaks, the snapshot is lost (`SnapshotError` on
      reading), not a write of the guest.
    - **Deletes leave nothing,** are idempotent, and touch nothing that does not stand in the plan.
    """

    name: ClassVar[str]
    options: ClassVar[Sequence[Option]] = ()
    needs: ClassVar[Sequence[Need]] = ()
    """Programs and modules without which it does nothing here; ``vmsnap drivers`` names those that are missing."""
    clones: ClassVar[bool] = False
    """`plan_clone`, `clone`, `delete_clone` and `clone_reader` work; else they raise."""
    changes: ClassVar[bool] = False
    """`changed_extents` works, and snapshots bear marks."""
    writes: ClassVar[bool] = False
    """`writer` works: a backup can be written onto the disks that it handles."""
    asked_first: ClassVar[bool] = False
    """It takes disks for what they lie on, and is asked before the mechanisms that take any disk of a hypervisor."""
    of_storage: ClassVar[bool] = True
    """What lies at the disk's address is all it needs: it can be asked after the pause too, while the hypervisor holds
    the disk (`Hypervisor.freeze_disks`). False where it works through the hypervisor itself.
    """

    def __init__(self, context: DriverContext, options: Mapping[str, str]) -> None:
        """Remember context and checked options; no I/O."""
        self.context = context

    @abstractmethod
    def handles(self, disk: Disk) -> bool:
        """Say whether this mechanism can snapshot the disk where it lies. Quick, no side effects, never raises."""

    def check_usable(self) -> None:
        """See that it can be used on this host, by us: that what it needs is there, and may be told. Where it cannot,
        `list_owned` finds nothing, and that says nothing of what there is. Quick; changes nothing.

        :raises DriverUnavailable: it cannot; the cure says what is missing
        """
        for need in self.needs:
            if lack := need.lack():
                raise DriverUnavailable(lack, cure=need.cure)

    def disk_at(self, device: str, address: str) -> Disk:
        """The disk at an address that a person named, with its size. Blocks; changes nothing.

        :raises NotFound: there is nothing
        :raises UsageError: it is none that can be read
        """
        try:
            descriptor = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NotFound(f"there is no {address}") from e
        except (OSError, ValueError) as e:
            why = e.strerror if isinstance(e, OSError) else e
            raise UsageError(f"{address} cannot be read: {why}") from e
        return Disk(device, address, size_bytes)

    def writer(self, disk: Disk) -> DiskWriter:
        """Open a disk at an address that a person named, to be written onto: one that exists, has the size of `disk`,
        and that nobody uses. Blocks; changes nothing. Whoever comes later is not kept out, but is seen by the next
        call.

        :raises SnapshotError: this mechanism has `writes` = False, or the disk cannot be reached
        :raises NotFound: there is no disk
        :raises UsageError: it has another size, is read-only, or is vmsnap's own
        :raises Busy: somebody uses it
        """
        raise SnapshotError(f"mechanism {self.name!r} cannot write onto disks")

    @abstractmethod
    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """Name all that will be made for these disks. `tag` (``vmsnap-…``) is unique and is part of every name.

        :raises SnapshotError: it cannot be done (no room, unsupported in this window); nothing was made
        """

    @abstractmethod
    def prepare(self, plan: SnapshotPlan) -> None:
        """Do everything slow: room checks, targets, connections. The guest runs. Blocks.

        :raises SnapshotError: not possible; the core calls `delete`
        """

    @abstractmethod
    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """Fix the content of the plan's disks at one instant; called while the guest is paused, its I/O drained and
        flushed.

        Returns one `DiskSnapshot` a disk, in the plan's order. Milliseconds where the mechanism can.

        :raises SnapshotError: failed; the core calls `delete`
        """

    def settle(self, snapshots: Sequence[DiskSnapshot]) -> None:
        """Do, after the guest runs again, what reading needs and the instant did not. May block for long."""

    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        """Tell what will cost these snapshots unless somebody helps: one fills up and cannot be extended, or a pool in
        which they lie does. Each is one finding, a ``note``. `subject` names what fills up, as the error does that
        tells of the loss later, and stays the same; `message` says how full it is, and `cure` what helps now.

        Asked about once a second from `snapshot` on to `delete`, by a thread of its own while readers read, clones are
        made or `settle` is at work: it must be quick, so it tells what is known, and lets nobody wait. Changes nothing;
        nothing to tell is nothing, also of a plan that has no snapshots any more.

        :raises SnapshotError: it cannot be said now; it is asked again
        """
        return ()

    @abstractmethod
    def reader(self, snapshot: DiskSnapshot) -> DiskReader:
        """Open the disk as it was. Several readers at once are allowed, one a disk.

        :raises SnapshotError: the snapshot is lost
        """

    def address_of(self, snapshot: DiskSnapshot) -> str:
        """The physical disk address of a settled snapshot, as the VM table has it beside that of its disk until the
        duplicate has disks of its own. Quick, asks nobody.
        """
        return f"{self.name}:{snapshot.plan.tag}"

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        """Yield the ranges of the disk that may have changed from the snapshot that bore the mark `since` to this one.

        In any order, and rather too many than too few: what is not named is not read. Deleting the older snapshot must
        not end this, and the two may have been taken by different processes.

        :raises SnapshotError: it cannot be said: `since` is no mark of this disk, the record of its changes was lost,
            reset or cut short, or the disk was resized; everything is read then
        """
        raise SnapshotError(f"mechanism {self.name!r} keeps no record of changes")

    def keep_mark(self, snapshot: DiskSnapshot, instead_of: str = "") -> None:
        """A backup that bears the snapshot's mark is committed: later snapshots will be asked what has changed since.

        Called before `delete`, which else may end the record of changes that began with the snapshot. The record from
        an older mark goes on until one is kept in its stead, so that a backup that fails loses nothing: `instead_of`
        is the mark of the backup that this one follows in its repository, and which will not be asked for again;
        empty where there is none. Idempotent.

        :raises SnapshotError: it cannot be; a later `changed_extents` says so
        """

    def forget_marks(self, vm: str) -> None:
        """End all records of changes that were kept for disks of this VM, which is struck out of the VM table.
        Idempotent.

        :raises SnapshotError: one cannot be ended now; a later call tries again
        """

    # -- writable disks for a duplicate

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """Name all that `clone` will make: a writable disk with the snapshot's content, for a duplicate called `name`.

        `folder` exists and is the duplicate's own; files of the clone go there and nowhere else. No side effects. The
        plan stands in the journal before `clone` is called.

        :raises SnapshotError: this mechanism has `clones` = False, or it cannot be done (no room, an unsafe name)
        """
        raise SnapshotError(f"mechanism {self.name!r} cannot clone")

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """Make the disk. Called after `settle`, while the working VM runs; may block for long.

        Whatever is written to the clone never reaches the snapshot, the original or another clone. With `plan.lasting`
        it is independent of the snapshot, the working VM and its hypervisor's process: it survives their end by
        kill -9, and `delete` of the snapshot. Without, it may lean on the snapshot (an overlay over it) and is valid
        while that lives: made quickly, little room taken.

        :raises SnapshotError: this mechanism has `clones` = False, or it failed; the core calls `delete_clone`
        """
        raise SnapshotError(f"mechanism {self.name!r} cannot clone")

    def delete_clone(self, plan: ClonePlan) -> None:
        """Remove all that was made for `plan`, whatever of it exists; idempotent, in any process.

        Touches nothing that does not stand in the plan. Called before `delete` of the snapshot that it leans on, and
        after it too. `folder` stays.

        :raises SnapshotError: something could not be removed; what is left is named, and a later call tries again
        """
        raise SnapshotError(f"mechanism {self.name!r} cannot clone")

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> DiskReader:
        """Open the clone's present content, what its VM wrote included; `disk` is what `clone` gave. That VM must not
        run.

        :raises SnapshotError: this mechanism has `clones` = False, or the clone (or what it leans on) is lost
        """
        raise SnapshotError(f"mechanism {self.name!r} cannot clone")

    @abstractmethod
    def delete(self, plan: SnapshotPlan) -> None:
        """Remove all that was made for `plan`, whatever of it exists, from whatever step; idempotent.

        :raises SnapshotError: something could not be removed or reached; what is left is named, and a later call
            tries again
        """

    @abstractmethod
    def list_owned(self) -> Sequence[OwnedResource]:
        """List everything on this host that carries our tag and came from this mechanism."""

    def list_owned_on(self, disks: Sequence[Disk]) -> Sequence[OwnedResource]:
        """List what carries our tag on these disks of a VM that executes, and what `list_owned` cannot find, because it
        stands nowhere on this host: the record of it was lost. Blocks; changes nothing.

        :raises SnapshotError: it cannot be looked at now
        """
        return ()

    def remove_owned(self, owned: OwnedResource) -> None:
        """Remove something that `list_owned` or `list_owned_on` has named and whose plan nobody has any more, with all
        that was made for that plan; the user said so. Idempotent; blocks.

        :raises SnapshotError: it cannot be removed (so); the message says what to do
        """
        raise SnapshotError(f"mechanism {self.name!r} cannot remove {owned.name}", cure="remove it by hand")

    @abstractmethod
    def doctor(self) -> Sequence[Finding]:
        """Look whether this mechanism works on this host, and name the cure where not. Changes nothing."""

    def close(self) -> None:
        """Let go of connections; idempotent. Snapshots stay."""
