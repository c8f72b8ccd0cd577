"""A duplicate as a VM of its own: loaded, seen to be out of everybody's reach, run, shut down, destroyed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vmsnap.controller.drivers import Drivers
from vmsnap.controller.executing import see_it_execute
from vmsnap.controller.reach import Reach
from vmsnap.errors import AlreadyExists, HypervisorError
from vmsnap.journal import Operation
from vmsnap.model import Disk, VmState, to_json
from vmsnap.roles import Hypervisor, LoadedVm, LoadRequest
from vmsnap.vmtable import VmTable


@dataclass(frozen=True)
class LoadedRecord:
    """What the journal keeps of a VM that is about to be loaded: enough to destroy it."""

    vm: str
    options: Mapping[str, str] = field(default_factory=dict)


class RunningDuplicate:
    """One duplicate under the VM name `name`. Its methods are the instructions of the protocols, in their order.

    `known` are driver instances of other VMs that are connected already.
    """

    def __init__(
        self,
        name: str,
        hypervisor: str,
        options: Mapping[str, str],
        operation: Operation,
        drivers: Drivers,
        table: VmTable,
        known: Mapping[str, Hypervisor] | None = None,
    ) -> None:
        self.name = name
        self.disks: tuple[Disk, ...] = ()
        self.loaded: LoadedVm | None = None
        self._hypervisor_name = hypervisor
        self._options = dict(options)
        self._operation = operation
        self._reach = Reach(drivers, table, name, known)
        self._table = table
        self._position: int | None = None
        self.hypervisor = drivers.hypervisor(hypervisor, name, self._options)

    def load(self, request: LoadRequest) -> None:
        """Make it exist, stopped, on the disks of the request."""
        self.disks = request.disks
        self._reach.check_disks(self.disks)
        record = LoadedRecord(self.name, self._options)
        self._position = self._operation.will_make("loaded", self._hypervisor_name, to_json(record))
        try:
            self.loaded = self.hypervisor.load(request)
        except AlreadyExists:
            # Somebody else's: nothing of it is ours to destroy.
            self._operation.is_gone(self._position)
            self._position = None
            raise

    def switch_disks(self) -> None:
        """Connect it to its own disks, and see that they are nobody else's, by what the hypervisors say now.

        :raises HypervisorError: a writable disk of it is a disk of another VM
        """
        self.disks = self.hypervisor.switch_disks(self.disks)
        self._reach.check_disks(self.disks)

    def cut_network(self) -> None:
        """Cut its network, and see that it is cut.

        :raises HypervisorError: a network interface is still connected
        """
        for nic in self.hypervisor.cut_network():
            if nic.connected:
                raise HypervisorError(f"{nic.device} of {self.name!r} is still connected to {nic.network}")

    def resume(self) -> None:
        """Let it run."""
        self.hypervisor.resume()

    def await_executing(self) -> None:
        """See that it runs.

        :raises HypervisorError: it does not
        """
        see_it_execute(self.hypervisor)
        self._table.set_state(self.name, VmState.EXECUTING.value)

    def shut_down(self, timeout_seconds: float) -> None:
        """Ask its guest to end in order, and wait for that.

        :raises HypervisorError: it did not; the message says how the guest can be helped
        """
        try:
            self.hypervisor.shut_down(timeout_seconds)
        except HypervisorError as e:
            raise HypervisorError(
                f"the duplicate did not shut down in order: {e.message}",
                cure="see that the guest obeys its power button (ACPI), or give it longer with --timeout",
            ) from e

    def await_stopped(self) -> None:
        """See that it has ended.

        :raises HypervisorError: it has not
        """
        state = self.hypervisor.state()
        if state not in (VmState.ENDED, VmState.ABSENT):
            raise HypervisorError(f"VM {self.name!r} is {state.value} instead of ended")
        self._table.set_state(self.name, VmState.ENDED.value)

    def destroy(self) -> None:
        """End it if it lives, and remove what was made to load it; its disks stay. Idempotent."""
        if self._position is not None and self._operation.owns(self._position):
            self.hypervisor.destroy()
            self._operation.is_gone(self._position)

    def close(self) -> None:
        """Let go of the connection."""
        self.hypervisor.close()
