"""The verbs from outside, on a simulated VM: what they report, and how they refuse."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import BIN, Scripts
from vmsnap.locks import vm_lock
from vmsnap_drivers.hypervisors.simulated.layout import read_disk


class House(Scripts):
    """A state folder with a working VM, and a repository with one backup of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.repository = str(folder / "repository")
        self.environment["VMSNAP_REPOSITORY"] = self.repository
        self.started = self.json(
            "start", "vm001", "--memory", "16M", "--disk", "8M", "--disk", "4M", script="vmsnap-sim"
        )
        self.json("init")
        self.backup = self.json("backup", "vm001", "--tag", "first", "--tag", "nightly")
        self.id: str = self.backup["backup"]

    def state_of(self, vm: str) -> str:
        """What its hypervisor says of a VM now."""
        return str(self.json("vm", "show", vm)["state"])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("house"))
    yield made
    made.close()


def test_a_started_vm_is_registered(house: House) -> None:
    rows = {row["vm"]: row for row in house.json("vm", "list")}
    row = rows["vm001"]
    assert (row["hypervisor"], row["state"], row["resume_flag"]) == ("simulated", "executing", False)
    assert [disk["device"] for disk in row["disks"]] == ["disk0", "disk1"]
    assert all(Path(disk["address"]).is_file() and disk["mechanism"] == "file" for disk in row["disks"])
    assert house.json("vm", "show", "vm001")["vm"] == "vm001"
    assert "vm001" in house.text("vm", "list") and "disk1" in house.text("vm", "show", "vm001")
    assert "vm001" in {vm["vm"] for vm in house.json("list", script="vmsnap-sim")}
    assert {"vm": "vm001", "seen": True, "registered": True} in house.json("list-vms", script="vmsnap-sim")


def test_backup_reports_what_was_promised(house: House) -> None:
    backup = house.backup
    assert {key: backup[key] for key in ("vm", "mode", "memory_bytes", "capture")} == {
        "vm": "vm001",
        "mode": "live",
        "memory_bytes": 16 << 20,
        "capture": "fork",
    }
    assert backup["disks"] == [{"device": "disk0", "size_bytes": 8 << 20}, {"device": "disk1", "size_bytes": 4 << 20}]
    assert 0 < backup["pause_seconds"] <= 5 and backup["seconds"] > 0
    assert 0 < backup["stored_bytes"] < backup["read_bytes"]
    assert backup["warnings"] == []


def test_backup_tells_people_in_a_few_lines(house: House) -> None:
    lines = house.text("backup", "vm001", "--tag", "for people").splitlines()
    assert {line.split()[0] for line in lines} >= {"backup", "pause", "capture", "read", "stored", "took"}
    assert len(lines) < 12


def test_list_and_show_say_what_the_backup_said(house: House) -> None:
    listed = {entry["backup"]: entry for entry in house.json("list", "--vm", "vm001")}[house.id]
    for key in ("vm", "mode", "pause_seconds", "memory_bytes", "disks", "read_bytes", "stored_bytes"):
        assert listed[key] == house.backup[key], key
    age = datetime.now(UTC) - datetime.fromisoformat(listed["time"])
    assert listed["time"].endswith("Z") and 0 <= age.total_seconds() < 600
    assert listed["tags"] == ["first", "nightly"]
    shown = house.json("show", house.id)
    assert {key: shown[key] for key in listed if key != "disks"} == {k: v for k, v in listed.items() if k != "disks"}
    assert shown["resume_flag"] is True
    assert {"pause", "resume"} <= {moment["name"] for moment in shown["moments"]}
    assert house.json("list", "--vm", "nobody") == []
    assert house.id in house.text("list") and "disk1" in house.text("show", house.id)


def test_a_beginning_of_an_id_is_enough(house: House) -> None:
    assert house.json("show", house.id[:-1])["backup"] == house.id


def test_restore_makes_a_second_vm_that_works(house: House) -> None:
    target = house.folder / "restored"
    restored = house.json("restore", house.id, "--as", "copy", "--run", "--isolated", "--target", str(target))
    assert (restored["vm"], restored["state"]) == ("copy", "executing")
    assert [disk["device"] for disk in restored["disks"]] == ["disk0", "disk1"]
    assert all(Path(disk["address"]).parent == target for disk in restored["disks"])
    assert Path(restored["options"]["socket"]).is_socket()
    assert house.state_of("copy") == house.state_of("vm001") == "executing"
    assert house.json("stop", "copy", script="vmsnap-sim") == {"vm": "copy", "state": "absent"}
    assert house.state_of("copy") == "absent"
    assert house.json("vm", "remove", "copy")["vm"] == "copy"
    assert "copy" not in {row["vm"] for row in house.json("vm", "list")}


def test_restore_without_run_leaves_it_stopped(house: House) -> None:
    house.text("restore", house.id, "--as", "still")
    assert house.state_of("still") == "stopped"
    house.text("stop", "still", "--force", script="vmsnap-sim")


def test_restore_overwrites_nothing(house: House) -> None:
    assert "already registered" in house.error(1, "restore", house.id, "--as", "vm001")
    target = house.folder / "occupied"
    target.mkdir()
    (target / "disk0.raw").write_text("precious")
    assert "not overwritten" in house.error(1, "restore", house.id, "--as", "other", "--target", str(target))
    assert (target / "disk0.raw").read_text() == "precious"
    assert "other" not in {row["vm"] for row in house.json("vm", "list")}


@pytest.mark.parametrize("command", [("show",), ("verify",), ("restore", "--as", "x"), ("export", "--output", "x")])
def test_an_unknown_backup_is_3(house: House, command: tuple[str, ...]) -> None:
    assert "there is no backup" in house.error(3, *command, "vm001-20000101T000000Z-000000")


def test_what_is_refused(house: House) -> None:
    assert "no option 'colour'" in house.error(2, "restore", house.id, "--as", "x", "-o", "colour=red")
    assert "not a valid VM name" in house.error(2, "restore", house.id, "--as", "../x")
    assert "no disk 'sda'" in house.error(3, "export", house.id, "--output", "x", "--disk", "sda")
    assert "more than 0" in house.error(2, "backup", "vm001", "--max-pause", "0")
    assert "already registered" in house.error(1, "vm", "add", "vm001", "--hypervisor", "simulated")
    assert "exists" in house.error(1, "start", "vm001", script="vmsnap-sim")
    assert "neither a size nor" in house.error(2, "start", "vm002", "--disk", "/no/image", script="vmsnap-sim")
    assert "no simulated VM 'vm002' runs" in house.error(3, "stop", "vm002", script="vmsnap-sim")


def test_two_at_once_is_5(house: House) -> None:
    with vm_lock(house.state, "vm001", "test"):
        assert "vm001" in house.error(5, "backup", "vm001")
    assert house.state_of("vm001") == "executing"


# -- export, verify, check


def test_export_writes_one_image_a_disk(house: House) -> None:
    folder = house.folder / "images"
    files = house.json("export", house.id, "--output", str(folder))["files"]
    assert files == [{"device": d, "path": str(folder / f"{d}.raw")} for d in ("disk0", "disk1")]
    assert [Path(file["path"]).stat().st_size for file in files] == [8 << 20, 4 << 20]
    assert all(read_disk(Path(file["path"])) is not None for file in files)
    assert "not overwritten" in house.error(1, "export", house.id, "--output", str(folder), "--disk", "disk1")
    assert sorted(path.name for path in folder.iterdir()) == ["disk0.raw", "disk1.raw"]


def test_export_to_qcow2_has_the_same_content(house: House) -> None:
    folder = house.folder / "qcow2"
    if shutil.which("qemu-img") is None:
        assert "qemu-utils" in house.error(6, "export", house.id, "--output", str(folder), "--format", "qcow2")
        assert not folder.exists()
        return
    call = ("export", house.id, "--output", str(folder), "--disk", "disk1")
    (file,) = house.json(*call, "--format", "qcow2")["files"]
    assert file == {"device": "disk1", "path": str(folder / "disk1.qcow2")}
    assert [path.name for path in folder.iterdir()] == ["disk1.qcow2"]
    house.text(*call)
    compared = subprocess.run(["qemu-img", "compare", file["path"], str(folder / "disk1.raw")], check=False)
    assert compared.returncode == 0


def test_a_failed_export_leaves_nothing(house: House) -> None:
    (house.folder / "no-folder").write_text("")
    assert house.error(1, "export", house.id, "--output", str(house.folder / "no-folder" / "sub"))
    path = {"PATH": str(house.folder / "empty")}
    folder = house.folder / "unmade"
    assert "qemu-utils" in house.error(6, "export", house.id, "--output", str(folder), "--format", "qcow2", **path)
    assert not folder.exists()


def test_verify_and_check_find_nothing(house: House) -> None:
    verified = house.json("verify", house.id)
    assert (verified["backup"], verified["damaged"], verified["findings"]) == (house.id, False, [])
    checked = house.json("check", "--read-data")
    assert not checked["damaged"] and checked["backups"] >= 1 and checked["read_bytes"] > 0
    assert "no damage" in house.text("check") and "is whole" in house.text("verify", house.id)


def test_damage_is_4_and_names_what_it_touches(house: House, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(house.repository, damaged)
    for pack in (damaged / "packs").rglob("*"):
        if pack.is_file():
            content = bytearray(pack.read_bytes())
            content[len(content) // 3] ^= 1
            pack.write_bytes(content)
    for words in (("check", "--read-data"), ("verify", house.id)):
        done = house.run(*words, "-r", str(damaged), "--json")
        assert done.returncode == 4, done
        assert json.loads(done.stdout)["damaged"] is True
        assert done.stderr.count("\n") == 1 and "touches" in done.stderr
    report: dict[str, Any] = json.loads(house.run("check", "--read-data", "-r", str(damaged), "--json").stdout)
    touched = {touch["backup"] for finding in report["findings"] for touch in finding["touches"]}
    assert touched & {entry["backup"] for entry in house.json("list")}


def test_a_damaged_manifest_does_not_hide_the_others(house: House, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    house.json("backup", "vm001")
    shutil.copytree(house.repository, damaged)
    manifest = max(path for path in (damaged / "manifests").rglob("*") if path.is_file())
    manifest.write_bytes(b"x" + manifest.read_bytes()[1:])
    done = house.run("list", "-r", str(damaged), "--json")
    assert done.returncode == 4 and house.id in {entry["backup"] for entry in json.loads(done.stdout)}
    assert done.stderr.count("\n") == 1


# -- looking after


def test_doctor_and_recover(house: House) -> None:
    assert {finding["severity"] for finding in house.json("doctor", "vm001")} <= {"ok", "note"}
    assert "repository" in " ".join(finding["subject"] for finding in house.json("doctor", "vm001"))
    assert house.json("recover") == {"resumed": [], "removed": [], "kept": []}
    assert house.text("recover", "vm001") == "nothing was left\n"
    assert house.error(3, "recover", "nobody")


def test_progress_is_drawn_on_a_terminal_only_and_json_stays_clean(house: House) -> None:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [str(BIN / "vmsnap"), "backup", "vm001", "--json"],
        env=house.environment | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=end,
    )
    os.close(end)
    drawn = b""
    try:
        while select.select([terminal], [], [], 30)[0] and (data := os.read(terminal, 65536)):
            drawn += data
    except OSError:
        pass  # the other end is closed
    os.close(terminal)
    report, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(report)["vm"] == "vm001"
    assert b"storing" in drawn


def test_the_local_script_takes_the_place_as_its_argument(house: House) -> None:
    place = house.folder / "place"
    made = house.json("init", str(place), script="vmsnap-local")
    assert made["repository"] == str(place)
    assert house.json("list", f"file://{place}", script="vmsnap-local") == []
    assert house.json("check", str(place), script="vmsnap-local")["damaged"] is False
    assert house.json("doctor", str(place), script="vmsnap-local")[0]["severity"] == "ok"
    before = sorted(place.rglob("*"))
    bench = house.json("bench", str(place), "--size", "20M", script="vmsnap-local")
    assert bench["bytes"] == 20 << 20 and bench["objects"] == 2
    assert bench["put_bytes_per_second"] > 0 and bench["get_bytes_per_second"] > 0
    assert sorted(place.rglob("*")) == before
    assert "serves file:// only" in house.error(2, "list", "s3://bucket", script="vmsnap-local")
    assert house.error(1, "bench", str(house.folder / "nowhere"), script="vmsnap-local")


def test_a_stopped_vm_starts_again_on_its_disks(house: House) -> None:
    house.text("start", "twice", "--memory", "1M", "--disk", "1M", script="vmsnap-sim")
    house.text("stop", "twice", script="vmsnap-sim")
    disk = Path(house.json("vm", "show", "twice")["disks"][0]["address"])
    content = read_disk(disk)
    assert content is not None and content.clean
    house.text("start", "twice", "--memory", "1M", script="vmsnap-sim")
    assert house.json("vm", "show", "twice")["disks"][0]["address"] == str(disk)
    house.text("stop", "twice", "--force", script="vmsnap-sim")
