"""``vmsnap demo``: what a newcomer sees first. It must be true, quick, and leave nothing."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli import BIN, Scripts


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    made = Scripts(tmp_path)
    made.environment["DEMO_OF_THIS_TEST"] = secrets.token_hex(8)
    yield made
    made.close()


def living(scripts: Scripts) -> list[int]:
    """The processes that were started in this test's environment and live."""
    mark = f"DEMO_OF_THIS_TEST={scripts.environment['DEMO_OF_THIS_TEST']}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def left(scripts: Scripts) -> list[str]:
    """What lies in the folder of temporary files."""
    return sorted(path.name for path in scripts.folder.glob("vmsnap-demo-*"))


def test_the_demo_shows_what_it_claims_and_leaves_nothing(scripts: Scripts) -> None:
    told = scripts.json("demo")
    assert len(told["claims"]) == 10 and all(claim["seen"] for claim in told["claims"])
    assert 0 < told["pause_seconds"] <= 5
    assert told["captured_count"] <= told["restored_count"] < told["original_count"]
    assert told["second"]["stored_bytes"] < told["first"]["stored_bytes"] / 4
    assert told["folder"] is None
    assert not left(scripts) and not living(scripts)


def test_the_demo_is_a_story_for_people_and_can_be_kept(scripts: Scripts) -> None:
    told = scripts.text("demo", "--keep")
    assert "NOT SEEN" not in told and told.count("seen  ") == 10
    assert "stood still for" in told
    (kept,) = left(scripts)
    folder = scripts.folder / kept
    listed = scripts.json("list", "-r", str(folder / "repository"), VMSNAP_PASSPHRASE_FILE=str(folder / "passphrase"))
    assert len(listed) == 2
    assert not living(scripts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("heading", ["A repository", "A second VM"])
def test_an_interrupted_demo_leaves_nothing(scripts: Scripts, number: signal.Signals, heading: str) -> None:
    process = subprocess.Popen(
        [str(BIN / "vmsnap"), "demo"],
        env=scripts.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith(heading):
            break
    os.kill(process.pid, number)
    process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == f"vmsnap: stopped by {number.name}\n"
    assert not left(scripts) and not living(scripts)
    process.stdout.close()
    process.stderr.close()
