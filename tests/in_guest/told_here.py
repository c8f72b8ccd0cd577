"""LIO told quickly, for tests that tell it hundreds of things: a Python takes a second to start in that guest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmsnap_drivers.snapshots.iscsi import lio_program
from vmsnap_drivers.snapshots.iscsi.lio import Lio


class ToldHere(Lio):
    """Its program runs in this process, not in one of its own; what it does to the real LIO is the same."""

    def _ask(self, operation: str, request: Mapping[str, Any], *, changes: bool) -> Mapping[str, Any]:
        return lio_program.answer(operation, dict(request))
