"""``vmsnap key`` by the real script: passphrases are added, listed, removed and changed, and shown nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli import Scripts, on_terminal

OLD, NEW = "correct horse, battery=staple", "neu & improved"


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    made = Scripts(tmp_path)
    made.environment["VMSNAP_REPOSITORY"] = str(tmp_path / "repository")
    made.text("init", VMSNAP_PASSPHRASE=OLD)
    yield made
    made.close()


def test_a_key_is_added_listed_and_removed(scripts: Scripts) -> None:
    made = scripts.json("key", "add", "--label", "offsite", VMSNAP_PASSPHRASE=OLD, VMSNAP_NEW_PASSPHRASE=NEW)
    assert made["label"] == "offsite"
    first, second = sorted(scripts.json("key", "list", VMSNAP_PASSPHRASE=NEW), key=lambda key: key["opened"])
    assert (first["opened"], second["opened"]) == (False, True)
    assert second["id"] == made["id"] and second["label"] == "offsite" and not second["fault"]
    assert second["cost"] == {"time_cost": 3, "memory_kib": 65536, "lanes": 4}
    shown = scripts.text("key", "list", VMSNAP_PASSPHRASE=OLD)
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("*")] == [["*", first["id"]]]
    assert scripts.json("key", "remove", first["id"], VMSNAP_PASSPHRASE=NEW) == {"removed": first["id"]}
    assert "no key of the repository opens" in scripts.error(2, "list", VMSNAP_PASSPHRASE=OLD)
    assert scripts.json("list", VMSNAP_PASSPHRASE=NEW) == []


def test_the_last_key_is_not_removed(scripts: Scripts) -> None:
    (only,) = scripts.json("key", "list", VMSNAP_PASSPHRASE=OLD)
    assert "vmsnap key change" in scripts.error(2, "key", "remove", only["id"], VMSNAP_PASSPHRASE=OLD)
    assert "no key 'ffff'" in scripts.error(3, "key", "remove", "ffff", VMSNAP_PASSPHRASE=OLD)


def test_the_new_passphrase_comes_from_file_command_or_environment(scripts: Scripts) -> None:
    file = scripts.folder / "new"
    file.write_text("second\n")
    told = scripts.text("key", "change", VMSNAP_PASSPHRASE=OLD, VMSNAP_NEW_PASSPHRASE_FILE=str(file))
    assert "second" not in told and "is changed" in told
    command = {"VMSNAP_NEW_PASSPHRASE_COMMAND": "echo third"}
    changed = scripts.json("key", "change", VMSNAP_PASSPHRASE="second", **command)
    assert "opens no" not in scripts.text("list", VMSNAP_PASSPHRASE="third")
    assert [key["id"] for key in scripts.json("key", "list", VMSNAP_PASSPHRASE="third")] == [changed["id"]]
    for wrong in (OLD, "second"):
        scripts.error(2, "list", VMSNAP_PASSPHRASE=wrong)


def test_at_a_terminal_the_new_passphrase_is_asked_for_twice(scripts: Scripts) -> None:
    shown = on_terminal(scripts, "key", "change", typed=[OLD, NEW, NEW])
    assert "New passphrase" in shown and OLD not in shown and NEW not in shown
    assert scripts.json("list", VMSNAP_PASSPHRASE=NEW) == []


def test_what_is_wrong_is_one_line_and_changes_nothing(scripts: Scripts) -> None:
    before = scripts.json("key", "list", VMSNAP_PASSPHRASE=OLD)
    assert "VMSNAP_NEW_PASSPHRASE_FILE" in scripts.error(2, "key", "add", VMSNAP_PASSPHRASE=OLD)
    same = {"VMSNAP_PASSPHRASE": OLD, "VMSNAP_NEW_PASSPHRASE": OLD}
    assert "already" in scripts.error(2, "key", "add", **same)
    assert "already" in scripts.error(2, "key", "change", **same)
    assert "no key" in scripts.error(2, "key", "add", VMSNAP_PASSPHRASE="x", VMSNAP_NEW_PASSPHRASE=NEW)
    assert "cannot read" in scripts.error(2, "key", "add", VMSNAP_PASSPHRASE=OLD, VMSNAP_NEW_PASSPHRASE_FILE="/none")
    assert scripts.json("key", "list", VMSNAP_PASSPHRASE=OLD) == before


def test_a_repository_without_encryption_has_no_keys(scripts: Scripts) -> None:
    plain = str(scripts.folder / "plain")
    scripts.text("init", "-r", plain)
    for words in (("list",), ("add",), ("change",), ("remove", "ffff")):
        assert "not encrypted" in scripts.error(2, "key", *words, "-r", plain, VMSNAP_NEW_PASSPHRASE=NEW)


def test_processes_that_are_started_do_not_inherit_passphrases(scripts: Scripts) -> None:
    seen = scripts.folder / "seen"
    command = scripts.folder / "command"
    command.write_text(f"#!/bin/sh\nenv > '{seen}'\necho '{OLD}'\n")
    command.chmod(0o700)
    scripts.text("key", "add", VMSNAP_PASSPHRASE_COMMAND=str(command), VMSNAP_NEW_PASSPHRASE=NEW)
    assert "VMSNAP_REPOSITORY" in seen.read_text() and NEW not in seen.read_text()
