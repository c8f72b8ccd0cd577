"""The contract in three places says the same: the roles' docstrings, the suites' scenarios, the page made of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.generate import SUITES, contract_page, scenarios
from vmsnap.testing.sentences import Scenarios

ROOT = Path(__file__).parent.parent
QUOTED = re.compile(r'"([^"]+)"')
LEFT_OUT = re.compile(r"…|\[[^\]]*\]")


def plain(text: str) -> str:
    """Without what markup and lines make of it."""
    text = re.sub(r":raises (\w+):", r"\1:", text)
    return " ".join(re.sub(r"[`*]", " ", text).split()).strip(" .,").lower()


def said_by_the_roles() -> Iterator[str]:
    for path in (*(ROOT / "vmsnap" / "roles").glob("*.py"), ROOT / "vmsnap" / "model.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield plain(node.value.value)


@pytest.mark.parametrize("role", SUITES)
def test_every_scenario_has_a_number_of_its_own_and_a_sentence(role: str) -> None:
    found = scenarios(SUITES[role])
    numbers = [number for number, _, _ in found]
    assert len(found) >= 20 and numbers == sorted(set(numbers))
    assert all(sentence for _, _, sentence in found)
    named = [name for name in dir(SUITES[role]) if name.startswith("test_")]
    assert len(named) == len(found), "a test without a number"


@pytest.mark.parametrize("role", SUITES)
def test_what_a_scenario_quotes_is_what_the_role_says(role: str) -> None:
    said = "\n".join(said_by_the_roles())
    for number, _, sentence in scenarios(SUITES[role]):
        for quote in QUOTED.findall(sentence):
            for part in map(plain, LEFT_OUT.split(quote)):
                assert part in said, f"scenario {number} of {role} quotes {part!r}, which the role does not say"


def test_the_page_has_every_scenario() -> None:
    page = contract_page()
    for suite in SUITES.values():
        for number, title, sentence in scenarios(suite):
            assert f"\n{number:02d}\n: **{title}**: {sentence}\n" in page


def test_a_failure_names_the_scenario_and_its_sentence() -> None:
    class Bad(Scenarios):
        role = "StorageBackend"

        def test_19_whole_or_not_at_all(self, seen: bytes) -> None:
            """Readers show either
            the whole object or none."""
            assert seen == b"whole"

        def test_20_left_out(self) -> None:
            """Only where it can be."""
            pytest.skip("it cannot be")

        def without_a_number(self) -> None:
            """No scenario."""
            raise ValueError

    with pytest.raises(AssertionError) as failed:
        Bad().test_19_whole_or_not_at_all(b"ha")
    notes: list[Any] = failed.value.__notes__
    assert notes == ["The contract of StorageBackend, scenario 19: Readers show either the whole object or none."]
    Bad().test_19_whole_or_not_at_all(b"whole")
    with pytest.raises(pytest.skip.Exception) as skipped:
        Bad().test_20_left_out()
    assert not hasattr(skipped.value, "__notes__")
    with pytest.raises(ValueError) as other:
        Bad().without_a_number()
    assert not hasattr(other.value, "__notes__")
