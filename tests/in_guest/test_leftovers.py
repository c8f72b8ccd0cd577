"""The storage guest serves all test files one after the other: one that leaves something in it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.in_guest.leftovers import left_since, present
from tests.in_guest.telling import ALONE, COVERAGE, REPORTS
from tests.in_guest.volumes import make_thick, volume_group

pytestmark = pytest.mark.storage
_UNTIDY = """
import subprocess

def test_that_leaves_nothing():
    pass

def test_that_is_the_last():
    subprocess.Popen(["sleep", "300"], start_new_session=True)
"""


def test_a_volume_and_what_it_lies_on_are_seen_until_they_are_gone(tmp_path: Path) -> None:
    before = present()
    with volume_group(tmp_path, "vg7", 16) as group:
        make_thick(group, "disk0", 1)
        assert present() - before == {"the volume vg7-disk0", f"a loop device on {tmp_path}/vg7.pv"}
    assert left_since(before) == []


def test_the_last_test_of_a_file_that_leaves_a_process_fails(tmp_path: Path) -> None:
    (tmp_path / "test_untidy.py").write_text(_UNTIDY)
    reports = tmp_path / "reports"
    before = present()
    environment = {name: value for name, value in os.environ.items() if name != COVERAGE}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "tests.in_guest.telling", str(tmp_path)],
        env={**environment, REPORTS: str(reports), ALONE: "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    (left,) = present() - before
    process, _, words = left.removeprefix("process ").partition(", ")
    os.kill(int(process), 9)
    assert words == "sleep 300" and done.returncode == 1
    failed = [each for each in map(json.loads, reports.read_text().splitlines()) if each["outcome"] == "failed"]
    (only,) = failed
    assert only["nodeid"].endswith("::test_that_is_the_last") and only["when"] == "teardown"
    assert f"these tests leave behind them: {left}" in str(only["longrepr"])
    assert left_since(before) == []
