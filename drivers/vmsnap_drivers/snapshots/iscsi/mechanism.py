"""`IscsiMechanism`: snapshots of disks that are LUNs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from threading import Event, Lock
from typing import ClassVar, Final

from vmsnap.errors import NotFound, SnapshotError, UsageError
from vmsnap.model import (
    ClonePlan,
    Disk,
    DiskSnapshot,
    Finding,
    Moment,
    OwnedResource,
    SnapshotPlan,
    Window,
)
from vmsnap.pagecache import forget
from vmsnap.roles import (
    PATH,
    DiskReader,
    DiskWriter,
    DriverContext,
    Option,
    SnapshotMechanism,
    whole_number,
    with_defaults,
)
from vmsnap.roles.filereader import FileReader
from vmsnap_drivers.devicereader import DeviceReader
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.runner_ssh import SshSettings
from vmsnap_drivers.snapshots.iscsi.address import LunAddress, parse
from vmsnap_drivers.snapshots.iscsi.doctor import examine
from vmsnap_drivers.snapshots.iscsi.exports import Export, Exports
from vmsnap_drivers.snapshots.iscsi.files import Files
from vmsnap_drivers.snapshots.iscsi.initiator import Account, InitiatorReader
from vmsnap_drivers.snapshots.iscsi.kernel import lun_at
from vmsnap_drivers.snapshots.iscsi.names import (
    CloneNames,
    LunNames,
    clone_names_of,
    clone_target_of,
    index_of,
    names_of,
    target_of,
    to_data,
)
from vmsnap_drivers.snapshots.iscsi.places import AUTO, Place, Places, Served, ServerSettings, no_lun
from vmsnap_drivers.snapshots.iscsi.sessions import KernelSessions
from vmsnap_drivers.snapshots.iscsi.stores import Origin, Owned, Stores
from vmsnap_drivers.snapshots.iscsi.targets import Taken, Target, Targets
from vmsnap_drivers.snapshots.iscsi.watch import Watch, Watched
from vmsnap_drivers.snapshots.iscsi.writer import open_lun
from vmsnap_drivers.writeback import write_back

_MOST_AT_ONCE: Final = 8
_LOGGED_OUT_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = whole_number(1, 3600)
_CONTROL_PORT: Final = whole_number(0, 32767)


class IscsiMechanism(SnapshotMechanism):
    """Point-in-time copies of LUNs, taken of their backing stores where these lie, and exported as targets of their
    own: read-only for reading, a writable clone for a duplicate.

    Targets are those of tgt or LIO on this host, or in storage appliances that are reached over SSH. A file is
    reflinked, a thin volume gets a thin snapshot, another volume one with room for all that can be overwritten.
    """

    name: ClassVar[str] = "iscsi"
    clones: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    options: ClassVar[Sequence[Option]] = (
        Option(
            "appliances",
            "which portals are served by which machines: PORTAL=ssh://USER@HOST:PORT, several with spaces; a portal"
            " that is not named is one of this host",
            "",
        ),
        Option("server", "what serves the targets; auto: both are asked", AUTO, (AUTO, "tgt", "lio")),
        Option("control_port", "the control port of the tgtd on this host", "0", type=_CONTROL_PORT),
        Option(
            "initiators",
            "who may use what is exported: addresses (tgt), or names (iqn.…), several with spaces; without it, this"
            " host's address, as the portal sees it (tgt), or QEMU's names (LIO)",
            "",
        ),
        Option(
            "reading",
            "how a snapshot on this host is read; appliances are read by the initiator",
            "store",
            ("store", "initiator"),
        ),
        Option(
            "duplicate_initiator",
            "how a duplicate reaches its disk; same: by Linux' own initiator where the VM's disk has come so, by QEMU's"
            " otherwise",
            "same",
            ("same", "qemu"),
        ),
        Option("chap_user", "the CHAP account of the targets, by which we read", ""),
        Option("chap_password_file", "the file that holds its secret", type=PATH),
        Option("known_hosts", "the file of known host keys of the appliances; without it, OpenSSH's own", type=PATH),
        Option("ssh_key", "the private key for the appliances; without it, the agent's and the user's own", type=PATH),
        Option("pause_seconds", "how long one command may take while the guest stands still", "4", type=_PAUSE_SECONDS),
    )

    def __init__(self, context: DriverContext, options: Mapping[str, str]) -> None:
        super().__init__(context, options)
        self._options = with_defaults(self.options, options)
        settings = SshSettings(self._options.get("known_hosts", ""), self._options.get("ssh_key", ""))
        servers = ServerSettings(
            self._options["server"], _CONTROL_PORT.read(self._options["control_port"]), self._options["chap_user"]
        )
        self._places = Places(self._options["appliances"], servers, settings)
        self._exports = Exports(context.state_dir / self.name)
        self._sessions = KernelSessions(LocalRunner())
        self._kinds = self._places.of("").kinds
        self._watches: dict[str, Watch] = {}
        self._passing: dict[str, list[ClonePlan]] = {}
        self._exporting = Lock()
        """No snapshot is exported, and no clone removed, while a watch gives it up."""

    def handles(self, disk: Disk) -> bool:
        """Say whether the disk is a raw LUN of a place that is known, reached by QEMU's own initiator or by Linux'."""
        lun = lun_at(disk.address)
        return disk.format == "raw" and lun is not None and self._places.serves(lun)

    def check_usable(self) -> None:
        """See `SnapshotMechanism.check_usable`; one place that may be told is enough."""
        self._places.check_usable()

    def disk_at(self, device: str, address: str) -> Disk:
        """See `SnapshotMechanism.disk_at`; the target is asked."""
        lun = self._known(lun_at(address), address)
        place = self._place(lun)
        served = place.served()
        if not served.has(lun):
            raise NotFound(no_lun(place, lun))
        return Disk(device, address, _find(place, served, lun)[1].size_bytes)

    def writer(self, disk: Disk) -> DiskWriter:
        """See `SnapshotMechanism.writer`; who is connected to the target uses the LUN."""
        lun = self._known(parse(disk.address), disk.address)
        writer = open_lun(self._place(lun), lun, self._account())
        try:
            writer.fit(disk.size_bytes)
        except UsageError:
            writer.close()
            raise
        return writer

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """See `SnapshotMechanism.plan`. Each place is asked once for its targets: a name that somebody takes later is
        refused when it is exported.

        :raises SnapshotError: a disk is no LUN that is served, what lies behind it cannot be snapshotted, or a name is
            taken
        :raises DriverUnavailable: tgtadm is not installed, or what serves on this host may not be told by us
        """
        served = cache(lambda portal: self._places.of(portal).served())
        found = tuple(self._names(disk, tag, index, served) for index, disk in enumerate(disks))
        return SnapshotPlan(self.name, tag, vm, tuple(disks), window, to_data(found))

    def prepare(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.prepare`."""
        write_back(disk.address for disk in plan.disks if disk.address.startswith("/"))
        for names in names_of(plan, self._kinds):
            self._stores(names).prepare(names.origin, names.snapshot, plan.tag)

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """See `SnapshotMechanism.snapshot`. One command a disk, all at once. A target does not know what of a disk that
        Linux' initiator has brought is in this host's page cache: that is written back before. From here on it is
        watched how full the pools get in which they lie.

        :raises SnapshotError: one failed, or took too long
        """
        seconds = _PAUSE_SECONDS.read(self._options["pause_seconds"])

        def take(disk: Disk, names: LunNames) -> Moment:
            if disk.address.startswith("/"):
                write_back([disk.address])
            self._stores(names).snapshot(names.origin, names.snapshot, plan.tag, seconds)
            return Moment.now("snapshot")

        found = names_of(plan, self._kinds)
        with ThreadPoolExecutor(min(len(found), _MOST_AT_ONCE) or 1) as pool:
            instants = list(pool.map(take, plan.disks, found))
        self._watch(plan)
        return tuple(DiskSnapshot(plan, disk, instant) for disk, instant in zip(plan.disks, instants, strict=True))

    def settle(self, snapshots: Sequence[DiskSnapshot]) -> None:
        """See `SnapshotMechanism.settle`. Exports them, each under a name of its own.

        :raises SnapshotError: the name is taken, the target could not be made, or a snapshot was given up meanwhile
        """
        served: dict[tuple[str, str], list[Target]] = {}
        for snapshot in snapshots:
            names = names_of(snapshot.plan, self._kinds)[index_of(snapshot)]
            watch = self._watch(snapshot.plan)
            with self._exporting:
                if why := watch.given_up(names.snapshot):
                    raise SnapshotError(f"the snapshot {names.snapshot} is lost: {why}")
                self._settle(names, served)

    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        """See `SnapshotMechanism.health`; what the last look has found, a few seconds ago."""
        watch = self._watches.get(plan.tag)
        return watch.threats() if watch else ()

    def reader(self, snapshot: DiskSnapshot) -> DiskReader:
        """See `SnapshotMechanism.reader`. Needs `settle` before."""
        names = names_of(snapshot.plan, self._kinds)[index_of(snapshot)]
        given_up = partial(self._given_up, snapshot.plan.tag, names.snapshot)
        return self._read(names, names.exported, names.snapshot, snapshot.disk.size_bytes, "the snapshot", given_up)

    def address_of(self, snapshot: DiskSnapshot) -> str:
        """See `SnapshotMechanism.address_of`: the LUN by which it is exported."""
        return str(names_of(snapshot.plan, self._kinds)[index_of(snapshot)].exported)

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """See `SnapshotMechanism.plan_clone`: beside the disk's backing store, lasting or not. No files here."""
        index = index_of(snapshot)
        names = names_of(snapshot.plan, self._kinds)[index]
        path = self._stores(names).beside(names.origin, snapshot.plan.tag, index, name)
        target = clone_target_of(names.lun, name, index)
        if self._server(names).find(target) is not None:
            raise Taken(target)
        log_in = self._options["duplicate_initiator"] == "same" and snapshot.disk.address.startswith("/")
        if log_in:
            self._sessions.check()
        data = asdict(CloneNames(index, path, target, log_in))
        return ClonePlan(self.name, snapshot.plan, snapshot.disk.device, name, folder, lasting, data)

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """See `SnapshotMechanism.clone`. Made at once: it shares with the snapshot what is not overwritten. Linux' own
        initiator brings it to this host where it has brought the disk.
        """
        names, source = self._clone(plan)
        lun = source.lun.beside(names.target)
        if why := self._given_up(plan.snapshot.tag, source.snapshot):
            raise SnapshotError(f"the snapshot {source.snapshot} is lost: {why}")
        if not plan.lasting:
            self._passing.setdefault(plan.snapshot.tag, []).append(plan)
        self._stores(source).clone(source.snapshot, names.path, plan.snapshot.tag)
        self._make(self._export(source, names.target, names.path), source.lun, plan.name, read_only=False)
        address = str(self._sessions.log_in(lun, snapshot.disk.address) if names.log_in else lun)
        return Disk(snapshot.disk.device, address, snapshot.disk.size_bytes)

    def delete_clone(self, plan: ClonePlan) -> None:
        """See `SnapshotMechanism.delete_clone`.

        :raises SnapshotInUse: a VM uses it
        :raises SnapshotError: it cannot be removed or reached
        """
        with self._exporting:
            self._delete_clone(plan)

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> DiskReader:
        """See `SnapshotMechanism.clone_reader`."""
        names, source = self._clone(plan)
        # One that lasts is the user's, and is not given up.
        given_up = str if plan.lasting else partial(self._given_up, plan.snapshot.tag, source.snapshot)
        if why := given_up():
            raise SnapshotError(f"the clone {names.path} is lost: {why}")
        if self._place(source.lun).here and self._server(source).bypasses_cache and source.kind != Files.kind:
            _forget(names.path)
        exported = source.lun.beside(names.target)
        return self._read(source, exported, names.path, disk.size_bytes, "the clone", given_up)

    def delete(self, plan: SnapshotPlan) -> None:
        """See `SnapshotMechanism.delete`.

        :raises SnapshotError: something could not be removed or reached
        """
        self._stop_watching(plan.tag)
        failed: SnapshotError | None = None
        for names in names_of(plan, self._kinds):
            try:
                self._place(names.lun).runner.await_late()
                self._exports.remove(self._export(names, names.target, names.snapshot), force=True)
                self._stores(names).remove(names.snapshot, plan.tag)
            except SnapshotError as e:
                failed = failed or e
        if failed is not None:
            raise failed

    def list_owned(self) -> Sequence[OwnedResource]:
        """See `SnapshotMechanism.list_owned`: what lies beside the backing stores of targets, in all places.

        :raises SnapshotError: an appliance cannot be reached
        """
        return [
            OwnedResource(owned.kind, _shown(place, owned), owned.tag, self.name)
            for place in self._places.all()
            for _, owned in self._owned(place)
        ]

    def remove_owned(self, owned: OwnedResource) -> None:
        """See `SnapshotMechanism.remove_owned`; with it goes the target that exports it, and our session with that.

        :raises SnapshotError: it is in use, or an appliance cannot be reached
        """
        for place in self._places.all():
            for stores, found in self._owned(place):
                if (found.kind, _shown(place, found), found.tag) != (owned.kind, owned.name, owned.tag):
                    continue
                for server, target in list(place.all_targets()):
                    if [lun.path for lun in target.disks] == [found.path]:
                        self._sessions.log_out_of(target.name, place.portals)
                        export = Export(place, server, target.name, found.path)
                        self._exports.remove(export, force=found.kind == "snapshot")
                stores.remove(found.path, found.tag)

    def doctor(self) -> Sequence[Finding]:
        """See `SnapshotMechanism.doctor`."""
        return examine(self._places)

    def close(self) -> None:
        """See `SnapshotMechanism.close`. Nobody watches the pools any more."""
        for tag in list(self._watches):
            self._stop_watching(tag)
        self._places.close()

    # -- within

    def _names(self, disk: Disk, tag: str, index: int, served: Callable[[str], Served]) -> LunNames:
        lun = lun_at(disk.address)
        if lun is None or not self.handles(disk):
            raise SnapshotError(f"{disk.device} at {disk.address} is no raw LUN of a place that is known")
        place, targets = self._place(lun), served(lun.portal)
        server, origin = _find(place, targets, lun)
        if origin.size_bytes != disk.size_bytes:
            raise SnapshotError(
                f"{disk.address} has {disk.size_bytes} bytes for the VM, and {origin.size_bytes} where it lies"
            )
        stores = place.kinds[origin.kind]
        snapshot, target = stores.beside(origin.path, tag, index), target_of(lun, tag, index)
        if stores.exists(snapshot):
            raise SnapshotError(f"there is {snapshot} on {place.name} already")
        if any(each.name == target for each in targets.by(server)):
            raise Taken(target)
        return LunNames(str(lun), server.name, origin.kind, origin.path, snapshot, target)

    def _delete_clone(self, plan: ClonePlan) -> None:
        names, source = self._clone(plan)
        if names.log_in:
            self._sessions.log_out(source.lun.beside(names.target))
        export = self._export(source, names.target, names.path)
        self._exports.remove(export, force=False, patience_seconds=_LOGGED_OUT_SECONDS if names.log_in else 0.0)
        self._stores(source).remove(names.path, plan.snapshot.tag)

    def _settle(self, names: LunNames, served: dict[tuple[str, str], list[Target]]) -> None:
        """Export one snapshot. `served` has what was asked already of the servers."""
        self._stores(names).settle(names.snapshot)
        export = self._export(names, names.target, names.snapshot)
        asked = (export.place.name, export.server.name)
        if asked not in served:
            served[asked] = export.server.targets()
        self._make(export, names.lun, read_only=True, served=served[asked])

    def _watch(self, plan: SnapshotPlan) -> Watch:
        """What watches the pools of a plan; begun where there is none yet."""

        def watched(names: LunNames) -> Watched:
            stores, gone = self._stores(names), Event()

            def give_up() -> None:
                with self._exporting:
                    if not gone.is_set():
                        self._exports.remove(self._export(names, names.target, names.snapshot), force=True)
                        stores.remove(names.snapshot, plan.tag)
                        gone.set()
                    # What the backup's own duplicate ran on shares its blocks.
                    passing = self._passing.get(plan.tag, [])
                    for clone in [each for each in passing if self._clone(each)[1] == names]:
                        self._delete_clone(clone)
                        passing.remove(clone)

            return Watched(names.snapshot, lambda: stores.fill(names.origin), give_up)

        watch = self._watches.get(plan.tag)
        if watch is None:
            watch = Watch(plan.tag, [watched(names) for names in names_of(plan, self._kinds)])
            self._watches[plan.tag] = watch
            watch.start()
        return watch

    def _given_up(self, tag: str, snapshot: str) -> str:
        """Why nobody is to open a snapshot or a clone of it any more; empty while that is not so."""
        watch = self._watches.get(tag)
        return watch.given_up(snapshot) if watch else ""

    def _stop_watching(self, tag: str) -> None:
        self._passing.pop(tag, None)
        if watch := self._watches.pop(tag, None):
            watch.stop()

    def _known(self, lun: LunAddress | None, address: str) -> LunAddress:
        if lun is None or not self._places.serves(lun):
            raise UsageError(f"{address} is no LUN of a place that is known", cure="see the option appliances")
        return lun

    def _place(self, lun: LunAddress) -> Place:
        return self._places.of(lun.portal)

    def _server(self, names: LunNames) -> Targets:
        place = self._place(names.lun)
        if names.server not in place.servers:
            raise SnapshotError(f"{names.target} was made by the server {names.server!r}", cure="see the option server")
        return place.servers[names.server]

    def _stores(self, names: LunNames) -> Stores:
        return self._place(names.lun).kinds[names.kind]

    def _clone(self, plan: ClonePlan) -> tuple[CloneNames, LunNames]:
        names = clone_names_of(plan, self._kinds)
        return names, names_of(plan.snapshot, self._kinds)[names.index]

    def _export(self, names: LunNames, target: str, path: str) -> Export:
        return Export(self._place(names.lun), self._server(names), target, path)

    def _make(
        self,
        export: Export,
        beside: LunAddress,
        duplicate: str = "",
        *,
        read_only: bool,
        served: Sequence[Target] | None = None,
    ) -> None:
        initiators = self._options["initiators"].split()
        self._exports.make(export, beside, initiators, duplicate, read_only=read_only, served=served)

    def _read(
        self,
        names: LunNames,
        exported: LunAddress,
        path: str,
        size_bytes: int,
        what: str,
        given_up: Callable[[], str] = str,
    ) -> DiskReader:
        if not self._place(names.lun).here or self._options["reading"] == "initiator":
            return InitiatorReader(exported, size_bytes, f"{what} {exported}", self._account(), given_up)
        if names.kind == Files.kind:
            return FileReader(Path(path), size_bytes, what)
        return DeviceReader(path, size_bytes, f"{what} {path}", given_up=given_up)

    def _account(self) -> Account:
        return Account(self._options["chap_user"], self._options.get("chap_password_file", ""))

    def _owned(self, place: Place) -> list[tuple[Stores, Owned]]:
        origins = place.origins()
        return [(stores, owned) for stores in place.kinds.values() for owned in stores.owned(origins)]


def _find(place: Place, served: Served, lun: LunAddress) -> tuple[Targets, Origin]:
    """What serves a LUN, and what lies behind it."""
    server, target = served.serving(lun) or (None, Target(lun.target))
    found = target.disk(lun.lun)
    if server is None or found is None:
        raise SnapshotError(no_lun(place, lun))
    return server, place.look(found.path)


def _forget(device: str) -> None:
    """Drop what this host has cached of a block device: its server has written past the cache.

    :raises SnapshotError: the device is gone
    """
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise SnapshotError(f"the clone {device} is lost: {e.strerror}") from e
    try:
        forget(descriptor)
    finally:
        os.close(descriptor)


def _shown(place: Place, owned: Owned) -> str:
    return owned.path if place.here else f"{owned.path} at {place.name}"
