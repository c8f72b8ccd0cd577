"""What is brought out of the storage guest beside the tests' reports, told at the end of every run: how often one was
booted, and how much of the snapshot drivers its tests covered. Which lines: ``coverage report -m --data-file=FILE``.

In a run that measures coverage as a whole (``make coverage``) the guest's is a part of that, and not told here.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parent.parent
DATA = ROOT / ".coverage-guest"
"""What the guest's tests of the last run covered."""
BROUGHT_OUT = "brought out of guests"
"""The name of the plugin."""
BOOT = "storage_guest_boot_seconds"
"""The property of the report of a test for which the guest was booted."""
_PLACE = "coverage_of_guests"
_SNAPSHOTS = "vmsnap_drivers.snapshots"
_IN_GUEST = ["lvm", "iscsi", *(["zfs"] if os.environ.get("VMSNAP_OPENZFS") else [])]
_WHOLE_RUN = "COVERAGE_PROCESS_CONFIG"
"""The variable by which coverage starts itself in processes that are started; pyproject.toml asks it to."""


def settings(data_file: str, *, systemd: bool) -> dict[str, Any] | None:
    """The arguments of the guest's `coverage.Coverage`; None: nothing is measured in it.

    :param systemd: whether it is none with device mapper, but a systemd
    """
    if _WHOLE_RUN in os.environ:
        return {"data_file": data_file, "config_file": str(ROOT / "pyproject.toml")}
    if systemd:
        return None
    packages = [f"{_SNAPSHOTS}.{name}" for name in _IN_GUEST]
    return {"data_file": data_file, "config_file": False, "branch": True, "source_pkgs": packages}


class BroughtOut:
    """The plugin; `add` takes what a guest has written, in whichever of the run's processes."""

    def __init__(self, config: pytest.Config) -> None:
        worker = getattr(config, "workerinput", None)
        self._is_worker = worker is not None
        self._folder = Path(worker[_PLACE] if worker else tempfile.mkdtemp(prefix="vmsnap-coverage-"))

    def add(self, written: Path) -> None:
        """Keep all files of a folder; they are moved."""
        for path in written.iterdir():
            name = f".coverage.{written.parent.parent.name}.{written.name}.{path.name}"
            shutil.move(path, (ROOT if _WHOLE_RUN in os.environ else self._folder) / name)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Workers add to the same folder."""
        node.workerinput[_PLACE] = str(self._folder)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell it."""
        reports = [report for some in terminalreporter.stats.values() for report in some]
        boots = [
            value
            for report in reports
            if isinstance(report, pytest.TestReport)
            for name, value in report.user_properties
            if name == BOOT
        ]
        if boots:
            terminalreporter.section("storage guest")
            times = ", ".join(f"{seconds:.1f} s" for seconds in boots)
            terminalreporter.write_line(
                f"booted {len(boots)} times: {times}" if len(boots) > 1 else f"booted in {times}"
            )
        if files := list(self._folder.iterdir()):
            terminalreporter.write_line("covered by its tests:")
            terminalreporter.write_line("\n".join(lines(covered(files))))

    def pytest_unconfigure(self) -> None:
        """Remove what is no longer needed."""
        if not self._is_worker:
            shutil.rmtree(self._folder)


@dataclass
class Covered:
    """How much of one package was run."""

    statements: int = 0
    statements_run: int = 0
    branches: int = 0
    branches_taken: int = 0


def covered(files: list[Path]) -> dict[str, Covered]:
    """By package, from such data; `DATA` has them together."""
    DATA.unlink(missing_ok=True)
    together = coverage.Coverage(data_file=str(DATA), config_file=False, branch=True)
    together.combine([str(path) for path in files])
    together.save()
    report = DATA.with_suffix(".json")
    try:
        together.json_report(outfile=str(report))
        found = json.loads(report.read_text())["files"]
    finally:
        report.unlink(missing_ok=True)
    packages: dict[str, Covered] = {}
    for name, told in sorted(found.items()):
        package = packages.setdefault(str(Path(name).parent), Covered())
        numbers = told["summary"]
        package.statements += numbers["num_statements"]
        package.statements_run += numbers["covered_lines"]
        package.branches += numbers["num_branches"]
        package.branches_taken += numbers["covered_branches"]
    return packages


def lines(packages: Mapping[str, Covered]) -> Iterator[str]:
    """A line for each."""
    for name, found in packages.items():
        statements = 100 * found.statements_run / max(found.statements, 1)
        branches = 100 * found.branches_taken / max(found.branches, 1)
        yield (
            f"{statements:6.1f} % of {found.statements:4} statements, {branches:5.1f} % of {found.branches:4} branches"
            f"  {name}"
        )
