"""Faults that a simulated VM shows on command, so that what is around it can be tested with the driver unchanged."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vmsnap.errors import HypervisorError


class Effect(enum.Enum):
    """What happens to a call."""

    FAIL = "fail"
    """It fails, and did nothing."""
    FAIL_AFTER = "fail-after"
    """It was done; the answer is an error."""
    HANG = "hang"
    """It is not done, and never answered."""
    HANG_AFTER = "hang-after"
    """It was done; no answer comes."""
    SLOW = "slow"
    """It is done so many seconds later."""
    DIE = "die"
    """The VM's process ends before doing it."""
    DIE_AFTER = "die-after"
    """The VM's process ends after doing it, before the answer."""
    IGNORE = "ignore"
    """`shut_down` only: the guest is asked and does not care."""


@dataclass
class Fault:
    """One armed fault; it works `times` times."""

    effect: Effect
    seconds: float
    times: int


class Injection:
    """The armed faults of one VM, one a call."""

    def __init__(self) -> None:
        """Nothing is armed."""
        self._armed: dict[str, Fault] = {}

    def arm(self, call: str, effect: str, seconds: float = 0.0, times: int = 1) -> None:
        """Let the next `times` calls of that name show the effect; `times` = 0 disarms.

        :raises HypervisorError: no such effect
        """
        try:
            fault = Fault(Effect(effect), float(seconds), int(times))
        except ValueError as e:
            raise HypervisorError(f"no such effect: {e}") from None
        self._armed.pop(call, None)
        if fault.times > 0:
            self._armed[call] = fault

    def take(self, call: str) -> Fault | None:
        """The fault that this call is to show, if any."""
        fault = self._armed.get(call)
        if fault is None:
            return None
        fault.times -= 1
        if fault.times == 0:
            del self._armed[call]
        return fault
