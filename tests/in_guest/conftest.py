"""The tests of this folder run in the lab's storage guest, whose kernel has what this host's may lack, or, where they
are marked so, under a systemd of their own; they are reported here one by one.

They are collected here as all others are. When the first is due, pytest is started in the guest for it and all that
stay together with it (``tests/order.py``, ``tests.in_guest.telling``): to start it takes seconds there, and half a
minute where the guest is emulated. Each one's reports are waited for and passed on. One boot and one run serve half of
the files; a file that leaves something behind it fails.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brought_out import BOOT, BROUGHT_OUT, BroughtOut, settings
from tests.in_guest.leftovers import PATIENCE_SECONDS as LEFTOVERS_SECONDS
from tests.in_guest.telling import ALONE, COVERAGE, REPORTS
from tests.lab.machine import LabError
from tests.lab.qemus import cache_folder
from tests.lab.scripted import Scripted
from tests.lab.storage import StorageGuest
from tests.lab.systemd import SystemdMachine
from tests.lab.user_mode import UserModeGuest
from tests.order import together

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE_SECONDS = 540.0
"""Less than the time-out of a test; where other programs have the processors, one takes minutes."""
_POLL_SECONDS = 0.05

_running = pytest.StashKey[dict[bool, "GuestRuns"]]()


class GuestRuns:
    """A guest, and the runs of tests in it: one, or one for each half where this process has both."""

    def __init__(self, *, systemd: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmsnap-storage-"))
        self._systemd = systemd
        self.guest: Scripted = SystemdMachine(self.folder) if systemd else _storage_guest(self.folder)
        self.path: Path | None = None
        """The file that is run, or was last."""
        self._awaited: list[str] = []
        """Those tests of the run whose reports have not been asked for."""
        self.lost = ""
        """Why the guest is of no use any more."""
        self._boot_seconds: float | None = None
        self._name = ""
        self._reports: Iterator[dict[str, object]] = iter(())
        self._count = 0

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """All reports of one test, as soon as they are there; after the last of a run also its end.

        :raise LabError: the guest or its pytest has ended without them, or they take too long; all later tests of the
            file fail with the same at once.
        """
        if self.lost:
            raise LabError(f"an earlier test has lost the guest: {self.lost}")
        try:
            reports = self._reports_of(item)
            if not self._awaited:
                self._finish(item)
        except (LabError, LookupError, pytest.fail.Exception) as e:  # the last is that of pytest-timeout
            self.lost = str(e)
            self.guest.kill()
            raise LabError(self.lost) from e
        return reports

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        if not self._awaited:
            self._begin(item)
        self.path = item.path
        self._awaited.remove(item.nodeid)
        reports: list[pytest.TestReport] = []
        for data in self._reports:
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            if report.nodeid != item.nodeid:
                raise LabError(f"the guest tells of {report.nodeid} instead of {item.nodeid}")
            reports.append(report)
            if report.when == "teardown":
                if self._boot_seconds is not None:
                    report.user_properties.append((BOOT, self._boot_seconds))
                    self._boot_seconds = None
                return reports
        ended = self.guest.end(self._name, PATIENCE_SECONDS)
        raise LabError(f"pytest in the guest has ended with status {ended.status}: {ended.output[-2000:]}")

    def end(self) -> None:
        """Kill the guest and remove all that it left."""
        self.guest.kill()
        shutil.rmtree(self.folder)

    def _begin(self, item: pytest.Item) -> None:
        if self.path is None:
            began = time.monotonic()
            self.guest.start()
            if not self._systemd:
                self._boot_seconds = time.monotonic() - began
        self._count += 1
        self._name = f"run{self._count}"
        results = self.guest.results
        self._awaited = list(self._wanted(item))
        (results / f"{self._name}.wanted").write_text("\n".join(self._awaited) + "\n")
        told = results / f"{self._name}.reports"
        told.touch()
        (results / f"{self._name}.coverage").mkdir()
        variables = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            REPORTS: f"/run/results/{self._name}.reports",
            ALONE: "" if self._systemd else str(LEFTOVERS_SECONDS),
            COVERAGE: json.dumps(settings(f"/run/results/{self._name}.coverage/data", systemd=self._systemd)),
        }
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        self.guest.begin(
            self._name,
            f"""export {exports}
cd '{ROOT}'
exec '{sys.executable}' -m pytest -q --noconftest -p no:cacheprovider -p pytest_timeout -p tests.in_guest.telling \
    --basetemp=/tmp/{self._name} @/run/results/{self._name}.wanted
""",
        )
        self._reports = self._tail(told)

    def _wanted(self, first: pytest.Item) -> Iterator[str]:
        """The tests that are due from `first` on in the same guest, and in the same run."""
        items = first.session.items
        for item in items[items.index(first) :]:
            if together(item.nodeid) == together(first.nodeid) and _in_systemd(item) == self._systemd:
                yield item.nodeid

    def _finish(self, item: pytest.Item) -> None:
        """Wait for the end of the run, and take what it has covered."""
        ended = self.guest.end(self._name, PATIENCE_SECONDS)
        if ended.status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise LabError(f"pytest in the guest has ended with status {ended.status}: {ended.output[-2000:]}")
        brought_out = item.config.pluginmanager.get_plugin(BROUGHT_OUT)
        if isinstance(brought_out, BroughtOut):
            brought_out.add(self.guest.results / f"{self._name}.coverage")

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
    systemd = _in_systemd(item)
    if systemd in guests and guests[systemd].lost and guests[systemd].path != item.path:
        guests.pop(systemd).end()  # another file's tests are not to blame
    if systemd not in guests:
        guests[systemd] = GuestRuns(systemd=systemd)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    began = time.time()
    try:
        reports = guests[systemd].reports_of(item)
    except LabError as e:
        reports = [_failed(item, str(e), began)]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if nextitem is None or HERE not in nextitem.path.parents:
        # What comes next has its own guests, and may need the memory.
        _end_all(item.config)
    return True


def _storage_guest(folder: Path) -> Scripted:
    """OpenZFS is built for Debian's kernel of real machines, and so needs one that is emulated."""
    if os.environ.get("VMSNAP_OPENZFS"):
        return StorageGuest(folder, layer=cache_folder() / "openzfs/root")
    return UserModeGuest(folder)


def _in_systemd(item: pytest.Item) -> bool:
    return item.get_closest_marker("systemd") is not None


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
