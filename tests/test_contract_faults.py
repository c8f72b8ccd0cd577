"""The fault-injecting wrappers do what their plan says, at the call it names, and nothing else."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_file_mechanism import FileRig
from tests.test_simulated_contract import SimulatedRig, simulated_rig
from vmsnap.errors import Busy, HypervisorError, SnapshotError, StorageError
from vmsnap.model import VmState
from vmsnap.roles import CaptureRequest, Hypervisor, SnapshotMechanism, StorageBackend
from vmsnap.testing.cloning import clone_all, clone_contents, delete_all
from vmsnap.testing.faults import (
    Effect,
    Fault,
    FaultPlan,
    FaultyHypervisor,
    FaultySnapshotMechanism,
    FaultyStorage,
    single_faults,
)
from vmsnap.testing.snapshot import contents_of, live
from vmsnap_storage_backends.local import LocalStorage


@pytest.fixture
def rig() -> Iterator[SimulatedRig]:
    yield from simulated_rig()


def test_without_faults_a_wrapper_is_the_driver(rig: SimulatedRig) -> None:
    plan = FaultPlan()
    driver = FaultyHypervisor(rig.driver(rig.vm), plan)
    request = CaptureRequest("bk", 5.0)
    driver.prepare(request, driver.plan_capture(request))
    driver.pause()
    duplicate = driver.duplicate()
    driver.resume()
    driver.finish_duplicate(duplicate, lambda _: None)
    assert (driver.name, driver.vm) == ("simulated", rig.vm)
    assert plan.calls == ["plan_capture", "prepare", "pause", "duplicate", "resume", "finish_duplicate"]
    assert plan.struck == []


def test_a_fault_before_and_a_fault_after(rig: SimulatedRig) -> None:
    plan = FaultPlan(Fault("pause", 1, Effect.BEFORE), Fault("pause", 2, Effect.AFTER, Busy("taken")))
    driver = FaultyHypervisor(rig.driver(rig.vm), plan)
    with pytest.raises(HypervisorError, match="before pause number 1"):
        driver.pause()
    assert driver.state() is VmState.EXECUTING
    with pytest.raises(Busy):
        driver.pause()
    assert driver.state() is VmState.STOPPED
    driver.pause()
    assert [fault.number for fault in plan.struck] == [1, 2] and plan.counts["pause"] == 3


def test_a_hanging_call_ends_when_it_is_released_or_its_time_is_over(rig: SimulatedRig) -> None:
    plan = FaultPlan(Fault("resume", 1, Effect.HANG), Fault("resume", 2, Effect.HANG_AFTER), hang_seconds=120)
    driver = FaultyHypervisor(rig.driver(rig.vm), plan)
    driver.pause()
    threading.Timer(0.05, plan.release).start()
    begin = time.monotonic()
    with pytest.raises(HypervisorError):
        driver.resume()
    assert time.monotonic() - begin < 60 and driver.state() is VmState.STOPPED
    with pytest.raises(HypervisorError):
        driver.resume()
    assert driver.state() is VmState.EXECUTING
    brief = FaultyHypervisor(rig.driver(rig.vm), FaultPlan(Fault("state", 1, Effect.HANG), hang_seconds=0.01))
    with pytest.raises(HypervisorError):
        brief.state()


@pytest.mark.parametrize(("effect", "state"), [(Effect.KILL, VmState.EXECUTING), (Effect.KILL_AFTER, VmState.STOPPED)])
def test_a_killing_fault_kills_the_caller(rig: SimulatedRig, effect: Effect, state: VmState) -> None:
    child = os.fork()
    if child == 0:
        try:
            FaultyHypervisor(rig.driver(rig.vm), FaultPlan(Fault("pause", 1, effect))).pause()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert rig.driver(rig.vm).state() is state


def test_snapshots_and_their_readers_fail_on_plan(tmp_path: Path) -> None:
    rig = FileRig(tmp_path)
    plan = FaultPlan()
    life = live(rig, "settle", FaultySnapshotMechanism(rig.mechanism(), plan))
    assert contents_of(life.mechanism, life) == list(life.contents)
    life.end()
    assert plan.calls[:4] == ["plan", "prepare_disks", "snapshot", "settle"] and plan.calls[-1] == "delete_snapshots"
    for fault in single_faults(plan.counts, [Effect.BEFORE, Effect.AFTER]):
        faulty = FaultySnapshotMechanism(rig.mechanism(), FaultPlan(fault))
        with pytest.raises(SnapshotError, match="injected"):
            life = live(rig, "settle", faulty, tag="vmsnap-faulty")
            contents_of(faulty, life)
            life.end()
        mechanism = rig.mechanism()
        mechanism.delete(mechanism.plan(rig.vm, rig.disks(), "vmsnap-faulty", life.plan.window))
        assert not mechanism.list_owned()


def test_storage_fails_on_plan(tmp_path: Path) -> None:
    faults = (Fault("put", 2, Effect.BEFORE), Fault("put", 3, Effect.AFTER), Fault("list", 1, Effect.AFTER))
    storage = FaultyStorage(LocalStorage(str(tmp_path / "repository"), {}), FaultPlan(*faults))
    storage.create()
    storage.put("a", b"1")
    for key in ("b", "c"):
        with pytest.raises(StorageError):
            storage.put(key, b"2")
    seen = []
    with pytest.raises(StorageError):
        for info in storage.list():
            seen.append(info.key)
    assert seen == ["a", "c"] == [info.key for info in storage.list()]
    assert storage.get("c") == b"2"


@pytest.mark.parametrize(
    ("wrapper", "role"),
    [
        (FaultyHypervisor, Hypervisor),
        (FaultySnapshotMechanism, SnapshotMechanism),
        (FaultyStorage, StorageBackend),
    ],
)
def test_every_call_of_a_role_is_wrapped(wrapper: type, role: type) -> None:
    """A call that the role gains is one that a wrapper must pass on."""
    calls = {name for name, _ in inspect.getmembers(role, inspect.isfunction) if not name.startswith("_")}
    assert calls <= set(vars(wrapper))


def test_clones_fail_on_plan(tmp_path: Path) -> None:
    rig = FileRig(tmp_path)
    counted = FaultPlan()
    life = live(rig, "settle", FaultySnapshotMechanism(rig.mechanism(), counted))
    clones = clone_all(rig, life, "bk001")
    assert clone_contents(life.mechanism, clones) == list(life.contents)
    delete_all(life.mechanism, clones)
    life.end()
    calls = ["plan_clone", "clone", "clone_reader", "delete_clone"]
    for fault in single_faults({call: counted.counts[call] for call in calls}, [Effect.BEFORE, Effect.AFTER]):
        faulty = FaultySnapshotMechanism(rig.mechanism(), FaultPlan(fault))
        with pytest.raises(SnapshotError, match="injected"):
            life = live(rig, "settle", faulty, tag="vmsnap-faulty")
            clones = clone_all(rig, life, "bk001")
            clone_contents(faulty, clones)
            delete_all(faulty, clones)
        mechanism = rig.mechanism()
        for owned in mechanism.list_owned():
            Path(owned.name).unlink()


def test_fencing_and_life_fail_on_plan(rig: SimulatedRig) -> None:
    plan = FaultPlan(Fault("fence", 1, Effect.BEFORE), Fault("await_life", 1, Effect.BEFORE))
    driver = FaultyHypervisor(rig.driver(rig.vm), plan)
    with pytest.raises(HypervisorError, match="injected"):
        driver.fence()
    with pytest.raises(HypervisorError, match="injected"):
        driver.await_life(0.1)
    assert "counted on" in driver.await_life(60)
