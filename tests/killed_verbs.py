"""Verbs that are carried out by a worker that is killed at each call of a driver, one after the other, on a real VM."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.lab.machine import PATIENCE_SECONDS
from tests.left_out import some_of
from tests.test_duplicate_failures import STORAGE
from tests.workers import worker_that_waits_at
from tests.world import FaultyDrivers
from vmsnap.controller import Controller
from vmsnap.repository import Repository
from vmsnap.testing.faults import FaultPlan

LIVE_CALLS = (
    "plan_capture", "prepare_disks", "prepare", "pause", "snapshot", "duplicate", "resume", "settle",
    "finish_duplicate", "read_into", "keep_mark", "delete_snapshots", "discard_duplicate",
)  # fmt: skip
"""The calls of drivers that carry out a live backup, in order."""
LOOKING = {*STORAGE, "state", "describe", "extents", "plan_clone"}
"""Calls that change nothing: to be killed there is to be killed before the next one."""


@dataclass(frozen=True)
class Scene:
    """Where verbs are killed: the VM ``vm001``, which runs, and what knows how its host is at rest."""

    controller: Controller
    repository: Repository
    place: Path
    """Has the repository, and the state folder."""
    hypervisor: str
    options: Mapping[str, str] | None
    at_rest: Callable[[], object]
    """All that a verb could leave on this host."""
    goes_on: Callable[[], None]
    """Waits until the guest counts on."""

    @property
    def clean(self) -> Path:
        """Where a consolidation puts its disks: a folder of vmsnap's, through which QEMU's user is let."""
        return self.controller.folders.state_dir / "clean"

    def set_right(self, rest: object, call: str) -> None:
        """What a later command makes of it: all as it was before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        recovered = self.controller.recover()
        # A guardian that is at it on a busy machine has the lock.
        while recovered.kept and all("is busy" in line for line in recovered.kept) and time.monotonic() < deadline:
            time.sleep(0.2)
            recovered = self.controller.recover()
        assert recovered.kept == (), (call, recovered)
        assert self.at_rest() == rest, call
        assert self.controller.journal.unfinished() == []

    def kill(self, verb: str, rest: object, call: str, number: int = 1) -> None:
        """Kill a worker at a call; the guest goes on, and a later command sets the rest right."""
        folders, url = self.controller.folders, str(self.place / "repository")
        worker = worker_that_waits_at(folders.state_dir, url, call, verb=verb, number=number)
        worker.kill()
        worker.communicate()
        self.goes_on()
        self.set_right(rest, f"{verb}: {call}")
        assert not self.clean.exists(), call


@dataclass(frozen=True)
class Later:
    """What follows a backup, carried out by a worker, and from which of its calls on it is killed."""

    verb: str
    work: Callable[[Scene, Controller, str], object]
    kills: Callable[[list[str]], list[tuple[str, int]]]

    def kill_at_each_call(self, scene: Scene) -> list[str]:
        """Carry it out once to its end, then once for every second call of a driver, and be killed there; returns those
        calls.
        """
        live = scene.controller.backup("vm001", scene.repository).backup
        rest, plan = scene.at_rest(), FaultPlan()
        folders = scene.controller.folders
        with Controller(folders, drivers=FaultyDrivers(folders.context(), plan)) as made:
            self.work(scene, made, live)
        assert scene.at_rest() == rest
        kills = some_of(self.kills(plan.calls), 2)
        for call, number in kills:
            scene.kill(f"{self.verb}:{live}", rest, call, number)
        assert scene.controller.backup("vm001", scene.repository).warnings == ()
        assert not scene.repository.check(read_data=True).damaged
        return [call for call, _ in kills]


def first_calls(calls: list[str]) -> list[tuple[str, int]]:
    """Each method once, but for those that only look."""
    return [(call, 1) for call in dict.fromkeys(calls) if call not in LOOKING]


def calls_on_the_duplicate(calls: list[str]) -> list[tuple[str, int]]:
    """Of a consistent backup, what comes after a live one's first half, which is tried by itself."""
    begun = calls.index("finish_duplicate")
    later = [call for call in dict.fromkeys(calls[begun + 1 :]) if call not in calls[:begun]]
    return [("resume", 2), *((call, 1) for call in later if call not in LOOKING)]


def _restored(scene: Scene, controller: Controller, live: str) -> None:
    """A restore that went well, and is taken away again."""
    made = controller.restore(scene.repository, live, "vm002", run=True, isolated=True, options=scene.options)
    driver = scene.controller.drivers.hypervisor(scene.hypervisor, "vm002", made.options)
    driver.destroy()
    driver.close()
    scene.controller.remove_vm("vm002")
    shutil.rmtree(scene.controller.folders.state_dir / "vms")


def _consolidated(scene: Scene, controller: Controller, live: str) -> None:
    """A consolidation that went well, and is taken away again."""
    controller.consolidate(scene.repository, live, scene.clean, options=scene.options)
    shutil.rmtree(scene.clean)


LATER = (
    Later("restore", _restored, first_calls),
    Later(
        "consistent",
        lambda scene, made, _: made.backup("vm001", scene.repository, mode="consistent"),
        calls_on_the_duplicate,
    ),
    Later("consolidate", _consolidated, first_calls),
    Later(
        "verify",
        lambda scene, made, live: made.verify_boot(scene.repository, live, life_seconds=120, options=scene.options),
        first_calls,
    ),
)
