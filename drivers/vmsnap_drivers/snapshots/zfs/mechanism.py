"""`ZfsMechanism`: snapshots of volumes and of image files of ZFS."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from vmsnap import durable
from vmsnap.errors import SnapshotError
from vmsnap.model import (
    ClonePlan,
    Disk,
    DiskSnapshot,
    Extent,
    Finding,
    Moment,
    OwnedResource,
    SnapshotPlan,
    Window,
)
from vmsnap.roles import DriverContext, Need, Option, Program, SnapshotMechanism, whole_number, with_defaults
from vmsnap_drivers.devicereader import DeviceReader
from vmsnap_drivers.runner import LocalRunner, Runner
from vmsnap_drivers.runs import Runs
from vmsnap_drivers.snapshots.zfs import clones, room, stream
from vmsnap_drivers.snapshots.zfs.commands import INSTALL, Ours, Zfs, pool_of
from vmsnap_drivers.snapshots.zfs.doctor import examine
from vmsnap_drivers.snapshots.zfs.lookup import look_up
from vmsnap_drivers.snapshots.zfs.marks import Marks, shown_of
from vmsnap_drivers.snapshots.zfs.names import (
    choose_clone,
    choose_names,
    clone_names_of,
    names_of,
    names_of_snapshot,
    pools_of,
    to_data,
)
from vmsnap_drivers.snapshots.zfs.reading import extents_of
from vmsnap_drivers.snapshots.zfs.watch import Watch
from vmsnap_drivers.writeback import write_back

_PAUSE_SECONDS: Final = whole_number(1, 3600)
_PERCENT: Final = whole_number(1, 100)
_MARKS: Final = whole_number(0, 1000)
_TYPES: Final = {"pause_seconds": _PAUSE_SECONDS, "pool_limit": _PERCENT, "marks": _MARKS}


class ZfsMechanism(SnapshotMechanism):
    """Point-in-time copies of disks that are volumes of ZFS, or raw image files in its file systems, of this host.

    All disks of one pool are taken by one command at one instant; pools are served side by side. zfs-fuse takes file
    systems one after the other. A snapshot is read through a read-only clone. Where a pool is about to fill up, the
    snapshot is given up, not the guest.
    """

    name: ClassVar[str] = "zfs"
    clones: ClassVar[bool] = True
    changes: ClassVar[bool] = True
    asked_first: ClassVar[bool] = True
    options: ClassVar[Sequence[Option]] = (
        Option(
            "pause_seconds", "how long one command may take while the guest stands still", "4", type=_PAUSE_SECONDS
        ),
        Option(
            "pool_limit",
            "how full in percent a pool, or a quota, may be for a snapshot to be made or kept",
            "90",
            type=_PERCENT,
        ),
        Option(
            "marks", "how many bookmarks of a disk are kept to find what has changed since; they take no room", "4",
            type=_MARKS,
        ),
    )  # fmt: skip
    needs: ClassVar[Sequence[Need]] = (Program(("zfs",), INSTALL),)

    def __init__(self, context: DriverContext, options: Mapping[str, str], runner: Runner | None = None) -> None:
        super().__init__(context, options)
        self._options = with_defaults(self.options, options)
        self._zfs = Zfs(runner or LocalRunner())
        self._folder = context.state_dir / self.name
        self._marks = Marks(self._zfs, self._folder / "marks")
        self._watches: dict[str, Watch] = {}
        self._passing: dict[str, list[ClonePlan]] = {}
        self._removing = threading.Lock()

    def handles(self, disk: Disk) -> bool:
        """Say whether the disk is a whole volume, or a raw image file in a mounted file system of ZFS."""
        found = look_up(disk.address) if disk.format == "raw" else None
        return found is not None and 0 < disk.size_bytes <= found.size_bytes

    def check_usable(self) -> None:
        """See `SnapshotMechanism.check_usable`."""
        self._zfs.check_usable()

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """See `SnapshotMechanism.plan`.

        :raises SnapshotError: a disk is nothing of ZFS, its pool is too full, or a name is taken
        :raises UsageError: an option is no number
        :raises DriverUnavailable: ZFS is not installed
        """
        for option in _TYPES:
            self._number(option)
        self._zfs.flavour()
        places = []
        for disk in disks:
            found = look_up(disk.address)
            if found is None or not self.handles(disk):
                raise SnapshotError(
                    f"{disk.device} at {disk.address} is no volume and no image file of ZFS of {disk.size_bytes} bytes"
                )
            places.append(found)
        datasets = sorted({place.dataset for place in places})
        guids = {name: has["guid"] for name, has in self._zfs.properties(datasets, ["guid"]).items()}
        names = choose_names(
            [(place.dataset, guids[place.dataset], place.path) for place in places], tag, self._folder.absolute()
        )
        for made in sorted({name for each in names for name in (each.snapshot, each.reader)}):
            if self._zfs.exists(made):
                raise SnapshotError(f"there is {made} already")
        room.check(self._zfs, datasets, self._number("pool_limit"))
        return SnapshotPlan(self.name, tag, vm, tuple(disks), window, to_data(names))

    def prepare(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.prepare`. Brings to the pools what was written, so that the snapshot need not.

        :raises SnapshotError: a pool hangs
        :raises VmsnapError: the clones through which snapshots are read cannot be mounted in the state folder
        """
        durable.make_writable_folder(self._folder)
        write_back(_volumes(plan))
        # Nobody but root may, and zfs-fuse cannot: then the snapshot waits for it.
        if os.geteuid() == 0 and not self._zfs.flavour().fuse:
            for pool in pools_of(names_of(plan)):
                self._zfs.sync(pool)

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """See `SnapshotMechanism.snapshot`. One command a pool; of zfs-fuse one a file system. ZFS does not know what
        of a volume is in the page cache: that is written back before. From here on it is watched how full the pools
        get.

        :raises SnapshotError: ZFS refused, or took too long
        """
        found = names_of(plan)
        fuse, seconds = self._zfs.flavour().fuse, self._number("pause_seconds")
        instants: dict[str, Moment] = {}

        def take(pool: str) -> None:
            write_back(_volumes(plan, pool))
            wanted = sorted({names.snapshot for names in found if pool_of(names.dataset) == pool})
            for together in [[name] for name in wanted] if fuse else [wanted]:
                self._zfs.snapshot(seconds, plan.tag, together)
                instants.update(dict.fromkeys(together, Moment.now("snapshot")))

        pools = pools_of(found)
        with ThreadPoolExecutor(max(1, len(pools))) as threads:
            list(threads.map(take, pools))
        self._watch(plan)
        keeping = self._number("marks") > 0 and not fuse
        return tuple(
            DiskSnapshot(
                plan, disk, instants[names.snapshot], mark=f"{names.dataset}#{plan.tag}.{index}" if keeping else ""
            )
            for index, (disk, names) in enumerate(zip(plan.disks, found, strict=True))
        )

    def settle(self, snapshots: Sequence[DiskSnapshot]) -> None:
        """See `SnapshotMechanism.settle`. Holds the snapshots, and clones them to be read.

        :raises SnapshotError: failed, or they were given up meanwhile
        """
        if not snapshots:
            return
        plan = snapshots[0].plan
        found = names_of(plan)
        watch = self._watch(plan)
        try:
            self._zfs.hold(plan.tag, sorted({names.snapshot for names in found}))
            for names in {names.reader: names for names in found}.values():
                clones.make(self._zfs, names.snapshot, names.reader, names.mounted, plan.tag, "reader")
        except SnapshotError as e:
            if why := watch.given_up():
                raise SnapshotError(f"the snapshot {found[0].snapshot} is lost: {why}") from e
            raise

    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        """See `SnapshotMechanism.health`; what the last look has found, at most a second ago."""
        watch = self._watches.get(plan.tag)
        return watch.threats() if watch else ()

    def reader(self, snapshot: DiskSnapshot) -> DeviceReader:
        """See `SnapshotMechanism.reader`. Needs `settle` before."""
        names = names_of_snapshot(snapshot)
        label, size_bytes = f"the snapshot {names.snapshot}", snapshot.disk.size_bytes
        watch = self._watches.get(snapshot.plan.tag)
        return _reader(partial(self._path, snapshot), names.is_file, size_bytes, label, watch)

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        """See `SnapshotMechanism.changed_extents`; by the stream of ``zfs send -i``, in blocks of ZFS."""
        names = names_of_snapshot(snapshot)
        note = self._marks.find(since, names, snapshot.disk, self._path(snapshot))
        watch = self._watches.get(snapshot.plan.tag)
        given_up = watch.given_up if watch else str
        durable.make_writable_folder(self._folder)
        with Runs(self._folder) as runs:
            with self._zfs.changes_since(note.bookmark, names.snapshot) as pipe:
                stream.find(pipe, note.object_number, snapshot.disk.size_bytes, runs, given_up)
            for begin, end in runs:
                yield Extent(begin, end - begin)

    def keep_mark(self, snapshot: DiskSnapshot, instead_of: str = "") -> None:
        """See `SnapshotMechanism.keep_mark`. Beyond the number in the option ``marks`` the oldest are given up."""
        if snapshot.mark:
            self._marks.keep(snapshot, self._path(snapshot), instead_of, self._number("marks"))

    def forget_marks(self, vm: str) -> None:
        """See `SnapshotMechanism.forget_marks`."""
        if self._zfs.usable():
            self._marks.forget(vm)

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """See `SnapshotMechanism.plan_clone`: beside the disk's data set, lasting or not. A file system is mounted in
        `folder`.
        """
        chosen = choose_clone(snapshot, name, folder)
        if self._zfs.exists(chosen.dataset):
            raise SnapshotError(f"there is {chosen.dataset} already")
        room.check(self._zfs, [names_of_snapshot(snapshot).dataset], self._number("pool_limit"))
        data = {"dataset": chosen.dataset, "path": chosen.path, "mounted": chosen.mounted}
        return ClonePlan(self.name, snapshot.plan, snapshot.disk.device, name, folder, lasting, data)

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """See `SnapshotMechanism.clone`. Made at once: it shares with the snapshot what is not overwritten."""
        names = clone_names_of(plan)
        source = names_of_snapshot(snapshot).snapshot
        watch = self._watches.get(snapshot.plan.tag)
        if watch is not None and (why := watch.given_up()):
            raise SnapshotError(f"the snapshot {source} is lost: {why}")
        if not plan.lasting:
            self._passing.setdefault(snapshot.plan.tag, []).append(plan)
        clones.make(self._zfs, source, names.dataset, names.mounted, snapshot.plan.tag, "clone")
        path = clones.path_in(names.dataset, names.path, names.mounted, "the clone")
        return Disk(snapshot.disk.device, path, snapshot.disk.size_bytes)

    def delete_clone(self, plan: ClonePlan) -> None:
        """See `SnapshotMechanism.delete_clone`. With the last clone of a deleted snapshot goes the snapshot."""
        with self._removing:
            self._delete_clone(plan)

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> DeviceReader:
        """See `SnapshotMechanism.clone_reader`."""
        names = clone_names_of(plan)
        # One that lasts is the user's, who is told of nothing here: it is not given up.
        watch = None if plan.lasting else self._watches.get(plan.snapshot.tag)
        find = partial(clones.path_in, names.dataset, names.path, names.mounted, "the clone")
        return _reader(find, bool(names.path), disk.size_bytes, f"the clone {names.dataset}", watch)

    def delete(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.delete`. What is ours is found by its properties, whatever it is called by now. A
        snapshot that has clones of ours goes with the last of them.

        :raises SnapshotError: something could not be removed, or a pool is not there
        """
        self._stop_watching(plan.tag)
        self._zfs.runner.await_late()
        found = names_of(plan)
        taken = [each for each in self._made(plan.tag, pools_of(found)) if each.kind == "snapshot"]
        if len(taken) < len({names.snapshot for names in found}):
            self._zfs.outlast(plan.tag, pools_of(found))
        self._remove(plan)

    def list_owned(self) -> Sequence[OwnedResource]:
        """See `SnapshotMechanism.list_owned`: what bears our properties in any pool, and bookmarks."""
        if not self._zfs.usable():
            return ()
        marks = [OwnedResource("mark", shown_of(note), note.tag, self.name) for note in self._marks.all()]
        return [*(OwnedResource(each.kind, each.name, each.plan, self.name) for each in self._zfs.ours()), *marks]

    def remove_owned(self, owned: OwnedResource) -> None:
        """See `SnapshotMechanism.remove_owned`. With a snapshot goes the clone through which it is read.

        :raises SnapshotError: it is in use
        """
        if not self._zfs.usable():
            return
        self._marks.remove(owned.tag, owned.name)
        known = [each for each in self._zfs.ours() if each.plan == owned.tag]
        if not any((each.name, each.kind) == (owned.name, owned.kind) for each in known):
            return
        if owned.kind == "clone":
            self._zfs.remove(owned.name)
        else:
            self._remove_all(owned.tag, known)

    def doctor(self) -> Sequence[Finding]:
        """See `SnapshotMechanism.doctor`."""
        return examine(self._zfs, self._number("pool_limit"))

    def close(self) -> None:
        """See `SnapshotMechanism.close`. Nobody watches the pools any more."""
        for tag in list(self._watches):
            self._stop_watching(tag)

    # -- within

    def _path(self, snapshot: DiskSnapshot) -> str:
        names = names_of_snapshot(snapshot)
        return clones.path_in(names.reader, names.path, names.mounted, "the snapshot's clone")

    def _made(self, tag: str, pools: Sequence[str]) -> list[Ours]:
        return [each for each in self._zfs.ours(pools) if each.plan == tag]

    def _give_up(self, plan: SnapshotPlan) -> None:
        """Remove what the backup reads, and what its duplicate ran on, as soon as it is closed. A clone that lasts is
        the user's, and stays, with the snapshot's blocks.

        :raises SnapshotError: something is in use
        """
        failed: SnapshotError | None = None
        with self._removing:
            for remove in (
                partial(self._remove, plan),
                *(partial(self._delete_clone, clone) for clone in self._passing.get(plan.tag, ())),
            ):
                try:
                    remove()
                except SnapshotError as e:
                    failed = failed or e
        if failed is not None:
            raise failed

    def _delete_clone(self, plan: ClonePlan) -> None:
        names = clone_names_of(plan)
        for each in self._made(plan.snapshot.tag, [pool_of(names.dataset)]):
            if (each.name, each.kind) == (names.dataset, "clone"):
                self._zfs.remove(each.name)
        if names.mounted:
            clones.remove_folder(Path(names.mounted))

    def _remove(self, plan: SnapshotPlan) -> None:
        found = names_of(plan)
        self._remove_all(plan.tag, self._made(plan.tag, pools_of(found)))
        for names in found:
            if names.mounted:
                clones.remove_folder(Path(names.mounted))

    def _remove_all(self, tag: str, made: Sequence[Ours]) -> None:
        """Remove the snapshots of a plan, and before them the clones through which they are read."""
        failed: SnapshotError | None = None
        for kind in ("reader", "snapshot"):
            for each in made:
                if each.kind != kind:
                    continue
                try:
                    if kind == "reader":
                        self._zfs.remove(each.name)
                    else:
                        self._zfs.remove_snapshot(tag, each.name, cloned=any(other.kind == "clone" for other in made))
                except SnapshotError as e:
                    failed = failed or e
        if failed is not None:
            raise failed

    def _watch(self, plan: SnapshotPlan) -> Watch:
        """What watches the pools of a plan; begun where there is none yet."""
        watch = self._watches.get(plan.tag)
        if watch is None:
            datasets = sorted({names.dataset for names in names_of(plan)})
            watch = Watch(self._zfs, datasets, self._number("pool_limit"), partial(self._give_up, plan))
            self._watches[plan.tag] = watch
            watch.start()
        return watch

    def _stop_watching(self, tag: str) -> None:
        self._passing.pop(tag, None)
        watch = self._watches.pop(tag, None)
        if watch is not None:
            watch.stop()

    def _number(self, option: str) -> int:
        return _TYPES[option].read(self._options[option], option)


def _volumes(plan: SnapshotPlan, pool: str = "") -> list[str]:
    """Where its disks are that are volumes, in one pool or in all."""
    return [
        disk.address
        for disk, names in zip(plan.disks, names_of(plan), strict=True)
        if not names.is_file and pool in ("", pool_of(names.dataset))
    ]


def _reader(find: Callable[[], str], is_file: bool, size_bytes: int, label: str, watch: Watch | None) -> DeviceReader:
    why, given_up = (watch.problem, watch.given_up) if watch else (str, str)
    try:
        path = find()
    except SnapshotError as e:
        raise SnapshotError(why() or e.message) from e
    extents = (lambda: extents_of(path, size_bytes, given_up)) if is_file else None
    return DeviceReader(path, size_bytes, label, extents, why, given_up)
