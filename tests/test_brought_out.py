"""What tests in guests have covered is put together and told by package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import brought_out
from tests.brought_out import Covered, covered, lines, settings

_RUN = """
import json, sys
import coverage
measured = coverage.Coverage(**json.loads(sys.argv[1]))
measured.start()
from vmsnap_drivers.snapshots.lvm import LvmMechanism
if sys.argv[2] == "handles":
    from vmsnap.model import Disk
    try:
        LvmMechanism.handles(None, Disk("disk0", "/nowhere", 1))
    except AttributeError:
        pass
measured.stop()
measured.save()
"""


def test_what_several_runs_cover_is_one_line_for_each_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brought_out, "DATA", tmp_path / "together")
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)

    def run(number: int, does: str) -> Path:
        data = tmp_path / f"data{number}"
        argv = [sys.executable, "-c", _RUN, json.dumps(settings(str(data), systemd=False)), does]
        subprocess.run(argv, check=True, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
        return data

    (imported,) = covered([run(1, "nothing")]).values()
    ((name, both),) = covered([run(2, "nothing"), run(3, "handles")]).items()
    assert name.endswith("drivers/vmsnap_drivers/snapshots/lvm") and both.statements == imported.statements
    assert 0 < imported.statements_run < both.statements_run < both.statements
    assert (tmp_path / "together").exists() and not list(tmp_path.glob("*.json"))


def test_a_line_has_statements_and_branches() -> None:
    (line,) = lines({"drivers/lvm": Covered(200, 150, 40, 10)})
    assert line == "  75.0 % of  200 statements,  25.0 % of   40 branches  drivers/lvm"


def test_a_systemd_counts_where_everything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    assert settings("data", systemd=True) is None
    monkeypatch.setenv("COVERAGE_PROCESS_CONFIG", "as coverage hands it on")
    assert str(settings("data", systemd=True)).endswith("pyproject.toml'}")
