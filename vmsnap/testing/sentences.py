"""Scenarios that say, when they fail, which sentence of the contract broke."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

_NUMBERED = re.compile(r"test_(\d+)_")


class Scenarios:
    """A class whose numbered tests are scenarios of the contract of `role`. Where one fails, its number and its
    sentence are added to the error as a note, which pytest shows below it.
    """

    role: ClassVar[str]

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        for name, scenario in list(vars(cls).items()):
            found = _NUMBERED.match(name)
            # a driver's author may have put None in the place of one
            if found is not None and callable(scenario) and scenario.__doc__:
                sentence = " ".join(scenario.__doc__.split())
                setattr(cls, name, _noted(scenario, f"{cls.role}, scenario {found[1]}: {sentence}"))


def _noted(scenario: Callable[..., None], note: str) -> Callable[..., None]:
    @functools.wraps(scenario)
    def run(*arguments: Any, **fixtures: Any) -> None:
        __tracebackhide__ = True
        try:
            scenario(*arguments, **fixtures)
        except BaseException as e:
            if type(e).__name__ != "Skipped":
                e.add_note(f"The contract of {note}")
            raise

    return run
