"""How long each test file takes, told at the end of every run: where time goes that everybody waits for.

Beside the time on the clock stands that of the processor, of the tests and of what they started and waited for; what is
left of a core is what more workers could use. A daemon that nobody waits for is missing in it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

_PROPERTY = "processor_seconds"
_TOLD = 40


@dataclass
class Spent:
    """What one file took so far."""

    seconds: float = 0.0
    processor_seconds: float = 0.0


def processor_seconds() -> float:
    """What this process and its ended children have used."""
    return sum(os.times()[:4])


class Clock:
    """A plugin that writes into the last report of each test what the processor did since the one before."""

    def __init__(self) -> None:
        self._before = processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Iterator[None]:
        """See the class."""
        report = yield
        if call.when == "teardown":
            now = processor_seconds()
            report.user_properties.append((_PROPERTY, now - self._before))
            self._before = now
        return report


def by_file(reports: Iterable[pytest.TestReport]) -> dict[str, Spent]:
    """What each file took, that which took longest first."""
    found: defaultdict[str, Spent] = defaultdict(Spent)
    for report in reports:
        spent = found[report.nodeid.partition("::")[0]]
        spent.seconds += report.duration
        spent.processor_seconds += sum(value for name, value in report.user_properties if name == _PROPERTY)
    return dict(sorted(found.items(), key=lambda each: -each[1].seconds))


def lines(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The longest files, and the sum of all."""
    found = by_file(reports)
    whole = Spent(
        sum(spent.seconds for spent in found.values()), sum(spent.processor_seconds for spent in found.values())
    )
    told = [*list(found.items())[:_TOLD], (f"all {len(found)} files", whole)]
    return [f"{spent.seconds:8.1f} s, processor {spent.processor_seconds:8.1f} s  {name}" for name, spent in told]
