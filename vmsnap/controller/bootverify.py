"""Verify by booting: a backup is brought up out of everybody's reach, seen to live, shut down, and removed again."""

from __future__ import annotations

import time
from typing import Any

from vmsnap.controller.cleanrun import CleanRun
from vmsnap.controller.execution import Action
from vmsnap.controller.folders import make_standing
from vmsnap.controller.results import BootResult
from vmsnap.protocol import VERIFY_BOOT, Instruction


class BootVerification(CleanRun):
    """One such verification: the actions and compensations of the protocol `VERIFY_BOOT`."""

    protocol = VERIFY_BOOT

    def __init__(self, *arguments: Any, life_seconds: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._life_seconds = life_seconds
        self._life = ""

    def run(self) -> BootResult:
        """Carry it out. Blocks until the guest has shut down and everything is removed.

        :raises VmsnapError: the backup could not be brought up, showed no life, or did not shut down in order; nothing
            of it is left
        """
        begun = time.monotonic()
        context = self._drivers.context
        make_standing(context.folder_of_duplicate("any").parent)
        self._carry_out("verify", None)
        return BootResult(self._manifest.backup, self._life, time.monotonic() - begun, tuple(self._warnings))

    def _actions(self) -> dict[Instruction, Action]:
        return {**super()._actions(), Instruction.AWAIT_LIFE: self._await_life}

    def _await_life(self) -> str:
        self._life = self._running.hypervisor.await_life(self._life_seconds)
        return self._life

    def _release(self) -> None:
        super()._release()
        self._retrieval.remove_all()
