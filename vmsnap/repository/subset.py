"""Which packs a check reads when it is not to read all of them."""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass

from vmsnap.errors import UsageError

_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")


@dataclass(frozen=True)
class Subset:
    """A share of the packs: `part` of `parts`, chosen by their ids, so that checks of all parts read every pack once;
    or, where `percent` is not zero, that share of them, chosen at random each time.
    """

    part: int = 1
    parts: int = 1
    percent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Subset:
        """The share that ``N/M`` or ``P%`` says.

        :raises UsageError: it is neither, or an impossible one
        """
        if (found := _PART.fullmatch(text)) and 1 <= int(found[1]) <= int(found[2]):
            return cls(int(found[1]), int(found[2]))
        if (found := _PERCENT.fullmatch(text)) and 0 < float(found[1]) <= 100:
            return cls(percent=float(found[1]))
        raise UsageError(f"{text!r} is no share of the packs", cure="use N/M, such as 1/7, or a percentage, such as 5%")

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.percent else f"{self.part}/{self.parts}"

    def chosen(self, packs: Collection[bytes]) -> set[bytes]:
        """Those of `packs` that belong to it; at least one by a percentage, where there are any."""
        if self.percent:
            count = min(len(packs), max(1, round(len(packs) * self.percent / 100)))
            return set(random.SystemRandom().sample(sorted(packs), count))
        return {pack for pack in packs if int.from_bytes(pack[:8], "big") % self.parts == self.part - 1}
