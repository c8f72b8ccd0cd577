"""Storage pools and tags: which jobs may run together, and which VMs a schedule means."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.agents import AgentHouse
from tests.test_agent_loop import Night
from tests.test_agent_loop import bare as bare
from vmsnap.agent.house import Blueprint, House
from vmsnap.agent.jobs import RUNNING, NewJob
from vmsnap.agent.pools import mount_points, pool_of
from vmsnap.agent.settings import AgentSettings, read_settings
from vmsnap.errors import UsageError
from vmsnap.vmtable import DiskRow, VmRow, VmTable

MOUNTS = ("/", "/srv", "/srv/fast", "/srv/with space")


@pytest.mark.parametrize(
    ("address", "pool"),
    [
        ("/srv/vms/web1/disk.qcow2", "/srv"),
        ("/srv/fast/web1.raw", "/srv/fast"),
        ("/srv/fastest/web1.raw", "/srv"),
        ("/srv/with space/a", "/srv/with space"),
        ("/var/lib/libvirt/images/a.qcow2", "/"),
        ("/dev/vg0/web1", "/dev/vg0"),
        ("/dev/mapper/vg0-web1", "/dev/vg0"),
        ("/dev/mapper/my--vg-web--1", "/dev/my-vg"),
        ("/dev/mapper/crypt", "/dev/mapper/crypt"),
        ("/dev/zvol/tank/vms/web1", "/dev/zvol/tank"),
        ("/dev/sdb", "/dev/sdb"),
        ("/dev/disk/by-id/wwn-1", "/dev/disk/by-id/wwn-1"),
        ("iscsi://store:3260/iqn.2009-12.com.example:001/1", "iscsi://store:3260"),
        ("iscsi://user%secret@store/iqn.x/1", "iscsi://store"),
        ("nbd+unix:///export?socket=/x", ""),
        ("", ""),
    ],
)
def test_the_pool_of_a_disk_is_what_its_address_says(address: str, pool: str) -> None:
    assert pool_of(address, MOUNTS) == pool


def test_the_mount_points_are_those_of_this_host() -> None:
    found = mount_points()
    assert {"/", "/proc"} <= found and all(path.startswith("/") for path in found)
    assert pool_of("/proc/self/status", found) == "/proc"


def test_only_so_many_jobs_at_once_read_from_one_pool(bare: AgentHouse) -> None:
    settings = read_settings({"jobs_at_once": 5, "jobs_per_repository": 5, "jobs_per_pool": 1})
    night = Night(bare, settings)
    with bare.looking() as house:
        table = VmTable(house.database)
        for vm, address in (("a", "/dev/vg0/a"), ("b", "/dev/mapper/vg0-b"), ("c", "/dev/vg1/c")):
            table.add(VmRow(vm, "simulated", {}, (DiskRow("disk0", address),)))
        # Commands that end by themselves, and only if they are told to go on.
        numbers = {
            vm: house.jobs.add(NewJob(verb="log", arguments=("log", vm), vm=vm))[0].job for vm in ("a", "b", "c")
        }
    night.until_running("log")
    states = {job.vm: job.state for job in bare.jobs("log")}
    assert states["b"] == "queued" and states["a"] != "queued" and states["c"] != "queued", states
    for job in bare.jobs("log"):
        if job.state == RUNNING and job.pid:
            os.kill(job.pid, signal.SIGCONT)
    assert {job.job for job in night.settle() if job.state == "done"} >= set(numbers.values())


def test_a_limit_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="jobs_per_pool"):
        read_settings({"jobs_per_pool": 0})


# -- tags


def test_a_schedule_that_names_tags_waits_until_the_hypervisors_were_asked(bare: AgentHouse) -> None:
    bare.json("start", "vm001", "--memory", "4M", "--disk", "4M", script="vmsnap-sim")
    night = Night(bare)
    assert not bare.jobs("tags"), "nobody names a tag"
    night.add(vms=["tag:gold"])
    night.now += timedelta(hours=3)
    assert all(job.schedule == "" for job in night.settle())
    (asked,) = bare.jobs("tags")
    assert asked.state == "done"
    said = [line for line in night.said if "tags: done" in line or line.startswith("schedule nightly: 0 jobs")]
    assert len(said) == 2 and "tags: done" in said[0], said
    with bare.looking() as house:
        house.tags.enter("vm001", ["gold"])
        assert house.run_of(house.schedules.get("nightly").schedule, datetime.now(UTC), datetime.now(UTC), "x")
    night.loop.close()


def test_tags_are_kept_with_their_vm_and_go_with_it(tmp_path: Path) -> None:
    house = House(Blueprint(tmp_path, AgentSettings()))
    VmTable(house.database).add(VmRow("vm001", "simulated", {}, ()))
    house.tags.enter("vm001", ["gold", "shop", "gold"])
    house.tags.enter("nobody", ["gold"])
    assert house.tags.all() == {"vm001": {"gold", "shop"}}
    house.tags.enter("vm001", ["shop"])
    assert house.tags.all() == {"vm001": {"shop"}}
    VmTable(house.database).remove("vm001")
    assert house.tags.all() == {}
    house.close()
