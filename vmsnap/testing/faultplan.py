"""Which calls of drivers fail, how, and what was called so far; `vmsnap.testing.faults` wraps drivers in it."""

from __future__ import annotations

import enum
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from vmsnap.errors import VmsnapError

P = ParamSpec("P")
T = TypeVar("T")

HANG_SECONDS = 60.0
SLOW_SECONDS = 2.0


class Effect(enum.Enum):
    """What a planned fault does."""

    BEFORE = "before"
    """Raises; the driver was not called."""
    AFTER = "after"
    """Calls the driver, then raises: it was done, the answer is lost."""
    HANG = "hang"
    """Does not return until the plan is released or its time is over, then raises; the driver was not called."""
    HANG_AFTER = "hang-after"
    """The same, after the driver was called."""
    SLOW = "slow"
    """Waits the plan's `slow_seconds`, then calls the driver; all is right but the time."""
    SLOW_AFTER = "slow-after"
    """The same, waiting after the driver was called."""
    KILL = "kill"
    """Kills this process; the driver was not called."""
    KILL_AFTER = "kill-after"
    """Kills this process after the driver was called."""


_DONE_FIRST = frozenset({Effect.AFTER, Effect.HANG_AFTER, Effect.SLOW_AFTER, Effect.KILL_AFTER})
_SLOW = frozenset({Effect.SLOW, Effect.SLOW_AFTER})


@dataclass(frozen=True)
class Fault:
    """Call number `number` (the first is 1) of `method` shows `effect`. `error` is raised instead of the role's own."""

    method: str
    number: int
    effect: Effect
    error: VmsnapError | None = None


class FaultPlan:
    """Which calls fail, and what was called so far. Several threads may use it."""

    def __init__(self, *faults: Fault, hang_seconds: float = HANG_SECONDS, slow_seconds: float = SLOW_SECONDS) -> None:
        """Plan these faults."""
        self._faults = {(fault.method, fault.number): fault for fault in faults}
        self._hang_seconds, self._slow_seconds = hang_seconds, slow_seconds
        self._released, self._lock = threading.Event(), threading.Lock()
        self.counts: Counter[str] = Counter()
        """How often each method was called."""
        self.calls: list[str] = []
        """The methods that were called, in order."""
        self.struck: list[Fault] = []
        """The faults that came true, in order."""

    def release(self) -> None:
        """Let calls that hang go on (they raise), and slow ones, now and later."""
        self._released.set()

    def count(self, method: str) -> Fault | None:
        """Count one call of `method`; returns the fault planned for it."""
        with self._lock:
            self.counts[method] += 1
            self.calls.append(method)
            fault = self._faults.get((method, self.counts[method]))
            if fault is not None:
                self.struck.append(fault)
            return fault

    def strike(self, fault: Fault, default: type[VmsnapError]) -> VmsnapError:
        """Do what the fault does; returns the error to be raised, where this process lives on."""
        if fault.effect in (Effect.KILL, Effect.KILL_AFTER):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.effect in (Effect.HANG, Effect.HANG_AFTER):
            self._released.wait(self._hang_seconds)
        return fault.error or default(f"injected fault: {fault.effect.value} {fault.method} number {fault.number}")

    def call(
        self, default: type[VmsnapError], method: str, target: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `target` as one call of `method`, with the fault planned for it.

        :raises VmsnapError: the fault's, `default` where it names none; else what the driver raises
        """
        fault = self.count(method)
        if fault is not None and fault.effect not in _DONE_FIRST:
            self.apply(fault, default)
        result = target(*args, **kwargs)
        if fault is not None and fault.effect in _DONE_FIRST:
            self.apply(fault, default)
        return result

    def iterate(self, default: type[VmsnapError], method: str, target: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Yield what `target` yields, as one call of `method`: the fault strikes when the first is asked for, or after
        the last.

        :raises VmsnapError: see `call`
        """
        fault = self.count(method)
        if fault is not None and fault.effect not in _DONE_FIRST:
            self.apply(fault, default)
        yield from target()
        if fault is not None and fault.effect in _DONE_FIRST:
            self.apply(fault, default)

    def apply(self, fault: Fault, default: type[VmsnapError]) -> None:
        """Let a fault come true, now.

        :raises VmsnapError: see `call`; a slow call raises nothing
        """
        if fault.effect in _SLOW:
            self.dawdle(fault)
        else:
            raise self.strike(fault, default)

    def dawdle(self, fault: Fault) -> None:
        """Wait as the slow `fault` does."""
        self._released.wait(self._slow_seconds)


def single_faults(counts: Mapping[str, int], effects: Iterable[Effect]) -> Iterator[Fault]:
    """Every single fault that a run with these calls can show, in a fixed order."""
    chosen = tuple(effects)
    for method in sorted(counts):
        for number in range(1, counts[method] + 1):
            for effect in chosen:
                yield Fault(method, number, effect)
