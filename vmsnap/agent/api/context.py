"""What the routes share: a house for each thread, the loop to wake, and who asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from fastapi.params import Depends

from vmsnap.agent.house import Blueprint, House
from vmsnap.agent.jobs import Job
from vmsnap.agent.tokens import Token

STREAMS_AT_ONCE = 64


@dataclass
class Context:
    """One for each agent. `wake` makes the loop look at the jobs, `cancel` asks a running one to stop, `loop_age` says
    how many seconds ago the loop went round.
    """

    blueprint: Blueprint
    wake: Callable[[], None]
    cancel: Callable[[Job], None]
    loop_age: Callable[[], float]
    stopping: threading.Event = field(default_factory=threading.Event)
    streams: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(STREAMS_AT_ONCE))
    _local: threading.local = field(default_factory=threading.local)

    def house(self) -> House:
        """The house of the calling thread, kept as long as that lives."""
        found: House | None = getattr(self._local, "house", None)
        if found is None:
            found = self._local.house = House(self.blueprint)
        return found


def context_of(request: Request) -> Context:
    """The context of the agent that serves a request."""
    found: Context = request.app.state.context
    return found


def caller_of(request: Request) -> Token:
    """Who asks.

    :raises HTTPException: nobody that is known
    """
    caller: Token | None = request.scope.get("state", {}).get("caller")
    if caller is None:
        raise HTTPException(401, "a token is needed")
    return caller


def require(request: Request, role: str) -> Token:
    """Who asks, if that may do what needs `role`.

    :raises HTTPException: it may not
    """
    caller = caller_of(request)
    if not caller.may(role):
        raise HTTPException(403, f"this needs the role {role}, and {caller.name} has {caller.role}")
    return caller


def needs(role: str) -> Depends:
    """A dependency of routes that need `role`."""

    async def check(request: Request) -> None:
        require(request, role)

    return Depends(check)
