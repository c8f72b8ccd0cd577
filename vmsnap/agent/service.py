"""The agent as a whole: the loop in the main thread, the servers and the notices in threads of their own."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import FrameType

from vmsnap.agent.api.context import Context
from vmsnap.agent.house import Blueprint
from vmsnap.agent.loop import Loop
from vmsnap.agent.notices import Notices
from vmsnap.agent.sdnotify import notify
from vmsnap.agent.serving import Servers
from vmsnap.database import FILE_NAME, Database
from vmsnap.durable import make_folder
from vmsnap.errors import Busy, VmsnapError

_NOTICES_EACH_SECONDS = 5.0


class Service:
    """One for each state folder. `say` takes a line for the log."""

    def __init__(self, blueprint: Blueprint, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._blueprint = blueprint
        self._environment = environment
        self._say = say
        self._turned = time.monotonic()
        self._ended = threading.Event()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Jobs that run then go on without us, and the next agent finds them.

        :raises Busy: there is an agent for this state folder already
        :raises VmsnapError: the state or a socket cannot be used
        """
        with ExitStack() as stack:
            self._hold_lock(stack)
            loop = Loop(self._blueprint, self._environment, self._say)
            stack.callback(loop.close)
            context = Context(self._blueprint, loop.wake, loop.cancel, lambda: time.monotonic() - self._turned)
            path = self._blueprint.settings.socket or self._blueprint.state_dir / "agent" / "agent.sock"
            servers = Servers(context, self._blueprint.settings, path)
            stack.callback(servers.stop)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: _stop(loop, _number, _frame))
            servers.start()
            teller = threading.Thread(target=self._tell, name="vmsnap-notices", daemon=True)
            teller.start()
            stack.callback(self._ended.set)
            for address in servers.addresses:
                self._say(f"serving on {address}")
            notify("READY=1")
            loop.run(lambda: self._alive(servers))
            notify("STOPPING=1")
            self._say("stopping")

    def _alive(self, servers: Servers) -> None:
        self._turned = time.monotonic()
        if not servers.alive():
            raise VmsnapError("a server of the agent has ended", cure="see its log; systemd starts it again")
        notify("WATCHDOG=1")

    def _hold_lock(self, stack: ExitStack) -> None:
        make_folder(self._blueprint.state_dir / "agent")
        path = self._blueprint.state_dir / "agent" / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"there is an agent for {self._blueprint.state_dir} already", cure="see: systemctl status vmsnap-agent"
            ) from None

    def _tell(self) -> None:
        database = Database(self._blueprint.state_dir / FILE_NAME)
        notices = Notices(database, self._blueprint.settings.notify, self._say)
        while not self._ended.is_set():
            try:
                due = notices.deliver()
            except VmsnapError as e:
                self._say(f"notices: {e}")
                due = None
            self._ended.wait(_NOTICES_EACH_SECONDS if due is None else min(due, _NOTICES_EACH_SECONDS))
        database.close()


def _stop(loop: Loop, _number: int, _frame: FrameType | None) -> None:
    loop.stop()
