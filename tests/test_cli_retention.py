"""``vmsnap prune`` and ``vmsnap forget`` by the real script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli import Scripts
from tests.test_retention import put
from vmsnap.configuration import Configuration, load, parse_duration
from vmsnap.errors import UsageError
from vmsnap.host import default_cache_dir
from vmsnap.places import open_repository
from vmsnap.repository.format import manifest_key


class Shelf(Scripts):
    """A repository with backups of two VMs, on days of January 2026."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url = str(folder / "repository")
        self.environment["VMSNAP_REPOSITORY"] = self.url
        self.text("init")
        repository = open_repository(self.url)
        self.web1 = [put(repository, "web1", day) for day in (1, 2, 3, 12)]
        self.db = [put(repository, "db", 1, "release"), put(repository, "db", 2)]

    def listed(self) -> set[str]:
        return {backup["backup"] for backup in self.json("list")}


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    made = Shelf(tmp_path)
    yield made
    made.close()


def test_a_dry_run_says_why_and_prune_then_does_it(shelf: Shelf) -> None:
    words = ("prune", "--keep-last", "1", "--keep-weekly", "2", "--keep-tag", "release")
    dry = shelf.json(*words, "--dry-run")
    assert len(shelf.listed()) == 6
    assert {found["backup"]: found["reasons"] for found in dry["kept"]} == {
        shelf.web1[2]: ["weekly 2 of 2"],
        shelf.web1[3]: ["last 1 of 1", "weekly 1 of 2"],
        shelf.db[0]: ["tag release"],
        shelf.db[1]: ["last 1 of 1", "weekly 1 of 2"],
    }
    assert dry["removed"] == [
        {"backup": backup, "vm": "web1", "time": f"2026-01-0{day}T00:00:00Z"}
        for day, backup in enumerate(shelf.web1[:2], 1)
    ]
    assert shelf.json(*words) == dry | {"dry_run": False}
    assert shelf.listed() == {*shelf.web1[2:], *shelf.db}
    assert shelf.json(*words)["removed"] == []


def test_people_see_a_table_and_what_frees_the_room(shelf: Shelf) -> None:
    dry = shelf.text("prune", "--keep-last", "2", "--vm", "web1", "--dry-run")
    lines = {line.split()[0]: line for line in dry.splitlines() if line.startswith("web1-")}
    assert set(lines) == set(shelf.web1) and "db" not in dry
    assert " remove" in lines[shelf.web1[0]]
    assert " keep " in lines[shelf.web1[3]] and lines[shelf.web1[3]].endswith("last 1 of 2")
    assert dry.endswith("2 backups would be removed; nothing was changed\n")
    done = shelf.text("prune", "--keep-last", "2", "--vm", "web1")
    assert done.endswith("2 backups removed; vmsnap gc frees the room\n")
    assert shelf.text("prune", "--keep-last", "2", "--vm", "web1").endswith("nothing to remove\n")
    assert shelf.text("prune", "--keep-last", "1", "--vm", "nobody") == "nothing to remove\n"


def test_tags_and_durations(shelf: Shelf) -> None:
    assert {found["backup"] for found in shelf.json("prune", "--keep-within", "1d", "--tag", "release")["kept"]} == {
        shelf.db[0]
    }
    kept = shelf.json("prune", "--keep-within", "9999y", "--dry-run")["kept"]
    assert len(kept) == 6 and kept[0]["reasons"] == ["within 9999 y"]
    kept = shelf.json("prune", "--keep-within", "1min", "--dry-run")["kept"]
    assert [found["reasons"] for found in kept] == [["the newest"], ["the newest"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "keeps nothing"),
        (("--keep-last", "0"), "keeps nothing"),
        (("--dry-run", "--vm", "web1"), "keeps nothing"),
        (("--keep-last", "-1"), "-1"),
        (("--keep-last", "many"), "many"),
        (("--keep-within", "30m"), "no duration"),
        (("--keep-within", "0d"), "keeps nothing"),
    ],
)
def test_a_policy_that_says_nothing_is_wrong_usage_and_removes_nothing(
    shelf: Shelf, words: tuple[str, ...], said: str
) -> None:
    assert said in shelf.error(2, "prune", *words)
    assert len(shelf.listed()) == 6


def test_backups_that_cannot_be_read_are_left_alone_and_make_it_4(shelf: Shelf) -> None:
    damaged, newer = (Path(shelf.url) / manifest_key(backup) for backup in shelf.web1[:2])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    repository = open_repository(shelf.url)
    newer.write_bytes(repository.vault.seal_object(manifest_key(shelf.web1[1]), b'{"version": 2}'))
    for words in (("prune", "--keep-last", "1"), ("list",)):
        done = shelf.run(*words, "--json")
        assert done.returncode == 4
        assert "is damaged" in done.stderr and "format 2, newer than this vmsnap (install a newer one)" in done.stderr
        assert shelf.web1[3] in done.stdout
    assert damaged.exists() and newer.exists()
    report = json.loads(shelf.run("prune", "--keep-last", "1", "--json").stdout)
    assert len(report["unread"]) == 2 and report["removed"] == []
    assert {found["backup"] for found in report["kept"]} == {shelf.web1[3], shelf.db[1]}


def test_single_backups_are_forgotten_by_their_whole_ids(shelf: Shelf) -> None:
    assert "no backup 'web1'" in shelf.error(3, "forget", shelf.web1[0], "web1")
    assert len(shelf.listed()) == 6
    Path(shelf.url, manifest_key(shelf.web1[1])).write_bytes(b"damaged")
    assert shelf.json("forget", shelf.web1[0], shelf.web1[1], shelf.web1[0]) == {"removed": shelf.web1[:2]}
    assert shelf.listed() == {*shelf.web1[2:], *shelf.db}
    assert shelf.text("forget", shelf.db[0]) == "1 backup removed; vmsnap gc frees the room\n"
    assert "BACKUP" in shelf.error(2, "forget")


# -- what the options are read by


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30min", 1800),
        ("12h", 43200),
        ("30d", 2592000),
        ("2w", 1209600),
        ("1y", 31536000),
        ("1d12h", 129600),
        (" 1 D 12 h ", 129600),
    ],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1.5d", "30m", "1d12", "1234567890d", "1 day", "0x1d"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text('cache_dir = "/cache"\n')
    assert load(tmp_path / "config.toml") == Configuration(tmp_path / "config.toml", cache_dir=Path("/cache"))
    monkeypatch.delenv("VMSNAP_CACHE_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_cache_dir() == Path("/var/cache/vmsnap")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/cached")
    assert default_cache_dir() == Path("/home/me/cached/vmsnap")
    monkeypatch.setenv("VMSNAP_CACHE_DIR", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere")
