"""What the suites of crash points share: the core's state folder and repository around a rig's VM, work in a process
that is killed on plan, and looks at what is left of it.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from vmsnap.controller import Controller, Drivers
from vmsnap.controller.results import BackupResult
from vmsnap.host import HostFolders
from vmsnap.places import create_repository, open_repository
from vmsnap.repository import Repository
from vmsnap.roles import DriverContext, Hypervisor
from vmsnap.testing.faults import Effect, Fault, FaultPlan, FaultyHypervisor
from vmsnap.testing.rigs import HypervisorRig

MAX_PAUSE_SECONDS = 20.0
"""Generous: what is seen is that the guest goes on, and not how soon."""
TIMEOUT_SECONDS = 120.0
"""How long a duplicate's guest may take to shut down."""


class _Faulty(Drivers):
    def __init__(self, context: DriverContext, faults: FaultPlan) -> None:
        super().__init__(context)
        self._faults = faults

    def hypervisor(self, name: str, vm: str, options: Mapping[str, str]) -> Hypervisor:
        return FaultyHypervisor(super().hypervisor(name, vm, options), self._faults)


class CrashStage:
    """The rig's VM, registered, and an empty repository in the rig's scratch folder."""

    def __init__(self, rig: HypervisorRig, mechanisms: Mapping[str, str]) -> None:
        self.rig = rig
        self.folders = HostFolders(state_dir=rig.context.state_dir, memory_dir=rig.context.memory_dir)
        self._url = str(rig.scratch / "repository")
        create_repository(self._url)
        with self.controller() as controller:
            controller.add_vm(rig.vm, rig.driver(rig.vm).name, rig.options, mechanisms)

    def controller(self) -> Controller:
        """A controller whose drivers do not fail."""
        return Controller(self.folders)

    def repository(self) -> Repository:
        """The repository, opened anew."""
        return open_repository(self._url)

    def back_up(self, **how: Any) -> BackupResult:
        """Back the VM up, with the further arguments of `Controller.backup`."""
        with self.controller() as controller:
            return controller.backup(self.rig.vm, self.repository(), max_pause_seconds=MAX_PAUSE_SECONDS, **how)

    def see_it_killed(self, call: str, effect: Effect, work: Callable[[Controller], object], number: int = 1) -> str:
        """Do `work` in a process that is killed at call number `number` of the driver's method `call`.

        Returns words for what was done.

        :raises AssertionError: it was not killed, as it never came to that call
        """
        what = f"{effect.value} {call}"
        child = os.fork()
        if child == 0:
            try:
                drivers = _Faulty(self.folders.context(), FaultPlan(Fault(call, number, effect)))
                with Controller(self.folders, drivers=drivers) as doomed:
                    work(doomed)
            except BaseException:  # noqa: BLE001 - why it was not killed; nothing of pytest may go on in the child
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it was not killed: {what}"
        return what

    def see_the_guest_go_on(self, what: str) -> None:
        """:raises AssertionError: the VM does not count on"""
        at = self.rig.progress(self.rig.vm)
        self.rig.eventually(lambda: self.rig.progress(self.rig.vm) > at, f"the guest goes on after {what}")

    def recover(self, what: str, before: frozenset[str] | None = None) -> None:
        """Let the core recover.

        :raises AssertionError: something is kept, or there is more or less on the host than `before`
        """
        with self.controller() as controller:
            recovered = controller.recover()
            assert recovered.kept == (), f"kept after {what}: {recovered.kept}"
            assert controller.journal.unfinished() == []
        if before is not None:
            self.rig.eventually(lambda: self.beside_the_core() == before, f"nothing is left after {what}")

    def beside_the_core(self) -> frozenset[str]:
        """The rig's traces without the core's own: its database, its logs and its locks."""
        state = self.rig.context.state_dir
        own = (str(state / "vmsnap.db"), str(state / "locks"))
        folders = {str(state / name) for name in ("duplicates", "vms")}
        return frozenset(trace for trace in self.rig.traces() if not trace.startswith(own) and trace not in folders)
