"""``check``, ``verify``, ``repair`` and ``--accept-loss`` from outside, on a repository that is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli_verbs import House
from vmsnap.places import open_repository
from vmsnap.repository.format import ZERO_ID, pack_key
from vmsnap.repository.tree import leaves


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("house"))
    yield made
    made.close()


class Damaged:
    """A copy of the house's repository in which one chunk of disk0 is damaged."""

    def __init__(self, house: House, folder: Path) -> None:
        self.house = house
        self.url = str(folder / "damaged")
        shutil.copytree(house.repository, self.url)
        repository = open_repository(self.url)
        disk = repository.manifest(house.id).disks[0]
        reader = repository.reader(disk.image)
        runs = leaves(disk.image, reader._load)
        first, ids = next((first, ids) for first, _, ids in runs if ids and ids[:32] != ZERO_ID)
        place = repository.index().find(ids[:32])
        assert place
        self.length = disk.image.chunk_bytes
        self.offset = first * self.length
        self.pack = pack_key(place.pack)
        self.flip(self.pack, place.offset + 20)

    def flip(self, key: str, position: int) -> None:
        path = Path(self.url) / key
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)

    def run(self, *words: str):  # type: ignore[no-untyped-def]
        return self.house.run(*words, "-r", self.url)


@pytest.fixture
def damaged(house: House, tmp_path: Path) -> Damaged:
    return Damaged(house, tmp_path)


def test_damage_is_found_repaired_and_accepted(damaged: Damaged, house: House, tmp_path: Path) -> None:
    lost = {"offset": damaged.offset, "length": damaged.length}
    assert damaged.run("check").returncode == 0
    found = damaged.run("check", "--read-data", "--json")
    assert found.returncode == 4
    assert "vmsnap repair" in found.stderr
    (finding,) = json.loads(found.stdout)["findings"]
    assert (finding["object"], finding["severity"]) == (damaged.pack, "damage")
    assert [touch["ranges"] for touch in finding["touches"] if touch["part"] == "disk disk0"] == [[lost]]

    would = damaged.run("repair", "--dry-run", "--json")
    assert would.returncode == 4
    done = damaged.run("repair", "--json")
    assert done.returncode == 4
    report = json.loads(done.stdout)
    assert report["changed"] and not report["dry_run"] and json.loads(would.stdout)["dry_run"]
    assert [(touch["backup"], touch["part"], touch["ranges"]) for touch in report["lost"]] == [
        (house.id, "disk disk0", [lost])
    ]
    assert not (Path(damaged.url) / damaged.pack).exists()
    assert house.id in done.stderr

    again = damaged.run("repair")
    assert again.returncode == 4
    assert "nothing more to repair" in again.stdout
    assert f"{damaged.offset}-{damaged.offset + damaged.length}" in again.stdout
    checked = json.loads(damaged.run("check", "--read-data", "--json").stdout)
    assert [finding["severity"] for finding in checked["findings"]] == ["lost"]
    assert damaged.run("verify", house.id).returncode == 4

    (listed,) = json.loads(damaged.run("list", "--json").stdout)
    assert listed["lost_bytes"] == damaged.length
    assert f"{damaged.length >> 10}.0 KiB" in damaged.run("list").stdout.splitlines()[1].split("  ")[-1]
    shown = json.loads(damaged.run("show", house.id, "--json").stdout)
    assert shown["lost"] == [{"part": "disk disk0", **lost}]
    assert "disk disk0" in damaged.run("show", house.id).stdout

    refused = damaged.run("export", house.id, "--output", str(tmp_path / "out"))
    assert refused.returncode == 4
    assert "--accept-loss" in refused.stderr and f"disk disk0 from offset {damaged.offset}" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert damaged.run("export", house.id, "--output", str(tmp_path / "one"), "--disk", "disk1").returncode == 0
    assert damaged.run("export", house.id, "--output", str(tmp_path / "out"), "--accept-loss").returncode == 0
    whole = house.json("export", house.id, "--output", str(tmp_path / "whole"))["files"]
    for file in whole:
        expected = bytearray(Path(file["path"]).read_bytes())
        if file["device"] == "disk0":
            expected[damaged.offset : damaged.offset + damaged.length] = bytes(damaged.length)
        assert (tmp_path / "out" / Path(file["path"]).name).read_bytes() == expected


def test_a_restore_refuses_what_is_lost_unless_it_is_accepted(damaged: Damaged, house: House, tmp_path: Path) -> None:
    assert damaged.run("repair").returncode == 4
    words = ("restore", house.id, "--as", "patched", "--target", str(tmp_path / "disks"))
    refused = damaged.run(*words)
    assert refused.returncode == 4
    assert "--accept-loss" in refused.stderr
    assert not (tmp_path / "disks").exists()
    assert damaged.run(*words, "--accept-loss").returncode == 0
    assert house.state_of("patched") == "stopped"
    with (tmp_path / "disks" / "disk0.raw").open("rb") as disk:
        disk.seek(damaged.offset)
        assert not any(disk.read(damaged.length))


def test_a_whole_repository_needs_no_repair(house: House) -> None:
    report = house.json("repair")
    assert report["changed"] is False
    assert report["lost"] == report["actions"] == report["unreadable"] == []
    assert report["read_bytes"] > 0
    assert "nothing to repair in 1 backups" in house.text("repair")


def test_a_backup_that_cannot_be_read_is_forgotten_when_told(damaged: Damaged, house: House) -> None:
    damaged.flip(f"manifests/{house.id.lower()}", 60)
    first = damaged.run("repair", "--json")
    assert first.returncode == 4
    assert json.loads(first.stdout)["unreadable"] == [house.id.lower()]
    assert damaged.run("list").returncode == 4
    assert damaged.run("repair", "--forget-damaged").returncode == 4
    assert damaged.run("list").returncode == 0
    assert damaged.run("repair").returncode == 0


def test_a_share_is_read_and_the_report_says_which(house: House) -> None:
    half = house.json("check", "--read-data", "--subset", "50%")
    assert (half["subset"], half["read_packs"]) == ("50%", round(half["packs"] / 2))
    assert half["read_bytes"] > 0
    parts = [house.json("check", "--read-data", "--subset", f"{part}/2") for part in (1, 2)]
    assert sum(part["read_packs"] for part in parts) == half["packs"]
    assert f"of {half['packs']} packs (50%) read" in house.text("check", "--read-data", "--subset", "50%")
    for words in (("--subset", "1/2"), ("--read-data", "--subset", "3/2"), ("--read-data", "--subset", "")):
        refused = house.run("check", *words)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1


def test_a_repository_that_does_not_open_is_reported_as_json_too(damaged: Damaged) -> None:
    damaged.flip("config", 30)
    found = damaged.run("check", "--json")
    assert found.returncode == 4
    report = json.loads(found.stdout)
    assert report["damaged"] is True
    assert "config" in report["findings"][0]["message"]
