"""A small world for tests of the protocols: a simulated VM under load, a repository, and looks at both past vmsnap.

It lies on tmpfs, so that thousands of runs are quick; nothing in it is a stand-in.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.guardians import remove_host
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import VmGone
from vmsnap.guardian import Guard, NoGuard, start_for
from vmsnap.host import HostFolders
from vmsnap.model import Disk, SnapshotPlan, VmState, Window
from vmsnap.places import create_repository, storage_for
from vmsnap.repository import Repository
from vmsnap.roles import DriverContext, Hypervisor, SnapshotMechanism
from vmsnap.testing.faults import FaultPlan, FaultyHypervisor, FaultySnapshotMechanism, FaultyStorage
from vmsnap_drivers.hypervisors.simulated import lifecycle, record
from vmsnap_drivers.hypervisors.simulated.control import ask
from vmsnap_drivers.hypervisors.simulated.layout import PAGE, Slots
from vmsnap_drivers.snapshots.file import FileMechanism

MIB = 1 << 20


class SecondMechanism(FileMechanism):
    """A mechanism beside ``file``, so that a VM has two: of the same code, with a name and tags of its own."""

    name = "second"

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """As the other one, whose files are then not this one's."""
        return super().plan(vm, disks, f"{tag}-{self.name}", window)


class WorldDrivers(Drivers):
    """The drivers that are installed, and the second mechanism, which takes no disk that was not given to it."""

    def mechanism(self, name: str) -> SnapshotMechanism:
        """One of them."""
        if name == SecondMechanism.name:
            return SecondMechanism(self.context, {})
        return super().mechanism(name)


class FaultyDrivers(WorldDrivers):
    """Drivers whose calls fail as `faults` says."""

    def __init__(
        self, context: DriverContext, faults: FaultPlan, options: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        super().__init__(context, options)
        self.faults = faults

    def hypervisor(self, name: str, vm: str, options: Mapping[str, str]) -> Hypervisor:
        """A faulty hypervisor driver."""
        return FaultyHypervisor(super().hypervisor(name, vm, options), self.faults)

    def mechanism(self, name: str) -> SnapshotMechanism:
        """A faulty snapshot mechanism."""
        return FaultySnapshotMechanism(super().mechanism(name), self.faults)


def unguarded(_context: DriverContext, _vm: str, _hypervisor: str, _options: Mapping[str, str]) -> Guard:
    """No guardian: for runs in which this process neither dies nor hangs."""
    return NoGuard()


class World:
    """One simulated VM ``vm001`` with two disks, executing, and an empty repository.

    Its disks are `images` where there are some; `mechanism_options` are those of the configuration, and `mechanisms`
    those of its disks, ``file`` where none is named.
    """

    def __init__(
        self,
        *,
        guarded: bool = False,
        memory_bytes: int = MIB,
        disk_bytes: int = MIB,
        deaf: bool = False,
        images: Sequence[Path] = (),
        mechanism_options: Mapping[str, Mapping[str, str]] | None = None,
        mechanisms: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmsnap-test-", dir="/dev/shm"))
        self.folders = HostFolders.find(self.folder / "state")
        self.start_guardian = start_for if guarded else unguarded
        self.disk_folder = self.folder / "disks"
        self.mechanism_options = mechanism_options
        self.url = str(self.folder / "repository")
        create_repository(self.url)
        loaded = lifecycle.start(
            "vm001",
            memory_bytes,
            images or [disk_bytes, disk_bytes],
            self.disk_folder,
            state_dir=self.folders.state_dir,
            deaf=deaf,
        )
        self.socket = Path(loaded.options["socket"])
        with self.controller() as controller:
            try:
                controller.add_vm("vm001", "simulated", loaded.options, mechanisms)
            except VmGone as e:
                log = record.log_path(self.socket)
                e.add_note(log.read_text() if log.exists() else "its process left no last words")
                raise
        self.files_at_rest = self.files()

    def close(self) -> None:
        """End every VM and remove everything."""
        for vm in lifecycle.list_vms(self.folders.state_dir):
            lifecycle.stop(vm.socket, force=True)
        remove_host(self.folder)

    # -- acting

    def write_noise(self, mebibytes: int) -> None:
        """Put nearly so much random data on the first disk, between the blocks in which its guest keeps records."""
        with (self.disk_folder / "vm001-disk0.img").open("r+b") as image:
            slots = Slots.of(image.seek(0, os.SEEK_END))
            for number in range(mebibytes):
                image.seek(slots.offset(number) + PAGE)
                image.write(os.urandom(min(MIB, (slots.stride_blocks - 1) * PAGE)))

    def take_away(self, vm: str) -> None:
        """See that a restored VM is whole, then remove it with its disks; nothing where there is none of that name."""
        with self.controller() as controller:
            if vm not in [row.vm for row in controller.vms()]:
                return
            row = controller.table.get(vm)
            driver = controller.drivers.hypervisor("simulated", vm, row.options)
            assert driver.state() is VmState.EXECUTING
            assert not ask(Path(row.options["socket"]), "check")["fault"]
            driver.destroy()
            controller.remove_vm(vm)
        for disk in row.disks:
            Path(disk.address).unlink()
        Path(row.disks[0].address).parent.rmdir()

    def controller(self, faults: FaultPlan | None = None) -> Controller:
        """A controller of this world, with faults."""
        context = self.folders.context()
        options = self.mechanism_options
        drivers = WorldDrivers(context, options) if faults is None else FaultyDrivers(context, faults, options)
        return Controller(self.folders, drivers=drivers, start_guardian=self.start_guardian)

    def repository(self, faults: FaultPlan | None = None) -> Repository:
        """The repository, its storage with faults."""
        storage = storage_for(self.url)
        return Repository.open(storage if faults is None else FaultyStorage(storage, faults))

    # -- looking, past vmsnap

    def status(self) -> dict[str, Any]:
        """What the VM itself says."""
        return ask(self.socket, "status")

    def counts_on(self, seconds: float = 30.0) -> bool:
        """Whether the guest's counter goes on."""
        before, deadline = self.status()["counter"], time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.status()["counter"] > before:
                return True
            time.sleep(0.002)
        return False

    def files(self) -> set[str]:
        """Every file that belongs to the VM, its duplicates or its snapshots."""
        found = {str(path) for path in self.disk_folder.rglob("*")}
        found |= {str(path) for path in (self.folders.state_dir / "duplicates").rglob("*")}
        found |= {str(path) for path in self.folders.memory_dir.rglob("*")}
        found |= {str(path) for path in (self.folders.state_dir / "simulated").rglob("*")}
        return found

    def see_that_all_is_well(self, backups: int | None = None) -> None:
        """The VM executes and agrees with its disks, nothing is left of a capture, every listed backup is whole."""
        status = self.status()
        assert status["state"] == "executing"
        assert not status["fault"]
        assert not ask(self.socket, "check")["fault"]
        assert self.counts_on()
        assert self.files() == self.files_at_rest
        with self.controller() as controller:
            assert controller.journal.unfinished() == []
            row = controller.table.get("vm001")
            assert (row.state, row.resume_flag) == ("executing", False)
            assert [other.vm for other in controller.vms()] == ["vm001"]
        repository = self.repository()
        manifests = repository.list()
        if backups is not None:
            assert len(manifests) == backups
        for manifest in manifests:
            assert list(repository.verify(manifest.backup).findings) == []
