"""``vmsnap copy`` as scripts use it: both passphrases, what it reports, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.sshd import SshServer
from tests.test_cli import Scripts

ONE, OTHER = "the first word", "another word"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """A repository with two backups of a simulated VM."""
    made = Scripts(tmp_path_factory.mktemp("copy"))
    made.environment["VMSNAP_REPOSITORY"] = str(made.folder / "one")
    made.text("init", VMSNAP_PASSPHRASE=ONE)
    made.text("start", "vm001", "--memory", "1M", "--disk", "1M", script="vmsnap-sim")
    for _ in range(2):
        made.text("backup", "vm001", VMSNAP_PASSPHRASE=ONE)
    yield made
    made.text("stop", "vm001", script="vmsnap-sim")


def test_a_copy_has_its_own_keys(filled: Scripts) -> None:
    other = str(filled.folder / "other")
    filled.text("init", "-r", other, VMSNAP_PASSPHRASE=OTHER)
    words = {"VMSNAP_FROM_PASSPHRASE": ONE, "VMSNAP_TO_PASSPHRASE": OTHER}
    listed = filled.json("list", VMSNAP_PASSPHRASE=ONE)
    would = filled.json("copy", "--to", other, "--dry-run", **words)
    assert [each["backup"] for each in would["copied"]] == [each["backup"] for each in listed]
    assert filled.json("list", "-r", other, VMSNAP_PASSPHRASE=OTHER) == []
    done = filled.json("copy", "--to", other, listed[0]["backup"], **words)
    assert [each["backup"] for each in done["copied"]] == [listed[0]["backup"]]
    assert done["copied"][0]["read_bytes"] > 0
    done = filled.json("copy", "--from", str(filled.folder / "one"), "--to", other, **words)
    assert done["present"] == [listed[0]["backup"]]
    assert done["damaged"] == []
    assert [each["backup"] for each in done["copied"]] == [listed[1]["backup"]]
    assert filled.json("list", "-r", other, VMSNAP_PASSPHRASE=OTHER) == listed
    assert filled.json("check", "-r", other, "--read-data", VMSNAP_PASSPHRASE=OTHER)["findings"] == []
    for place, word in ((filled.folder / "one", ONE), (other, OTHER)):
        output = filled.folder / f"{Path(place).name}-image"
        filled.text("export", listed[1]["backup"], "-r", str(place), "--output", str(output), VMSNAP_PASSPHRASE=word)
    one, two = (sorted((filled.folder / f"{name}-image").iterdir()) for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert "nothing to copy" in filled.text("copy", "--to", other, "--vm", "vm001", **words)


def test_what_is_wrong_is_one_line(filled: Scripts) -> None:
    one = str(filled.folder / "one")
    words = {"VMSNAP_FROM_PASSPHRASE": ONE, "VMSNAP_TO_PASSPHRASE": ONE}
    assert "same repository" in filled.error(2, "copy", "--to", one, **words)
    assert "no vmsnap repository" in filled.error(3, "copy", "--to", str(filled.folder / "nowhere"), **words)
    plain = str(filled.folder / "plain")
    filled.text("init", "-r", plain, "--encryption", "none")
    assert "no backup" in filled.error(3, "copy", "--to", plain, "vm009", **words)
    assert "opens" in filled.error(2, "copy", "--to", plain, VMSNAP_FROM_PASSPHRASE="wrong")
    assert "password" in filled.error(2, "copy", "--to", "sftp://me:hunter22@host/x", **words)
    assert "hunter22" not in filled.error(2, "copy", "--to", "sftp://me:hunter22@host/x", **words)


def test_an_unencrypted_repository_in_the_place_of_an_encrypted_one_is_refused(filled: Scripts) -> None:
    place = filled.folder / "swapped"
    words = {"VMSNAP_FROM_PASSPHRASE": ONE, "VMSNAP_TO_PASSPHRASE": OTHER}
    filled.text("init", "-r", str(place), VMSNAP_PASSPHRASE=OTHER)
    filled.text("copy", "--to", str(place), "--dry-run", **words)
    shutil.rmtree(place)
    filled.text("init", "-r", str(place), "--encryption", "none")
    assert "was encrypted" in filled.error(1, "copy", "--to", str(place), **words)
    assert filled.json("copy", "--to", str(place), "--accept-unencrypted", **words)["copied"]


@pytest.mark.sshd
def test_to_an_sftp_server_and_back(filled: Scripts, tmp_path: Path) -> None:
    with SshServer(tmp_path / "sshd") as server:
        environment = {"VMSNAP_SSH_CONFIG": str(server.config_file), "VMSNAP_CACHE_DIR": str(tmp_path / "cache")}
        far = f"sftp://lab{tmp_path}/far"
        line = filled.error(2, "doctor", far.replace("sftp", "s3"), script="vmsnap-sftp")
        assert "serves sftp:// only" in line
        shown = filled.json("doctor", far, script="vmsnap-sftp", **environment)
        assert [each["severity"] for each in shown] == ["ok", "note"]
        filled.text("init", far, script="vmsnap-sftp", VMSNAP_PASSPHRASE=OTHER, **environment)
        words = {"VMSNAP_FROM_PASSPHRASE": ONE, "VMSNAP_TO_PASSPHRASE": OTHER, **environment}
        done = filled.json("copy", "--to", far, **words)
        assert len(done["copied"]) == 2
        listed = filled.json("list", far, script="vmsnap-sftp", VMSNAP_PASSPHRASE=OTHER, **environment)
        assert len(listed) == 2
        checked = filled.json("check", far, "--read-data", script="vmsnap-sftp", VMSNAP_PASSPHRASE=OTHER, **environment)
        assert checked["findings"] == []
        assert "free" in filled.text("doctor", far, script="vmsnap-sftp", **environment)
        measured = filled.json("bench", far, "--size", "4M", script="vmsnap-sftp", **environment)
        assert measured["bytes"] == 4 << 20
        back = str(tmp_path / "back")
        filled.text("init", "-r", back, VMSNAP_PASSPHRASE=ONE)
        words = {"VMSNAP_FROM_PASSPHRASE": OTHER, "VMSNAP_TO_PASSPHRASE": ONE, **environment}
        assert len(filled.json("copy", "--from", far, "--to", back, **words)["copied"]) == 2
        assert filled.json("check", "-r", back, "--read-data", VMSNAP_PASSPHRASE=ONE)["findings"] == []
