"""Which worker tests which file, and in which order: the longest first, so that none is left alone with one at the end.

A file stays whole, since its tests share guests and servers. How long each takes is told at the end of every run
(``tests/times.py``); `SECONDS` needs to be right only about which are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

SECONDS: dict[str, int] = {}
"""How long files take that are not short, on two cores that have nothing else to do."""
UNKNOWN_SECONDS = 20
"""What a file that is new may take."""


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The same items; files in the order of how long they take, each file's own order as it was."""
    return sorted(items, key=lambda item: -SECONDS.get(item.nodeid.partition("::")[0], UNKNOWN_SECONDS))


class LongestFirst(LoadFileScheduling):
    """Hands files out in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        # It would begin with the files that have the most tests, which are the quick ones.
        config.option.loadscopereorder = False
