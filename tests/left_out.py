"""What the suite leaves out for the time that it takes, and ``make test-exhaustive`` runs: others show the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")

VARIABLE = "VMSNAP_EXHAUSTIVE"
EXHAUSTIVE = bool(os.environ.get(VARIABLE))
"""Whether nothing is to be left out."""


def some_of(cases: Sequence[Case], one_in: int = 3) -> Sequence[Case]:
    """One in so many of cases that follow each other and are alike, the same ones each time; all of them where nothing
    is left out.
    """
    return cases if EXHAUSTIVE else cases[::one_in]
