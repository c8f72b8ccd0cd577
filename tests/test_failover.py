"""Duplicates that are held in memory, and failover to them, on real simulated VMs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.world import World
from vmsnap.controller import BackupResult
from vmsnap.errors import Busy, HypervisorError, StorageFull, UnknownDuplicate, UsageError, VmsnapError
from vmsnap.heldduplicates import HeldDuplicate, HeldDuplicates
from vmsnap.host import HostFolders, process_start
from vmsnap.model import to_json
from vmsnap.testing.faults import Effect, Fault, FaultPlan
from vmsnap.testing.rigs import eventually
from vmsnap.vmtable import VmRow
from vmsnap_drivers.hypervisors.simulated import lifecycle, record
from vmsnap_drivers.hypervisors.simulated.control import ask
from vmsnap_drivers.hypervisors.simulated.layout import read_ram


def keep(world: World, **more: Any) -> BackupResult:
    with world.controller() as controller:
        return controller.backup("vm001", world.repository(), keep_duplicate=True, **more)


def kill(world: World) -> None:
    os.kill(world.status()["pid"], signal.SIGKILL)
    eventually(lambda: not record.alive(world.socket), "the VM is dead")


def rows(world: World) -> dict[str, VmRow]:
    with world.controller() as controller:
        return {row.vm: row for row in controller.vms()}


def change(world: World, name: str, **fields: Any) -> None:
    """Change what is known of a held duplicate, as time or a restart of the host would."""
    with world.controller() as controller, controller.table.database.transaction() as db:
        held = replace(HeldDuplicates(controller.table.database).get(name), **fields)
        db.execute("UPDATE held SET data = ? WHERE duplicate = ?", (to_json(held), name))


def captured_count(world: World, name: str) -> int:
    with world.controller() as controller:
        held: HeldDuplicate = HeldDuplicates(controller.table.database).get(name)
    content = read_ram(held.capture.images[0].path)
    assert content is not None
    return content.counter


def is_only_the_original_left(world: World) -> None:
    world.see_that_all_is_well()
    with world.controller() as controller:
        assert controller.duplicates() == []


# -- holding


def test_a_held_duplicate_is_listed_with_what_it_takes_and_discarded_when_told(world: World) -> None:
    result = keep(world)
    with world.controller() as controller:
        (found,) = controller.duplicates()
        assert (found.duplicate, found.vm, found.backup) == (result.duplicate, "vm001", result.backup)
        images = list((world.folders.memory_dir / result.duplicate).iterdir())
        assert 0 < found.memory_bytes <= sum(path.stat().st_blocks * 512 for path in images)
        assert all(Path(disk.address).is_file() and disk.mechanism == "file" for disk in found.disks)
        assert found.state == "held" and found.expires is None
    row = rows(world)[result.duplicate]
    assert (row.kind, row.duplicate_of, row.state) == ("duplicate", "vm001", "held")
    assert {disk.address for disk in row.disks}.isdisjoint(disk.address for disk in rows(world)["vm001"].disks)
    with world.controller() as controller:
        assert controller.vm(result.duplicate).state == "held"
        with pytest.raises(UsageError, match="vmsnap duplicate discard"):
            controller.remove_vm(result.duplicate)
        assert controller.discard_duplicate(result.duplicate).memory_bytes == found.memory_bytes
        with pytest.raises(UnknownDuplicate):
            controller.discard_duplicate(result.duplicate)
    is_only_the_original_left(world)


def test_recovery_never_removes_a_held_duplicate(world: World) -> None:
    result = keep(world)
    with world.controller() as controller:
        recovered = controller.recover()
        assert (recovered.resumed, recovered.removed, recovered.kept) == ((), (), ())
        controller.backup("vm001", world.repository())
        assert [found.duplicate for found in controller.duplicates()] == [result.duplicate]


def test_a_new_duplicate_takes_the_place_of_the_old_one_when_it_is_whole(world: World) -> None:
    first = keep(world)
    plan = FaultPlan(Fault("clone", 2, Effect.BEFORE))
    with world.controller(plan) as controller, pytest.raises(VmsnapError, match="injected"):
        controller.backup("vm001", world.repository(), keep_duplicate=True)
    with world.controller() as controller:
        assert [found.duplicate for found in controller.duplicates()] == [first.duplicate]
    second = keep(world)
    with world.controller() as controller:
        assert [found.duplicate for found in controller.duplicates()] == [second.duplicate]
        assert controller.journal.unfinished() == []
    assert not list(world.folders.memory_dir.glob(first.duplicate))
    assert not (world.folders.state_dir / "duplicates" / first.duplicate).exists()


def test_a_duplicate_whose_time_is_over_is_discarded_at_the_next_look(world: World) -> None:
    result = keep(world, keep_seconds=3600)
    told: list[str] = []
    with world.controller() as controller:
        (found,) = controller.duplicates(told.append)
        assert found.expires is not None and found.expires - found.held == pytest.approx(3600) and told == []
    change(world, result.duplicate, expires_ns=1)
    with world.controller() as controller:
        assert controller.duplicates(told.append) == []
    (line,) = told
    assert result.duplicate in line and "its time was over" in line
    is_only_the_original_left(world)


def test_after_a_restart_of_the_host_a_duplicate_is_gone_and_that_is_said(world: World) -> None:
    result = keep(world)
    change(world, result.duplicate, boot="another boot")
    for path in sorted(world.folders.memory_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with world.controller() as controller:
        with pytest.raises(UnknownDuplicate, match="the host was restarted"):
            controller.failover("vm001")
        (line,) = controller.recover().removed
    assert "the host was restarted" in line
    is_only_the_original_left(world)


def test_where_there_is_no_room_for_both_that_is_said_before_the_pause(world: World) -> None:
    with world.controller() as controller:
        controller.backup("vm001", world.repository())
    result = keep(world)
    folders = HostFolders(world.folders.state_dir, world.folders.memory_dir, memory_budget_bytes=(1 << 20) + 4096)
    narrow = type(world).__new__(type(world))
    narrow.__dict__.update(world.__dict__, folders=folders)
    epoch = world.status()["epoch"]
    with narrow.controller() as controller, pytest.raises(StorageFull, match=f"{result.duplicate} of vm001") as e:
        controller.backup("vm001", world.repository(), keep_duplicate=True)
    assert e.value.cure == f"vmsnap duplicate discard {result.duplicate}"
    assert world.status()["epoch"] == epoch and world.counts_on()
    with narrow.controller() as controller:
        controller.discard_duplicate(result.duplicate)
        assert controller.backup("vm001", world.repository(), keep_duplicate=True).duplicate


def test_a_vm_that_is_struck_out_takes_its_duplicate_along(world: World) -> None:
    keep(world)
    with world.controller() as controller:
        controller.remove_vm("vm001")
        assert controller.vms() == [] and controller.duplicates() == [] and controller.journal.unfinished() == []
    assert world.files() == world.files_at_rest


def test_a_time_limit_without_a_duplicate_is_refused(world: World) -> None:
    with world.controller() as controller, pytest.raises(UsageError, match="needs no time limit"):
        controller.backup("vm001", world.repository(), keep_seconds=5)


# -- taking the place


def test_after_kill_9_the_duplicate_goes_on_from_the_captured_instant(world: World) -> None:
    result = keep(world)
    count = captured_count(world, result.duplicate)
    eventually(lambda: world.status()["counter"] > count + 5, "the original goes on")
    nic, old_disks = world.status()["nic"], rows(world)["vm001"].disks
    kill(world)
    with world.controller() as controller:
        done = controller.failover("vm001")
    assert (done.vm, done.state, done.was, done.duplicate) == ("vm001", "executing", "absent", result.duplicate)
    assert "nobody holds the record" in done.fenced and done.seconds > 0
    status = world.status()
    assert status["state"] == "executing" and ask(world.socket, "check") == {"fault": ""}
    assert count <= status["counter"] and (status["nic"]["mac"], status["nic"]["connected"]) == (nic["mac"], True)
    assert world.counts_on()
    (row,) = rows(world).values()
    assert (row.vm, row.kind, row.state, row.resume_flag) == ("vm001", "working", "executing", False)
    assert {disk.address for disk in row.disks} == {disk.address for disk in done.disks}
    assert {disk["path"] for disk in status["disks"]} == {disk.address for disk in done.disks}
    assert all(Path(disk.address).is_file() for disk in old_disks)
    assert not list(world.folders.memory_dir.iterdir())
    with world.controller() as controller:
        assert controller.journal.unfinished() == [] and controller.duplicates() == []


def test_the_vm_that_took_over_is_backed_up_held_and_failed_over_in_turn(world: World) -> None:
    keep(world)
    kill(world)
    with world.controller() as controller:
        controller.failover("vm001")
        again = controller.backup("vm001", world.repository(), keep_duplicate=True, mode="consistent")
        count = captured_count(world, again.duplicate)
    kill(world)
    with world.controller() as controller:
        assert controller.failover("vm001").duplicate == again.duplicate
    assert world.status()["counter"] >= count and ask(world.socket, "check") == {"fault": ""}


def test_the_disks_of_a_vm_that_took_over_are_nobodys_strays_while_it_has_them(world: World) -> None:
    with world.controller() as controller:
        keep(world)
        kill(world)
        controller.failover("vm001")
        assert controller.strays() == []
        controller.remove_vm("vm001")
        assert controller.strays() != [], "now nobody answers for them"


def test_as_long_as_the_original_lives_nothing_takes_its_place(world: World) -> None:
    result = keep(world)
    for state in ("executing", "stopped"):
        if state == "stopped":
            ask(world.socket, "pause")
        with world.controller() as controller, pytest.raises(Busy, match="lives") as e:
            controller.failover("vm001")
        assert "--fence" in e.value.cure
        assert world.status()["state"] == state
    ask(world.socket, "resume")
    assert world.counts_on()
    with world.controller() as controller:
        assert [found.duplicate for found in controller.duplicates()] == [result.duplicate]
        assert controller.journal.unfinished() == []


def test_with_fence_the_original_is_killed_first(world: World) -> None:
    keep(world)
    pid = world.status()["pid"]
    with world.controller() as controller:
        done = controller.failover("vm001", fence=True)
    assert done.was == "executing" and process_start(pid) is None
    assert world.status()["pid"] != pid and world.counts_on()


def test_without_a_duplicate_nothing_is_killed(world: World) -> None:
    with world.controller() as controller, pytest.raises(UnknownDuplicate, match="no duplicate of VM 'vm001'"):
        controller.failover("vm001", fence=True)
    world.see_that_all_is_well()


def test_never_two_live_machines_with_one_network_address(world: World) -> None:
    result = keep(world)
    with world.controller() as controller:
        controller.restore(world.repository(), result.backup, "vm002", run=True)
    with world.controller() as controller, pytest.raises(Busy, match="'vm002' is on bridge:br0"):
        controller.failover("vm001", fence=True)
    assert world.counts_on(), "it was killed for a duplicate that could not take its place"
    kill(world)
    with world.controller() as controller:
        with pytest.raises(Busy, match="'vm002' is on bridge:br0"):
            controller.failover("vm001")
        assert [found.duplicate for found in controller.duplicates()] == [result.duplicate]
        lifecycle.stop(Path(controller.table.get("vm002").options["socket"]), force=True)
        assert controller.failover("vm001").state == "executing"


def test_nothing_is_killed_for_a_duplicate_that_has_lost_its_memory(world: World) -> None:
    result = keep(world)
    next((world.folders.memory_dir / result.duplicate).glob("*.img")).unlink()
    with world.controller() as controller, pytest.raises(HypervisorError, match="has lost"):
        controller.failover("vm001", fence=True)
    assert world.counts_on()


def test_a_duplicate_that_died_in_its_vms_place_is_spent_and_its_disks_stay(world: World) -> None:
    result = keep(world)
    kill(world)
    plan = FaultPlan()
    with world.controller(plan) as controller:
        state = plan.count

        def die_after_resume(method: str) -> Fault | None:
            if method == "state" and "resume" in plan.calls:
                lifecycle.kill_process(world.socket, 5.0)
            return state(method)

        plan.count = die_after_resume  # type: ignore[method-assign]
        with pytest.raises(HypervisorError, match="instead of executing") as e:
            controller.failover("vm001")
    assert "it is spent, its disks stay" in "".join(e.value.__notes__)
    with world.controller() as controller:
        (found,) = controller.duplicates()
        assert (found.duplicate, found.state) == (result.duplicate, "spent")
        assert all(Path(disk.address).is_file() for disk in found.disks)
        with pytest.raises(UnknownDuplicate, match="has run already"):
            controller.failover("vm001")
        assert controller.table.get("vm001").state == "absent" and controller.journal.unfinished() == []
        controller.discard_duplicate(result.duplicate)


def test_a_duplicate_that_does_not_run_says_why(world: World) -> None:
    result = keep(world)
    kill(world)
    plan = FaultPlan()
    with world.controller(plan) as controller:
        (found,) = controller.duplicates()
        disk = Path(found.disks[1].address)
        disk.write_bytes(bytes(disk.stat().st_size))
        state = plan.count

        def when_it_has_looked(method: str) -> Fault | None:
            if method == "state" and "resume" in plan.calls:
                eventually(lambda: world.status()["state"] == "fault", "the guest has looked at its disks")
            return state(method)

        plan.count = when_it_has_looked  # type: ignore[method-assign]
        with pytest.raises(HypervisorError, match="is ended instead of executing: the guest has faulted: disk1 lacks"):
            controller.failover("vm001")
    with world.controller() as controller:
        controller.discard_duplicate(result.duplicate)
