"""`Qcow2Mechanism`: snapshots of the disks of a running QEMU by its own block layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from vmsnap.errors import Busy, HypervisorError, SnapshotError, UnknownVm, UsageError, VmGone
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
    PATH,
    DiskReader,
    DriverContext,
    Need,
    Option,
    Program,
    SnapshotMechanism,
    whole_number,
    with_defaults,
)
from vmsnap.roles.filereader import FileReader
from vmsnap_drivers.qemu.blocks import overlay
from vmsnap_drivers.qemu.blocks.checks import check_disk
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.qemu.blocks.image import INSTALL, QemuImg
from vmsnap_drivers.qemu.blocks.room import check_room, choose_folder, owner_for
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.snapshots.qcow2 import bitmaps, clones, fleecing, orphans, record, server
from vmsnap_drivers.snapshots.qcow2.changes import read_changes
from vmsnap_drivers.snapshots.qcow2.checks import check_version
from vmsnap_drivers.snapshots.qcow2.keeping import KeptNotes
from vmsnap_drivers.snapshots.qcow2.names import MECHANISM, PlanNames, choose_names
from vmsnap_drivers.snapshots.qcow2.reader import Qcow2Reader
from vmsnap_drivers.snapshots.qcow2.teardown import remove_all

_READ_SECONDS: Final = 60.0
_COPY_SECONDS: Final = whole_number(1, 3600)
_BITMAPS: Final = whole_number(0, 64)


class Qcow2Mechanism(SnapshotMechanism):
    """Point-in-time copies of raw and qcow2 disks on any file system, through QEMU's monitor.

    Where the window is free, by fleecing (module `fleecing`); where the hypervisor hands its disks over, by an overlay
    that is put back at once after the guest runs again, and fleecing from then on (module `overlay`). Either way the
    guest's device is connected to another node within the pause, all in one round trip; that nothing is written between
    the first and the last disk is seen to by refusing a guest that executes.

    A disk is known by its handle: ``qmp`` (the monitor's socket, or its address by way of libvirt), ``node`` (the node
    to which the device is connected), ``qdev`` (the device's id or QOM path), ``file``. QEMU 7.1 or later.
    """

    name: ClassVar[str] = MECHANISM
    clones: ClassVar[bool] = True
    changes: ClassVar[bool] = True
    of_storage: ClassVar[bool] = False
    options: ClassVar[Sequence[Option]] = (
        Option(
            "folder",
            "where blocks that the guest overwrites are kept meanwhile (default: beside each disk)",
            type=PATH,
        ),
        Option(
            "copy_seconds",
            "how long a write of the guest's may wait for its old block to be copied",
            default="10",
            type=_COPY_SECONDS,
        ),
        Option(
            "bitmaps",
            "of how many backups the changes since are recorded at once: one is needed for each repository; 0: none",
            default="4",
            type=_BITMAPS,
        ),
        Option("qemu_img", "the program qemu-img", default="qemu-img"),
    )
    needs: ClassVar[Sequence[Need]] = (Program(("qemu-img",), "apt install qemu-utils"),)

    def __init__(self, context: DriverContext, options: Mapping[str, str]) -> None:
        super().__init__(context, options)
        self._options = with_defaults(self.options, options)
        self._folder = context.state_dir / MECHANISM
        self._image = QemuImg(self._options["qemu_img"])
        self._monitor: Monitor | None = None

    def handles(self, disk: Disk) -> bool:
        """Say whether the disk is one of a QEMU, and raw or qcow2; or has a filter on it, which `plan` refuses."""
        known = all(disk.handle.get(key) for key in ("qmp", "node", "qdev", "file"))
        return known and disk.format in ("raw", "qcow2", "copy-before-write") and disk.size_bytes > 0

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """See `SnapshotMechanism.plan`. Asks QEMU, changes nothing, and keeps no connection.

        :raises SnapshotError: a disk is not as it was described, something stands on it, no room, QEMU too old
        :raises DriverUnavailable: qemu-img is not installed
        :raises VmGone: QEMU has ended
        """
        chosen = tuple(disks)
        for disk in chosen:
            if not self.handles(disk):
                raise SnapshotError(f"disk {disk.device} is none that QEMU's block layer can snapshot for us")
        self._copy_seconds()
        count = self._bitmaps()
        self._image.require()
        folders = tuple(choose_folder(disk, self._options.get("folder"), self._folder) for disk in chosen)
        names = choose_names(
            tag,
            chosen,
            folders,
            self._folder,
            overlays=window is Window.NO_BLOCK_JOBS,
            bitmaps=tuple(bitmaps.choose_name() if count else "" for _ in chosen),
        )
        # A plan may be carried out by another process, which then needs the monitor: it serves one.
        with Monitor.borrow(names.monitor) as monitor:
            graph = BlockGraph(monitor)
            check_version(graph)
            for disk, own in zip(chosen, names.disks, strict=True):
                check_disk(graph, disk, own)
        check_room(chosen, folders)
        return SnapshotPlan(self.name, tag, vm, chosen, window, names.to_data())

    def prepare(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.prepare`. Makes the files, adds nodes that nothing uses yet, starts the NBD server.

        :raises SnapshotError: not possible
        :raises Busy: QEMU's NBD server is in use
        """
        names = PlanNames.of(plan)
        graph = self._graph(names)
        record.write(plan, names)
        server.start(graph, Path(names.socket))
        for disk, own in zip(plan.disks, names.disks, strict=True):
            if disk.read_only:
                continue
            bitmaps.remove_broken(graph, disk)
            bitmaps.remove_beyond(graph, disk, self._bitmaps())
            owner = owner_for(disk, graph.monitor.peer_pid)
            self._image.create(Path(own.target_file), disk.size_bytes, owner=owner, backing=None)
            if own.overlay_file:
                backing = (disk.handle["file"], disk.format)
                self._image.create(Path(own.overlay_file), disk.size_bytes, owner=owner, backing=backing)
                overlay.add_overlay(graph, disk, own)
                bitmaps.hold(graph, disk)
            else:
                fleecing.add_filter(graph, disk, own, self._copy_seconds())

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """See `SnapshotMechanism.snapshot`. One round trip for all disks, and one for the records of their changes.

        :raises SnapshotError: QEMU refused, or the guest executes
        """
        names = PlanNames.of(plan)
        graph = self._graph(names)
        disks = list(zip(plan.disks, names.disks, strict=True))
        connections = [
            (disk, own.overlay if own.overlay_file else own.filter) for disk, own in disks if not disk.read_only
        ]
        bitmaps.begin(graph, disks)
        # Whether the guest stands still is asked in the same breath: if not, what was connected is worthless.
        if graph.connect_all(connections):
            raise SnapshotError(f"the VM {plan.vm} executes: its disks would not show one instant")
        instant = Moment.now("disks")
        return tuple(DiskSnapshot(plan, disk, instant, mark=bitmaps.mark_of(disk, own)) for disk, own in disks)

    def settle(self, snapshots: Sequence[DiskSnapshot]) -> None:
        """Put overlays back and export the disks as they were. To be called as soon as the guest runs again.

        :raises SnapshotError: failed; where an overlay could not be put back, the guest goes on with it
        """
        if not snapshots:
            return
        plan = snapshots[0].plan
        names = PlanNames.of(plan)
        graph = self._graph(names)
        disks = list(zip(plan.disks, names.disks, strict=True))
        overlaid = [(disk, own) for disk, own in disks if own.overlay_file and not disk.read_only]
        for disk, own in overlaid:
            fleecing.add_filter(graph, disk, own, self._copy_seconds())
        overlay.put_back(graph, overlaid)
        for disk, _ in overlaid:
            bitmaps.let_go(graph, disk)
        for disk, own in disks:
            fleecing.export(graph, disk, own)

    def reader(self, snapshot: DiskSnapshot) -> DiskReader:
        """See `SnapshotMechanism.reader`. Needs `settle` before."""
        names = PlanNames.of(snapshot.plan)
        own = names.disks[snapshot.plan.disks.index(snapshot.disk)]
        target = None if snapshot.disk.read_only else own.target
        return Qcow2Reader(snapshot.disk, Path(names.socket), own.access, target, _READ_SECONDS)

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        """See `SnapshotMechanism.changed_extents`. Needs `settle` before. What the guest changed after the snapshot is
        named too.
        """
        names = PlanNames.of(snapshot.plan)
        own = names.disks[snapshot.plan.disks.index(snapshot.disk)]
        yield from read_changes(self._graph(names), snapshot.disk, own, Path(names.socket), since, _READ_SECONDS)

    def keep_mark(self, snapshot: DiskSnapshot, instead_of: str = "") -> None:
        """See `SnapshotMechanism.keep_mark`. Beyond the number in the option ``bitmaps`` the oldest are given up.

        :raises SnapshotError: failed
        :raises VmGone: QEMU has ended
        """
        names, disk = PlanNames.of(snapshot.plan), snapshot.disk
        own = names.disks[snapshot.plan.disks.index(disk)]
        graph = self._graph(names)
        before = {found.kept_as for found in bitmaps.find_all(graph, disk)}
        self._kept.write(snapshot.plan.vm, disk, sorted({*before, own.bitmap}))
        bitmaps.keep(graph, disk, own)
        if instead_of:
            bitmaps.remove(graph, disk, bitmaps.parse_mark(instead_of)[0])
        bitmaps.remove_beyond(graph, disk, self._bitmaps())
        left = {found.kept_as for found in bitmaps.find_all(graph, disk)}
        self._kept.write(snapshot.plan.vm, disk, sorted(left))

    def forget_marks(self, vm: str) -> None:
        """See `SnapshotMechanism.forget_marks`: from the running QEMU, else from the image.

        :raises SnapshotError: QEMU's monitor or the image is in use by another program
        :raises DriverUnavailable: qemu-img is needed and not installed
        """
        for kept in self._kept.all(vm):
            try:
                with Monitor.borrow(kept.monitor) as monitor:
                    bitmaps.remove_everywhere(BlockGraph(monitor), kept.names)
            except (VmGone, UnknownVm):
                if kept.format == "qcow2":
                    self._image.remove_bitmaps(Path(kept.file), set(kept.names))
            except (Busy, UsageError, HypervisorError) as e:
                raise SnapshotError(e.message, cure=e.cure) from e
            self._kept.strike(kept)

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """See `SnapshotMechanism.plan_clone`: a sparse raw file, lasting or not. A read-only disk is shared."""
        return clones.plan_clone(snapshot, name, folder, lasting=lasting)

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """See `SnapshotMechanism.clone`. Reads the snapshot as a backup does, from 1 GB/s on where it is cached."""
        with self.reader(snapshot) as reader:
            return clones.make(plan, snapshot, reader, self._clone_notes)

    def delete_clone(self, plan: ClonePlan) -> None:
        """See `SnapshotMechanism.delete_clone`."""
        clones.delete(plan, self._clone_notes)

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> DiskReader:
        """See `SnapshotMechanism.clone_reader`.

        :raises SnapshotError: it is lost, or a read-only disk's, to which nobody wrote
        """
        path = clones.file_of(plan)
        if path is None:
            raise SnapshotError(f"disk {plan.device} is read-only and was not cloned: its snapshot is read")
        return FileReader(path, disk.size_bytes, "the clone")

    def delete(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.delete`. With or without its QEMU.

        :raises SnapshotError: something is left, above all an overlay that cannot be put back safely: the message says
            what to do
        """
        names = PlanNames.of(plan)
        self.close()
        try:
            monitor = Monitor.borrow(names.monitor)
        except (VmGone, UnknownVm):
            remove_all(None, self._image, plan, names)
            return
        except (Busy, UsageError, HypervisorError) as e:
            raise SnapshotError(e.message, cure=e.cure) from e
        with monitor:
            remove_all(BlockGraph(monitor), self._image, plan, names)

    def list_owned(self) -> Sequence[OwnedResource]:
        """See `SnapshotMechanism.list_owned`: the files that the records in vmsnap's state folder name."""
        return [*record.list_owned(self._folder), *clones.list_owned(self._clone_notes), *self._kept.list_owned()]

    def list_owned_on(self, disks: Sequence[Disk]) -> Sequence[OwnedResource]:
        """See `SnapshotMechanism.list_owned_on`: nodes in their QEMU.

        :raises SnapshotError: it refused, or its monitor is in use by another program
        """
        found: list[OwnedResource] = []
        for address in sorted({disk.handle["qmp"] for disk in disks if self.handles(disk)}):
            try:
                with Monitor.borrow(address) as monitor:
                    found += orphans.find(BlockGraph(monitor), self._folder)
            except (VmGone, UnknownVm):
                continue
            except (Busy, UsageError) as e:
                raise SnapshotError(e.message, cure=e.cure) from e
        return found

    def remove_owned(self, owned: OwnedResource) -> None:
        """See `SnapshotMechanism.remove_owned`: by the plan in the record or the note that tells of it. A record that
        cannot be read is removed itself.

        :raises SnapshotError: something is left, or it is a record of changes, which may serve the next backup
        """
        if owned.kind == orphans.KIND:
            left = record.read_copy(Path(owned.name))
            if left is not None:
                self.delete(left)
            elif not owned.name.startswith("/"):
                raise SnapshotError(
                    f"of {owned.name} nothing is left but nodes in a running QEMU, which no record tells how to remove",
                    cure="they go with that QEMU: shut the VM down when that suits it",
                )
            return
        if owned.kind == "dirty bitmap":
            raise SnapshotError(
                f"{owned.name} records what changes on a disk, for the next backup",
                cure="register its VM, then: vmsnap vm remove NAME",
            )
        if owned not in self.list_owned():
            return
        clone = clones.plan_of(owned, self._clone_notes)
        plan = record.plan_of(owned, self._folder)
        if clone is not None:
            self.delete_clone(clone)
        elif plan is not None:
            self.delete(plan)
        else:
            Path(owned.name).unlink(missing_ok=True)

    def doctor(self) -> Sequence[Finding]:
        """See `SnapshotMechanism.doctor`."""
        program = self._image.find()
        if program is None:
            return [Finding("qemu-img", "missing", "it is not installed", INSTALL)]
        return [Finding("qemu-img", "ok", program)]

    def close(self) -> None:
        """Give the monitor back; idempotent. Snapshots stay."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _graph(self, names: PlanNames) -> BlockGraph:
        if self._monitor is None or self._monitor.path != names.monitor:
            self.close()
            self._monitor = Monitor.borrow(names.monitor)
        return BlockGraph(self._monitor)

    @property
    def _clone_notes(self) -> Path:
        return self._folder / "clones"

    @property
    def _kept(self) -> KeptNotes:
        return KeptNotes(self._folder / "bitmaps")

    def _copy_seconds(self) -> int:
        return _COPY_SECONDS.read(self._options["copy_seconds"], "copy_seconds")

    def _bitmaps(self) -> int:
        return _BITMAPS.read(self._options["bitmaps"], "bitmaps")
