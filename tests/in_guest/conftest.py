"""The tests of this folder run in the lab's storage guest, whose kernel has what this host's may lack, or, where they
are marked so, under a systemd of their own; they are reported here one by one.

They are collected here as all others are. When the first of a file is due, pytest is started in the guest for those of
the file that are wanted (``tests.in_guest.telling``); each one's reports are waited for and passed on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.machine import LabError
from tests.lab.qemus import cache_folder
from tests.lab.storage import StorageGuest
from tests.lab.systemd import SystemdMachine

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.05

_running = pytest.StashKey[dict[bool, "GuestRuns"]]()


class GuestRuns:
    """A guest, and the run of one test file in it."""

    def __init__(self, *, systemd: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmsnap-storage-"))
        openzfs = cache_folder() / "openzfs/root" if os.environ.get("VMSNAP_OPENZFS") else None
        self.guest = SystemdMachine(self.folder) if systemd else StorageGuest(self.folder, layer=openzfs)
        self._path: Path | None = None
        self._name = ""
        self._reports: Iterator[dict[str, object]] = iter(())
        self._count = 0
        self._broken = ""

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """All reports of one test, as soon as they are there.

        :raise LabError: the guest or its pytest has ended without them, or they take too long; all later tests fail
            with the same at once.
        """
        if self._broken:
            raise LabError(f"an earlier test has lost the guest: {self._broken}")
        try:
            return self._reports_of(item)
        except (LabError, LookupError) as e:
            self._broken = str(e)
            self.guest.kill()
            raise LabError(self._broken) from e

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        if item.path != self._path:
            self._begin(item)
        reports: list[pytest.TestReport] = []
        for data in self._reports:
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            if report.nodeid != item.nodeid:
                raise LabError(f"the guest tells of {report.nodeid} instead of {item.nodeid}")
            reports.append(report)
            if report.when == "teardown":
                return reports
        ended = self.guest.end(self._name, PATIENCE_SECONDS)
        raise LabError(f"pytest in the guest has ended with status {ended.status}: {ended.output[-2000:]}")

    def end(self) -> None:
        """Kill the guest and remove all that it left."""
        self.guest.kill()
        shutil.rmtree(self.folder)

    def _begin(self, item: pytest.Item) -> None:
        if self._path is None:
            self.guest.start()
        else:
            self.guest.end(self._name, PATIENCE_SECONDS)
        self._count += 1
        self._path, self._name = item.path, f"run{self._count}"
        wanted = [other.nodeid for other in item.session.items if other.path == item.path]
        (self.guest.results / f"{self._name}.wanted").write_text("\n".join(wanted) + "\n")
        told = self.guest.results / f"{self._name}.reports"
        told.touch()
        self.guest.begin(
            self._name,
            f"""export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONDONTWRITEBYTECODE=1
cd '{ROOT}'
export VMSNAP_GUEST_REPORTS=/run/results/{self._name}.reports
exec '{sys.executable}' -m pytest -q --noconftest -p no:cacheprovider -p pytest_timeout -p tests.in_guest.telling \\
    @/run/results/{self._name}.wanted
""",
        )
        self._reports = self._tail(told)

    def _tail(self, told: Path) -> Iterator[dict[str, object]]:
        """The reports as they come, to the end of the run."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with told.open("rb") as file:
            rest, over = b"", False
            while True:
                data = file.read()
                if not data:
                    if over:
                        return
                    if time.monotonic() > deadline:
                        raise LabError(f"no report within {PATIENCE_SECONDS:g} s: {self.guest.output(self._name)}")
                    over = self.guest.ended(self._name)
                    time.sleep(_POLL_SECONDS)
                    continue
                deadline = time.monotonic() + PATIENCE_SECONDS
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Tests of this folder are run in the guest; a failure of the guest fails the test."""
    if HERE not in item.path.parents or item.get_closest_marker("skip"):
        return None
    guests = item.config.stash.setdefault(_running, {})
    systemd = item.get_closest_marker("systemd") is not None
    if systemd not in guests:
        guests[systemd] = GuestRuns(systemd=systemd)
    runs = guests[systemd]
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    began = time.time()
    try:
        reports = runs.reports_of(item)
    except LabError as e:
        reports = [_failed(item, str(e), began)]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if nextitem is None or HERE not in nextitem.path.parents:
        # What comes next has its own guests, and may need the memory.
        _end_all(item.config)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    """The guests end with the session."""
    _end_all(config)


def _end_all(config: pytest.Config) -> None:
    guests = config.stash.get(_running, {})
    while guests:
        guests.popitem()[1].end()


def _failed(item: pytest.Item, why: str, began: float) -> pytest.TestReport:
    return pytest.TestReport(
        item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, "call",
        start=began, stop=time.time(), duration=time.time() - began,
    )  # fmt: skip
