"""The plugin of the pytest in the guest: writes each report where the host's reads it, as soon as it is there; writes
what the tests have covered beside it; fails a file whose tests leave the guest in another state than they found; and
frees the memory that their files took.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

from tests.in_guest.leftovers import left_since, present

REPORTS, ALONE, COVERAGE = "VMSNAP_GUEST_REPORTS", "VMSNAP_GUEST_ALONE", "VMSNAP_GUEST_COVERAGE"
"""The variables by which it is told where reports go; that nobody else uses the machine: for how many seconds something
may still be there that ends by itself; and, as JSON, the arguments of `coverage.Coverage`.
"""


class Telling:
    """Appends reports to a file, a line each."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._file = path.open("ab", buffering=0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write it."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data).encode() + b"\n")
        os.fsync(self._file.fileno())  # a guest may keep what it writes to the host's files


class Tidiness:
    """Fails the last test of a file where something is left that was not there before the first."""

    def __init__(self, seconds: float) -> None:
        self._before, self._seconds = present(), seconds

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """Look, once all fixtures of a file are torn down."""
        yield
        if nextitem is not None and nextitem.path == item.path:
            return
        if left := left_since(self._before, self._seconds):
            self._before = present()
            pytest.fail(f"these tests leave behind them: {'; '.join(left)}", pytrace=False)
        if base := item.config.getoption("basetemp"):
            for path in (*Path("/dev/shm").iterdir(), *Path(base).iterdir()):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class Covering:
    """Writes which lines were run. It begins when it is made: imports run lines too."""

    def __init__(self, settings: dict[str, object]) -> None:
        self._coverage = coverage.Coverage(**settings)  # type: ignore[arg-type]
        # Most files have to do with some of the drivers only.
        self._coverage.set_option("run:disable_warnings", ["module-not-imported", "no-data-collected"])
        self._coverage.start()

    def pytest_unconfigure(self) -> None:
        """Write them."""
        self._coverage.stop()
        self._coverage.save()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to tell."""
    if settings := json.loads(os.environ.get(COVERAGE, "null")):
        config.pluginmanager.register(Covering(settings))
    if seconds := os.environ.get(ALONE):
        config.pluginmanager.register(Tidiness(float(seconds)))
    config.pluginmanager.register(Telling(config, Path(os.environ[REPORTS])))
