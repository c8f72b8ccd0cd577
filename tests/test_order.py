"""Files are handed out whole, the longest first; those of the storage guest in two halves, each to one worker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.order import SECONDS, LongestFirst, longest_first, together

HERE = Path(__file__).parent


def test_the_files_of_the_storage_guest_stay_together_in_two_halves_and_others_are_alone() -> None:
    files = [f"tests/{path.relative_to(HERE)}" for path in HERE.rglob("test_*.py")]
    of_guest = {file for file in files if file.startswith("tests/in_guest/")}
    assert len({together(f"{file}::test_it[a::b]") for file in of_guest}) == 2
    assert together("tests/in_guest/test_lvm_page.py::test_it") == together(
        "tests/in_guest/test_lvm_backup.py::test_it"
    )
    others = set(files) - of_guest
    assert {together(f"{file}::Test::test_it") for file in others} == others


def test_the_longest_come_first_and_a_file_is_not_torn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    short, new, longest = "tests/test_short.py", "tests/test_that_is_new.py", "tests/test_longest.py"
    first, second = "tests/in_guest/test_first.py", "tests/in_guest/test_second.py"
    for file, seconds in ((longest, 90), (first, 60), (second, 20), (short, 21)):
        monkeypatch.setitem(SECONDS, file, seconds)
    collected = [f"{file}::test_{name}" for file in (new, second, short, first, longest) for name in ("b", "a")]
    items: list[Any] = [SimpleNamespace(nodeid=nodeid) for nodeid in collected]
    expected = [f"{file}::test_{name}" for file in (longest, first, second, short, new) for name in ("b", "a")]
    assert [item.nodeid for item in longest_first(items)] == expected


def test_workers_are_given_what_stays_together(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytestconfig.option, "tx", ["popen"])
    scheduling = LongestFirst(pytestconfig)
    assert scheduling._split_scope("tests/in_guest/test_lio.py::test_it") == together("tests/in_guest/test_lio.py")
