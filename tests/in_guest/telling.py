"""The plugin of the pytest in the guest: writes each report where the host's reads it, as soon as it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


class Telling:
    """Appends reports to a file, a line each."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._file = path.open("ab", buffering=0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write it."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data).encode() + b"\n")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to tell."""
    config.pluginmanager.register(Telling(config, Path(os.environ["VMSNAP_GUEST_REPORTS"])))
