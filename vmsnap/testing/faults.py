"""Drivers that fail on plan: a wrapper for each role, around any driver.

A `FaultPlan` says which call of which method shows which effect, and counts all calls; the same plan may be shared by
several wrappers, so that the calls of a whole protocol run are counted together::

    plan = FaultPlan(Fault("duplicate", 1, Effect.AFTER))
    hypervisor = FaultyHypervisor(SimulatedHypervisor("vm001", context, {}), plan)

To try every fault of a run, count the calls of one that goes well and go through `single_faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from vmsnap.errors import HypervisorError, SnapshotError, StorageError
from vmsnap.model import (
    CapturePlan,
    ClonePlan,
    Disk,
    DiskSnapshot,
    Duplicate,
    Extent,
    Finding,
    FreezePlan,
    Moment,
    Nic,
    OwnedResource,
    SeenVm,
    SnapshotPlan,
    VmDescription,
    VmState,
    Window,
)
from vmsnap.roles import (
    CaptureRequest,
    DiskReader,
    DiskWriter,
    Hypervisor,
    LoadedVm,
    LoadRequest,
    ObjectInfo,
    SnapshotMechanism,
    StorageBackend,
    StorageProperties,
)
from vmsnap.testing.faultplan import Effect, Fault, FaultPlan, single_faults

__all__ = [
    "Effect",
    "Fault",
    "FaultPlan",
    "FaultyHypervisor",
    "FaultyReader",
    "FaultySnapshotMechanism",
    "FaultyStorage",
    "single_faults",
]

P = ParamSpec("P")
T = TypeVar("T")


class FaultyHypervisor(Hypervisor):
    """A hypervisor driver with planned faults."""

    def __init__(self, driver: Hypervisor, plan: FaultPlan) -> None:
        """Wrap `driver`."""
        super().__init__(driver.vm, driver.context, {})
        vars(self).update(
            name=driver.name, options=driver.options, freezes=driver.freezes, loads_luns=driver.loads_luns
        )
        self.driver, self.plan = driver, plan

    def _call(self, target: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self.plan.call(HypervisorError, target.__name__, target, *args, **kwargs)

    def describe(self) -> VmDescription:
        """See the role."""
        return self._call(self.driver.describe)

    def state(self) -> VmState:
        """See the role."""
        return self._call(self.driver.state)

    def tags(self) -> Sequence[str]:
        """Hand on."""
        return self._call(self.driver.tags)

    def list_vms(self) -> Sequence[str]:
        """See the role."""
        return self._call(self.driver.list_vms)

    def see_vms(self) -> Sequence[SeenVm]:
        """See the role."""
        return self._call(self.driver.see_vms)

    def doctor(self) -> Sequence[Finding]:
        """See the role."""
        return self._call(self.driver.doctor)

    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        """See the role."""
        return self._call(self.driver.plan_capture, request)

    def prepare(self, request: CaptureRequest, plan: CapturePlan) -> None:
        """See the role."""
        return self._call(self.driver.prepare, request, plan)

    def pause(self) -> Moment:
        """See the role."""
        return self._call(self.driver.pause)

    def duplicate(self) -> Duplicate:
        """See the role."""
        return self._call(self.driver.duplicate)

    def resume(self) -> Moment:
        """See the role."""
        return self._call(self.driver.resume)

    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        """See the role."""
        return self._call(self.driver.finish_duplicate, duplicate, progress)

    def abandon(self) -> None:
        """See the role."""
        return self._call(self.driver.abandon)

    def discard_duplicate(self, name: str) -> None:
        """See the role."""
        return self._call(self.driver.discard_duplicate, name)

    def plan_freeze(self, disks: Sequence[Disk], tag: str) -> FreezePlan:
        """See the role."""
        return self._call(self.driver.plan_freeze, disks, tag)

    def prepare_freeze(self, plan: FreezePlan) -> None:
        """See the role."""
        return self._call(self.driver.prepare_freeze, plan)

    def freeze_disks(self, plan: FreezePlan) -> Moment:
        """See the role."""
        return self._call(self.driver.freeze_disks, plan)

    def check_frozen(self, plan: FreezePlan) -> None:
        """See the role."""
        return self._call(self.driver.check_frozen, plan)

    def thaw_disks(self, plan: FreezePlan) -> None:
        """See the role."""
        return self._call(self.driver.thaw_disks, plan)

    def thaw_owned(self, owned: OwnedResource) -> None:
        """See the role."""
        return self._call(self.driver.thaw_owned, owned)

    def duplicate_options(self) -> Mapping[str, str]:
        """See the role; never fails on plan, as it does no I/O."""
        return self.driver.duplicate_options()

    def load(self, request: LoadRequest) -> LoadedVm:
        """See the role."""
        return self._call(self.driver.load, request)

    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        """See the role."""
        return self._call(self.driver.switch_disks, disks)

    def cut_network(self) -> tuple[Nic, ...]:
        """See the role."""
        return self._call(self.driver.cut_network)

    def shut_down(self, timeout_seconds: float) -> None:
        """See the role."""
        return self._call(self.driver.shut_down, timeout_seconds)

    def fence(self, *, kill: bool = False) -> str:
        """See the role."""
        return self._call(self.driver.fence, kill=kill)

    def await_life(self, seconds: float) -> str:
        """See the role."""
        return self._call(self.driver.await_life, seconds)

    def destroy(self) -> None:
        """See the role."""
        return self._call(self.driver.destroy)

    def list_owned(self) -> Sequence[OwnedResource]:
        """See the role."""
        return self._call(self.driver.list_owned)

    def close(self) -> None:
        """Close the driver; never fails on plan."""
        self.driver.close()


class FaultyReader(DiskReader):
    """A reader with planned faults: of `extents` and `read_into`."""

    def __init__(self, reader: DiskReader, plan: FaultPlan) -> None:
        """Wrap `reader`."""
        self.size_bytes = reader.size_bytes
        self.reader = reader
        self.plan = plan

    def extents(self) -> Iterator[Extent]:
        """See the role; the fault strikes when the first extent is asked for, or after the last."""
        return self.plan.iterate(SnapshotError, "extents", self.reader.extents)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See the role."""
        return self.plan.call(SnapshotError, "read_into", self.reader.read_into, offset, buffer)

    def remark(self) -> str:
        """See the role; never fails on plan."""
        return self.reader.remark()

    def close(self) -> None:
        """Close the reader; never fails on plan."""
        self.reader.close()


class FaultySnapshotMechanism(SnapshotMechanism):
    """A snapshot mechanism with planned faults; `handles` never fails, as the role says."""

    def __init__(self, driver: SnapshotMechanism, plan: FaultPlan) -> None:
        """Wrap `driver`; the plan of faults is `fault_plan`, as `plan` is a method of the role."""
        super().__init__(driver.context, {})
        vars(self).update(
            name=driver.name,
            options=driver.options,
            clones=driver.clones,
            changes=driver.changes,
            writes=driver.writes,
            of_storage=driver.of_storage,
        )
        self.driver = driver
        self.fault_plan = plan

    def _call(self, target: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self.fault_plan.call(SnapshotError, target.__name__, target, *args, **kwargs)

    def handles(self, disk: Disk) -> bool:
        """See the role."""
        return self.driver.handles(disk)

    def check_usable(self) -> None:
        """See the role."""
        self.driver.check_usable()

    def disk_at(self, device: str, address: str) -> Disk:
        """See the role."""
        return self.driver.disk_at(device, address)

    def writer(self, disk: Disk) -> DiskWriter:
        """See the role."""
        return self._call(self.driver.writer, disk)

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """See the role."""
        return self._call(self.driver.plan, vm, disks, tag, window)

    def prepare(self, plan: SnapshotPlan) -> None:
        """See the role; counted as ``prepare_disks``, so that one plan can tell it from the hypervisor's."""
        return self.fault_plan.call(SnapshotError, "prepare_disks", self.driver.prepare, plan)

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """See the role."""
        return self._call(self.driver.snapshot, plan)

    def settle(self, snapshots: Sequence[DiskSnapshot]) -> None:
        """See the role."""
        return self._call(self.driver.settle, snapshots)

    def address_of(self, snapshot: DiskSnapshot) -> str:
        """See the role; never fails on plan, as it does no I/O."""
        return self.driver.address_of(snapshot)

    def health(self, plan: SnapshotPlan) -> Sequence[Finding]:
        """See the role; not counted, as it is called by the clock."""
        return self.driver.health(plan)

    def changed_extents(self, snapshot: DiskSnapshot, since: str) -> Iterator[Extent]:
        """See the role."""
        return self._call(self.driver.changed_extents, snapshot, since)

    def keep_mark(self, snapshot: DiskSnapshot, instead_of: str = "") -> None:
        """See the role."""
        return self._call(self.driver.keep_mark, snapshot, instead_of)

    def forget_marks(self, vm: str) -> None:
        """See the role."""
        return self._call(self.driver.forget_marks, vm)

    def reader(self, snapshot: DiskSnapshot) -> DiskReader:
        """See the role."""
        return FaultyReader(self._call(self.driver.reader, snapshot), self.fault_plan)

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """See the role."""
        return self._call(self.driver.plan_clone, snapshot, name, folder, lasting=lasting)

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """See the role."""
        return self._call(self.driver.clone, plan, snapshot)

    def delete_clone(self, plan: ClonePlan) -> None:
        """See the role."""
        return self._call(self.driver.delete_clone, plan)

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> DiskReader:
        """See the role."""
        return FaultyReader(self._call(self.driver.clone_reader, plan, disk), self.fault_plan)

    def delete(self, plan: SnapshotPlan) -> None:
        """See the role; counted as ``delete_snapshots``, so that one plan can tell it from the storage's."""
        return self.fault_plan.call(SnapshotError, "delete_snapshots", self.driver.delete, plan)

    def list_owned(self) -> Sequence[OwnedResource]:
        """See the role."""
        return self._call(self.driver.list_owned)

    def list_owned_on(self, disks: Sequence[Disk]) -> Sequence[OwnedResource]:
        """See the role."""
        return self._call(self.driver.list_owned_on, disks)

    def remove_owned(self, owned: OwnedResource) -> None:
        """See the role."""
        self._call(self.driver.remove_owned, owned)

    def doctor(self) -> Sequence[Finding]:
        """See the role."""
        return self._call(self.driver.doctor)

    def close(self) -> None:
        """Close the driver; never fails on plan."""
        self.driver.close()


class FaultyStorage(StorageBackend):
    """A storage backend with planned faults."""

    def __init__(self, driver: StorageBackend, plan: FaultPlan) -> None:
        """Wrap `driver`."""
        super().__init__(driver.url, {})
        vars(self).update(name=driver.name, options=driver.options, remote=driver.remote)
        self.retention_seconds = driver.retention_seconds
        self.driver = driver
        self.plan = plan

    def _call(self, target: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self.plan.call(StorageError, target.__name__, target, *args, **kwargs)

    def create(self) -> None:
        """See the role."""
        return self._call(self.driver.create)

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See the role."""
        return self._call(self.driver.put, key, data, if_absent=if_absent)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See the role."""
        return self._call(self.driver.get, key, offset, length)

    def stat(self, key: str) -> ObjectInfo:
        """See the role."""
        return self._call(self.driver.stat, key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See the role; the fault strikes when the first object is asked for, or after the last."""
        return self.plan.iterate(StorageError, "list", lambda: self.driver.list(prefix))

    def delete(self, key: str) -> None:
        """See the role."""
        return self._call(self.driver.delete, key)

    def properties(self) -> StorageProperties:
        """See the role."""
        return self._call(self.driver.properties)

    def doctor(self) -> Sequence[Finding]:
        """See the role."""
        return self._call(self.driver.doctor)

    def retain(self, keys: Iterable[str], until: datetime) -> None:
        """See the role."""
        return self._call(self.driver.retain, keys, until)

    def retained(self, keys: Iterable[str]) -> dict[str, datetime]:
        """See the role."""
        return self._call(self.driver.retained, keys)

    def hurry(self) -> None:
        """See the role; never fails on plan."""
        self.driver.hurry()

    def close(self) -> None:
        """Close the driver; never fails on plan."""
        self.driver.close()
