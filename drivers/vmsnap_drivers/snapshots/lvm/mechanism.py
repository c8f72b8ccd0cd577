"""`LvmMechanism`: snapshots of logical volumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from vmsnap.errors import SnapshotError, SnapshotInUse
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
from vmsnap.roles import (
    YES_NO,
    DriverContext,
    Need,
    Option,
    Program,
    SnapshotMechanism,
    whole_number,
    with_defaults,
)
from vmsnap_drivers.devicereader import DeviceReader
from vmsnap_drivers.runner import LocalRunner, Runner
from vmsnap_drivers.snapshots.lvm import clones, marks, room
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.doctor import examine
from vmsnap_drivers.snapshots.lvm.names import (
    VolumeNames,
    choose_clone,
    choose_name,
    clone_names_of,
    is_made_for,
    names_of,
    names_of_snapshot,
    to_data,
)
from vmsnap_drivers.snapshots.lvm.sysfs import look_up
from vmsnap_drivers.snapshots.lvm.thinmap import ThinMaps
from vmsnap_drivers.snapshots.lvm.thinreader import ThinReader
from vmsnap_drivers.snapshots.lvm.volumes import Volume, named, tags_of
from vmsnap_drivers.snapshots.lvm.watch import Watch

_PAUSE_SECONDS: Final = whole_number(1, 3600)
_PERCENT: Final = whole_number(1, 100)
_MARKS: Final = whole_number(0, 1000)
_TYPES: Final = {"pause_seconds": _PAUSE_SECONDS, "pool_limit": _PERCENT, "marks": _MARKS}
_LAYOUTS: Final = {"linear", "striped", "thin", "sparse"}
_BRING_BACK: Final = (
    "bring its disks back, then: vmsnap recover; where they are gone for good, make an empty group of that name before"
    " (vgcreate), and remove it after"
)


class LvmMechanism(SnapshotMechanism):
    """Point-in-time copies of logical volumes, thick and thin, of this host.

    A thick volume's snapshot gets room of its own for what the guest overwrites, made before the pause; it is extended
    while it is read, and lost when it is full and cannot be. A thin volume's snapshot shares its pool: where the pool
    is about to fill up, the snapshot is given up, not the guest. Each command for one volume group waits for the one
    before it; groups are served side by side.
    """

    name: ClassVar[str] = "lvm"
    clones: ClassVar[bool] = True
    changes: ClassVar[bool] = True
    asked_first: ClassVar[bool] = True
    options: ClassVar[Sequence[Option]] = (
        Option("snapshot_size", "room of a thick snapshot at first", "20%", type=room.ROOM),
        Option("grow", "whether a thick snapshot that fills up is extended", "yes", type=YES_NO),
        Option(
            "pause_seconds",
            "how long one command may take while the guest stands still, waiting for another one's lock included",
            "4",
            type=_PAUSE_SECONDS,
        ),
        Option(
            "pool_limit",
            "how full in percent a thin pool may be for a snapshot to be made or kept",
            "90",
            type=_PERCENT,
        ),
        Option(
            "marks",
            "how many snapshots of a thin volume are kept to find what has changed since; each holds, in the pool, what"
            " was overwritten since",
            "0",
            type=_MARKS,
        ),
    )
    needs: ClassVar[Sequence[Need]] = (Program(("lvm",), "apt install lvm2"),)

    def __init__(self, context: DriverContext, options: Mapping[str, str], runner: Runner | None = None) -> None:
        super().__init__(context, options)
        self._options = with_defaults(self.options, options)
        self._lvm = Lvm(runner or LocalRunner())
        self._maps = ThinMaps(self._lvm, context.state_dir / self.name)
        self._thin_reader = partial(ThinReader, self._lvm, self._maps)
        self._watches: dict[str, Watch] = {}

    def handles(self, disk: Disk) -> bool:
        """Say whether the disk is a whole logical volume."""
        found = look_up(disk.address)
        return disk.format == "raw" and found is not None and 0 < disk.size_bytes <= found.size_bytes

    def check_usable(self) -> None:
        """See `SnapshotMechanism.check_usable`."""
        self._lvm.check_usable()

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """See `SnapshotMechanism.plan`.

        :raises SnapshotError: a disk is no logical volume, its group has no room, or its pool is too full
        :raises UsageError: an option is no number
        :raises DriverUnavailable: LVM is not installed
        """
        for option in ("pause_seconds", "pool_limit", "marks"):
            self._number(option)
        volumes = self._lvm.volumes()
        found = tuple(self._names(disk, tag, index, volumes) for index, disk in enumerate(disks))
        for names in found:
            if named(volumes, names.group, names.snapshot) is not None:
                raise SnapshotError(f"there is a volume {names.group}/{names.snapshot} already")
        self._check_room(found, disks, volumes)
        return SnapshotPlan(self.name, tag, vm, tuple(disks), window, to_data(found))

    def prepare(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.prepare`. Makes the room of thick snapshots; for thin ones there is nothing to make.

        :raises SnapshotError: there is no room any more
        """
        for names in names_of(plan):
            if not names.thin:
                self._lvm.change(
                    "lvcreate", "--yes", "--size", f"{names.room_bytes}b", *tags_of("snapshot", plan.tag),
                    "--name", names.snapshot, names.group,
                )  # fmt: skip

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """See `SnapshotMechanism.snapshot`. One command a disk. From here on it is watched how full everything gets.

        :raises SnapshotError: LVM refused, or another of its commands kept the group for too long
        """
        found = names_of(plan)
        groups: dict[str, list[int]] = {}
        for index, names in enumerate(found):
            groups.setdefault(names.group, []).append(index)
        instants: dict[int, Moment] = {}

        def take(indices: Sequence[int]) -> None:
            for index in indices:
                self._take(plan.tag, found[index])
                instants[index] = Moment.now("snapshot")

        if len(groups) == 1:
            take(range(len(found)))
        else:
            with ThreadPoolExecutor(len(groups)) as pool:
                list(pool.map(take, groups.values()))
        self._watch(plan)
        keeping = self._number("marks") > 0
        return tuple(
            DiskSnapshot(
                plan,
                disk,
                instants[index],
                mark=marks.mark_of(plan.tag, index, names) if keeping and names.thin else "",
            )
            for index, (disk, names) in enumerate(zip(plan.disks, found, strict=True))
        )

    def settle(self, snapshots: Sequence[DiskSnapshot]) -> None:
        """See `SnapshotMechanism.settle`. Activates thin snapshots.

        :raises SnapshotError: failed, or a snapshot was given up meanwhile
        """
        if not snapshots:
            return
        plan = snapshots[0].plan
        found = names_of(plan)
        thin = [f"{names.group}/{names.snapshot}" for names in found if names.thin]
        watch = self._watch(plan)
        if thin:
            try:
                self._lvm.change("lvchange", "--activate", "y", "--ignoreactivationskip", *thin)
            except SnapshotError as e:
                for names in found:
                    if why := watch.given_up(names):
                        raise SnapshotError(f"{_label(names)} is lost: {why}") from e
                raise

    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        """See `SnapshotMechanism.health`; what the last look has found, at most a second ago."""
        watch = self._watches.get(plan.tag)
        return watch.threats() if watch else ()

    def reader(self, snapshot: DiskSnapshot) -> DeviceReader:
        """See `SnapshotMechanism.reader`. Needs `settle` before."""
        names = names_of_snapshot(snapshot)
        watch = self._watches.get(snapshot.plan.tag)
        why, given_up = (lambda: watch.problem(names), lambda: watch.given_up(names)) if watch else (str, str)
        size_bytes = snapshot.disk.size_bytes
        if names.thin:
            return self._thin_reader(names.group, names.snapshot, size_bytes, _label(names), why, given_up)
        device = f"/dev/{names.group}/{names.snapshot}"
        return DeviceReader(device, size_bytes, _label(names), why=why, given_up=given_up)

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        """See `SnapshotMechanism.changed_extents`; by the pool's metadata, whole blocks of the pool."""
        names = names_of_snapshot(snapshot)
        volumes = self._lvm.volumes([names.group])
        present = named(volumes, names.group, names.snapshot)
        if present is None or not names.thin:
            raise SnapshotError(f"{names.group}/{names.snapshot} is no thin snapshot that can be compared")
        older = marks.find(volumes, since, names.origin_uuid, present)
        for extent in self._maps.differences(older, present):
            if extent.offset < snapshot.disk.size_bytes:
                yield Extent(extent.offset, min(extent.length, snapshot.disk.size_bytes - extent.offset))

    def keep_mark(self, snapshot: DiskSnapshot, instead_of: str = "") -> None:
        """See `SnapshotMechanism.keep_mark`. Beyond the number in the option ``marks`` the oldest are given up."""
        if snapshot.mark:
            marks.keep(self._lvm, snapshot, instead_of, self._number("marks"))

    def forget_marks(self, vm: str) -> None:
        """See `SnapshotMechanism.forget_marks`."""
        if self._is_used():
            marks.forget(self._lvm, vm)

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """See `SnapshotMechanism.plan_clone`: a volume in the disk's group, lasting or not. No files."""
        chosen = choose_clone(snapshot, name)
        source = names_of_snapshot(snapshot)
        volumes = self._lvm.volumes([source.group])
        if source.thin:
            self._check_pool(source, [snapshot.disk], volumes)
        else:
            room.check_groups({source.group: snapshot.disk.size_bytes}, volumes)
        data = {"group": chosen.group, "name": chosen.name, "device": chosen.device}
        return ClonePlan(self.name, snapshot.plan, snapshot.disk.device, name, folder, lasting, data)

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """See `SnapshotMechanism.clone`. Of a thin snapshot it is made at once, of a thick one by copying all of it."""
        with self.reader(snapshot) as reader:
            return clones.make(self._lvm, clone_names_of(plan), snapshot, reader)

    def delete_clone(self, plan: ClonePlan) -> None:
        """See `SnapshotMechanism.delete_clone`."""
        names = clone_names_of(plan)
        found = named(self._lvm.volumes([names.group]), names.group, names.name)
        if found is not None and is_made_for(found, plan.snapshot.tag, "clone"):
            self._lvm.remove([found])

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> DeviceReader:
        """See `SnapshotMechanism.clone_reader`."""
        names = clone_names_of(plan)
        index = [known.device for known in plan.snapshot.disks].index(plan.device)
        label = f"the clone {names.group}/{names.name}"
        if names_of(plan.snapshot)[index].thin:
            return self._thin_reader(names.group, names.name, disk.size_bytes, label)
        return DeviceReader(names.device, disk.size_bytes, label)

    def delete(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.delete`. An origin that a command which died has left suspended is resumed.

        :raises SnapshotError: something could not be removed, or the group is not there
        """
        self._stop_watching(plan.tag)
        self._lvm.runner.await_late()
        problems = []
        for group in sorted({names.group for names in names_of(plan)}):
            try:
                self._delete_in(group, plan)
            except SnapshotError as e:
                # What is wrong with one group keeps nothing of ours in the others.
                gone = f'Volume group "{group}" not found' in e.message
                problems.append(SnapshotError(e.message, cure=_BRING_BACK) if gone else e)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            cures = dict.fromkeys(problem.cure for problem in problems if problem.cure)
            kind = SnapshotInUse if all(isinstance(each, SnapshotInUse) for each in problems) else SnapshotError
            raise kind("; ".join(problem.message for problem in problems), cure="; ".join(cures))

    def list_owned(self) -> Sequence[OwnedResource]:
        """See `SnapshotMechanism.list_owned`: what bears our tags in any group."""
        if not self._is_used():
            return ()
        ours = [volume for volume in self._lvm.volumes() if volume.ours]
        return [OwnedResource(volume.kind, volume.owned_name, volume.plan, self.name) for volume in ours]

    def remove_owned(self, owned: OwnedResource) -> None:
        """See `SnapshotMechanism.remove_owned`. With a snapshot all others of its plan are removed.

        :raises SnapshotError: it is in use
        """
        if not self._is_used():
            return
        volumes = self._lvm.volumes()
        known = [volume for volume in volumes if is_made_for(volume, owned.tag, owned.kind)]
        if any(volume.owned_name == owned.name for volume in known):
            whole = owned.kind == "snapshot"
            self._lvm.remove([volume for volume in known if whole or volume.owned_name == owned.name])

    def doctor(self) -> Sequence[Finding]:
        """See `SnapshotMechanism.doctor`."""
        return examine(self._lvm, self._number("pool_limit"))

    def close(self) -> None:
        """See `SnapshotMechanism.close`. Nobody watches the snapshots any more."""
        for tag in list(self._watches):
            self._stop_watching(tag)

    def _names(self, disk: Disk, tag: str, index: int, volumes: Sequence[Volume]) -> VolumeNames:
        device = look_up(disk.address)
        if device is None or not self.handles(disk):
            raise SnapshotError(f"{disk.device} at {disk.address} is no logical volume of {disk.size_bytes} bytes")
        origin = next((v for v in volumes if (v.group_uuid, v.uuid) == (device.group_uuid, device.volume_uuid)), None)
        if origin is None:
            raise SnapshotError(f"LVM does not know the volume {disk.address} of disk {disk.device}")
        if not origin.layout <= _LAYOUTS or (origin.origin and not origin.thin):
            layout = "snapshot" if origin.origin else ",".join(sorted(origin.layout))
            raise SnapshotError(
                f"{origin.full_name} of disk {disk.device} is of the kind {layout}, which is not snapshotted",
                cure="choose another --mechanism",
            )
        bytes_needed = 0 if origin.thin else room.room_of(origin, self._options["snapshot_size"])
        snapshot = choose_name(origin.group, tag, index)
        return VolumeNames(origin.group, origin.name, origin.uuid, snapshot, disk.address, origin.pool, bytes_needed)

    def _check_room(self, found: Sequence[VolumeNames], disks: Sequence[Disk], volumes: Sequence[Volume]) -> None:
        needed: dict[str, int] = {}
        for names in found:
            needed[names.group] = needed.get(names.group, 0) + names.room_bytes
        room.check_groups({group: size for group, size in needed.items() if size}, volumes)
        for names in found:
            if names.thin:
                self._check_pool(names, disks, volumes)

    def _delete_in(self, group: str, plan: SnapshotPlan) -> None:
        found = [names for names in names_of(plan) if names.group == group]
        volumes = self._lvm.volumes([group])
        wanted, origins = {names.snapshot for names in found}, {names.origin for names in found}
        for volume in volumes:
            if volume.suspended and volume.name in origins:
                self._lvm.change("lvchange", "--refresh", volume.full_name)
        self._lvm.remove([v for v in volumes if v.name in wanted and is_made_for(v, plan.tag, "snapshot")])
        for pool in sorted({names.pool for names in found if names.thin}):
            self._maps.release_left(group, pool)

    def _check_pool(self, names: VolumeNames, disks: Sequence[Disk], volumes: Sequence[Volume]) -> None:
        room.check_pool(volumes, names.group, names.pool, self._number("pool_limit"), disks)

    def _take(self, tag: str, names: VolumeNames) -> None:
        origin, seconds = f"{names.group}/{names.origin}", self._number("pause_seconds")
        if names.thin:
            self._lvm.change_in_pause(
                seconds, "lvcreate", "--snapshot", "--setactivationskip", "y", "--permission", "r",
                *tags_of("snapshot", tag), "--name", names.snapshot, origin,
            )  # fmt: skip
        else:
            self._lvm.change_in_pause(
                seconds,
                "lvconvert",
                "--yes",
                "--type",
                "snapshot",
                "--zero",
                "n",
                origin,
                f"{names.group}/{names.snapshot}",
            )

    def _watch(self, plan: SnapshotPlan) -> Watch:
        """What watches the snapshots of a plan; begun where there is none yet."""
        watch = self._watches.get(plan.tag)
        if watch is None:
            watch = Watch(self._lvm, plan, YES_NO.read(self._options["grow"]), self._number("pool_limit"))
            self._watches[plan.tag] = watch
            watch.start()
        return watch

    def _stop_watching(self, tag: str) -> None:
        watch = self._watches.pop(tag, None)
        if watch is not None:
            watch.stop()

    def _is_used(self) -> bool:
        """Whether there can be anything of ours: nobody can have made it without LVM and the right to use it."""
        return self._lvm.usable()

    def _number(self, option: str) -> int:
        return _TYPES[option].read(self._options[option], option)


def _label(names: VolumeNames) -> str:
    return f"the snapshot {names.group}/{names.snapshot}"
