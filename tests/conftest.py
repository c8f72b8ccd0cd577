"""What all tests share: folders of their own, their order, and the rule about skips."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.brought_out import BROUGHT_OUT, BroughtOut
from tests.lab import available_qemus
from tests.lab.qemus import cache_folder
from tests.left_out import EXHAUSTIVE
from tests.order import LongestFirst, longest_first
from tests.servers.moto import moto
from tests.servers.s3 import S3Server
from tests.servers.swift import swift
from tests.times import Clock, lines
from tests.world import World
from vmsnap.host import HostFolders

ALLOWED_SKIPS: dict[str, str] = {}
"""Test ids that may be skipped even where skips are forbidden, each with its reason."""

# How long an example takes says nothing about what it tests, and much about what else the machine does.
settings.register_profile("vmsnap", deadline=None)
settings.load_profile("vmsnap")


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[HostFolders]:
    """State and memory folders of this test alone; guest RAM in them is gone afterwards."""
    found = HostFolders.find(tmp_path / "state")
    yield found
    shutil.rmtree(found.memory_dir, ignore_errors=True)


@pytest.fixture
def world() -> Iterator[World]:
    """A simulated VM ``vm001`` under load, and an empty repository."""
    made = World()
    yield made
    made.close()


class Counted:
    """Takes a line that says what a test has tried, and how many cases of failure; all are printed at the end."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def __call__(self, text: str, *, cases: int = 0, pause_seconds: float | None = None) -> None:
        """:param pause_seconds: the longest pause of a guest that was seen"""
        self._record("counted", text)
        self._record("cases", cases)
        if pause_seconds is not None:
            self._record("pause_seconds", pause_seconds)


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Counted:
    """See `Counted`."""
    return Counted(record_property)


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """OpenStack Swift with its S3 interface: verifies signatures and check sums."""
    with swift(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto's S3 server: atomic conditional puts, versions and object lock."""
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


def pytest_configure(config: pytest.Config) -> None:
    """How long files take is measured; what guests covered is told."""
    config.pluginmanager.register(Clock())
    config.pluginmanager.register(BroughtOut(config), BROUGHT_OUT)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongestFirst | None:
    """Where files are handed out to workers, the longest come first."""
    return LongestFirst(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first. What is left to ``make test-exhaustive`` is not there. Where the lab is not
    installed, what boots real guests is left out and says why, unless skips are forbidden.
    """
    left_out = [] if EXHAUSTIVE else [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = longest_first([item for item in items if item not in left_out])
    if os.environ.get("VMSNAP_FORBID_SKIPS"):
        return
    has_sshd = os.geteuid() == 0 and (cache_folder() / "sshd" / "complete").exists()
    lacking = {"qemu": "both QEMUs"} if len(available_qemus()) < 2 else {}
    lacking |= {} if has_sshd else {"sshd": "an SSH server"}
    has_libvirt = os.geteuid() == 0 and Path("/usr/sbin/libvirtd").exists() and importlib.util.find_spec("libvirt")
    lacking |= {} if has_libvirt else {"libvirt": "libvirt's daemon and Python binding"}
    has_lab = os.geteuid() == 0 and (cache_folder() / "lighttpd" / "complete").exists()
    lacking |= {} if has_lab else {"lab": "a WebDAV server and btrfs"}
    lacking |= {} if shutil.which("chromium") and shutil.which("chromedriver") else {"chromium": "Chromium"}
    has_storage = len(available_qemus()) == 2 and (cache_folder() / "storage" / "complete").exists()
    lacking |= {} if has_storage else {"storage": "a kernel with device mapper"}
    for item in items:
        for marker, what in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {what}: as root on Debian, sh tests/lab/install.sh"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many cases were tried; where skips are forbidden, name each one that is not listed."""
    cases = 0
    for report in terminalreporter.stats.get("passed", []):
        told = dict(report.user_properties) if report.when == "call" else {}
        if "counted" in told:
            terminalreporter.write_line(f"{report.nodeid}: {told['counted']}")
            cases += told["cases"]
    if cases:
        terminalreporter.write_line(f"{cases} cases of failure in all")
    if terminalreporter.config.getoption("durations"):
        reports = [report for some in terminalreporter.stats.values() for report in some]
        terminalreporter.section("files that took longest")
        terminalreporter.write_line("\n".join(lines(each for each in reports if isinstance(each, pytest.TestReport))))
    for report in _forbidden(terminalreporter):
        terminalreporter.write_line(f"FORBIDDEN SKIP {report.nodeid}: {report.longrepr}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip that is not listed fails the run where VMSNAP_FORBID_SKIPS is set."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _forbidden(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _forbidden(reporter: pytest.TerminalReporter) -> list[pytest.TestReport]:
    if not os.environ.get("VMSNAP_FORBID_SKIPS"):
        return []
    return [report for report in reporter.stats.get("skipped", []) if report.nodeid not in ALLOWED_SKIPS]
