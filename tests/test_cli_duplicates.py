"""Consistent backups, duplicates and failover from outside, by the real scripts: what they report, how they refuse."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli_verbs import House
from vmsnap_drivers.hypervisors.simulated import record
from vmsnap_drivers.hypervisors.simulated.layout import read_disk


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("house"))
    yield made
    made.close()


def test_a_consistent_backup_reports_itself_and_its_disks_can_be_exported(house: House) -> None:
    made = house.json("backup", "vm001", "--mode", "consistent", "--timeout", "60", "--tag", "clean")
    assert (made["mode"], made["memory_bytes"], made["duplicate"], made["warnings"]) == ("consistent", 0, None, [])
    listed = {entry["backup"]: entry for entry in house.json("list")}[made["backup"]]
    assert (listed["mode"], listed["remarks"], listed["pause_seconds"]) == ("consistent", [], made["pause_seconds"])
    assert "disks alone" in house.text("show", made["backup"])
    assert "vmsnap export" in house.error(2, "restore", made["backup"], "--as", "other")
    files = house.json("export", made["backup"], "--output", str(house.folder / "exported"))["files"]
    contents = [read_disk(Path(file["path"])) for file in files]
    assert len(contents) == 2 and all(content is not None and content.clean for content in contents)


def test_consolidate_reports_clean_disks(house: House) -> None:
    target = house.folder / "clean"
    done = house.json("consolidate", house.id, "--target", str(target), "--store")
    assert done["clean"] is True and done["backup"] in {entry["backup"] for entry in house.json("list")}
    assert [(disk["device"], Path(disk["address"]).parent) for disk in done["disks"]] == [
        ("disk0", target),
        ("disk1", target),
    ]
    assert "not overwritten" in house.error(1, "consolidate", house.id, "--target", str(target))


def test_verify_boot_says_how_life_was_shown(house: House) -> None:
    done = house.json("verify", house.id, "--boot", "--alive-within", "60")
    assert "counted on" in done["boot"]["life"] and done["boot"]["seconds"] > 0 and done["findings"] == []


def test_a_duplicate_is_held_listed_and_discarded(house: House) -> None:
    name = house.json("backup", "vm001", "--keep-duplicate", "--keep-for", "1h")["duplicate"]
    (found,) = house.json("duplicate", "list")
    assert found.keys() >= {"duplicate", "vm", "backup", "memory_bytes", "disks", "age_seconds", "expires"}
    assert (found["duplicate"], found["vm"], found["state"]) == (name, "vm001", "held") and found["memory_bytes"] > 0
    assert name in house.text("duplicate", "list")
    rows = {row["vm"]: row for row in house.json("vm", "list")}
    assert rows.keys() == {"vm001", name} and rows[name]["duplicate_of"] == "vm001"
    _see_the_table_for_people(house, rows, name)
    assert house.json("duplicate", "discard", name)["duplicate"] == name
    assert house.json("duplicate", "list") == []
    assert "no duplicate of VM 'vm001'" in house.error(3, "failover", "vm001")


def _see_the_table_for_people(house: House, rows: dict[str, Any], duplicate: str) -> None:
    """All of the VM table stands in it, a line a disk, in columns."""
    heading, *lines = house.text("vm", "list").splitlines()
    names = ("vm", "hypervisor", "kind", "state", "resume flag", "device", "address")
    begins = [heading.index(name) for name in names]
    assert heading.split() == " ".join(names).split() and len(lines) == sum(len(row["disks"]) for row in rows.values())
    cells = [[line[a:b].strip() for a, b in zip(begins, [*begins[1:], None], strict=True)] for line in lines]
    kinds = {"vm001": "working", duplicate: "duplicate (from vm001)"}
    wanted = []
    for vm in sorted(rows):
        begin = [vm, "simulated", kinds[vm], rows[vm]["state"], "0"]
        for disk in rows[vm]["disks"]:
            wanted.append([*begin, disk["device"], disk["address"]])
            begin = [""] * len(begin)
    assert cells == wanted


def test_failover_is_refused_while_the_vm_lives_and_takes_its_place_when_it_is_dead(house: House) -> None:
    name = house.json("backup", "vm001", "--keep-duplicate")["duplicate"]
    refused = house.error(5, "failover", "vm001")
    assert "lives" in refused and "--fence" in refused
    assert house.state_of("vm001") == "executing"
    socket = Path(house.started["options"]["socket"])
    found = record.read(socket)
    assert found is not None
    os.kill(found.pid, signal.SIGKILL)
    done = house.json("failover", "vm001")
    assert done.keys() >= {"vm", "state", "was", "disks", "seconds", "fenced", "instant"}
    assert (done["vm"], done["state"], done["was"], done["duplicate"]) == ("vm001", "executing", "absent", name)
    assert house.state_of("vm001") == "executing"
    (row,) = house.json("vm", "list")
    assert [disk["address"] for disk in row["disks"]] == [disk["address"] for disk in done["disks"]]
    assert house.json("duplicate", "list") == []


def test_a_guest_that_ignores_its_power_button(house: House) -> None:
    house.json("start", "deaf", "--memory", "4M", "--disk", "4M", "--ignore-power-button", script="vmsnap-sim")
    wanted = ("backup", "deaf", "--mode", "consistent", "--timeout", "0.3")
    assert "did not shut down in order" in house.error(1, *wanted)
    done = house.run(*wanted, "--on-timeout", "keep-live")
    assert done.returncode == 0 and "not consistent but live" in done.stderr
    (made,) = house.json("list", "--vm", "deaf")
    assert made["mode"] == "live" and "not consistent but live" in made["remarks"][0]
    house.text("stop", "deaf", "--force", script="vmsnap-sim")
