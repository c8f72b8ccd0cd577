"""`Monitor`: the one QMP connection of this process to a QEMU, shared by all drivers that need it.

A QMP socket serves one client at a time, and both the hypervisor driver and the block layer's snapshot mechanism work
through it. So a connection belongs to the process, and drivers *borrow* it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vmsnap_drivers.qemu.libvirt.address import is_libvirt_address
from vmsnap_drivers.qemu.libvirt.connection import LibvirtConnection
from vmsnap_drivers.qemu.monitor_connection import Event, MonitorConnection, MonitorError
from vmsnap_drivers.qemu.qmp_connection import QmpConnection

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "Event", "Monitor", "MonitorError"]

DEFAULT_TIMEOUT_SECONDS: Final = 30.0


class Monitor:
    """One borrower's hold on the connection to a QEMU; made by :meth:`borrow`.

    Every call may come from any thread, and several at once. Every call raises `VmGone` once the QEMU has ended, and
    none waits longer than its time-out.
    """

    def __init__(self, connection: MonitorConnection) -> None:
        self._connection = connection
        self._given_back = False

    @classmethod
    def borrow(cls, path: str | Path) -> Monitor:
        """Take hold of this process's connection to the QMP socket `path`, and open it where there is none. Blocks
        for 3 s at most. Or, where `path` is the address of a libvirt domain (``libvirt:URI#UUID``), of that to libvirt;
        blocks for 20 s at most.

        :raises UnknownVm: there is no such socket, or domain
        :raises VmGone: nobody listens on it any more, or the domain does not run
        :raises Busy: it serves another client
        :raises UsageError: it is no QMP socket, or not open to this user
        :raises HypervisorError: libvirt does not answer
        """
        if is_libvirt_address(str(path)):
            return cls(LibvirtConnection.get(str(path)))
        return cls(QmpConnection.get(str(path)))

    def close(self) -> None:
        """Give the connection back; the last borrower's `close` disconnects. Idempotent."""
        if not self._given_back:
            self._given_back = True
            self._connection.give_back()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> str:
        """The socket."""
        return self._connection.path

    @property
    def address(self) -> str:
        """What another process borrows it by."""
        return self._connection.address

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, such as ``(7, 2, 22)``."""
        return self._connection.version

    @property
    def peer_pid(self) -> int:
        """The process that made the socket listen: QEMU, unless somebody handed it a listening socket."""
        return self._connection.peer_pid

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> Any:
        """Carry out a command and return its result. A round trip takes about 0.1 ms.

        :raises MonitorError: QEMU answered with an error
        :raises VmGone: QEMU ended; the command may have been carried out or not
        :raises HypervisorError: no answer in time; the command may still be carried out later
        """
        return self._connection.execute(command, arguments, (), timeout_seconds)

    def execute_all(
        self,
        commands: Sequence[tuple[str, Mapping[str, object] | None]],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> list[Any]:
        """Carry out some commands (at most 8, as many as QEMU queues), one after the other, in one round trip; return
        their results. One that fails does not keep the later ones from being carried out.

        Raises what `execute` raises, for the first that failed.
        """
        return self._connection.execute_all(commands, (), timeout_seconds)

    def execute_with_descriptor(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        descriptor: int,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> Any:
        """Carry out a command that takes a file descriptor (``getfd``, ``add-fd``). QEMU gets a duplicate of it.

        Raises what :meth:`execute` raises.
        """
        return self._connection.execute(command, arguments, (descriptor,), timeout_seconds)

    def send_descriptor(self, name: str, descriptor: int) -> None:
        """Hand `descriptor` to QEMU under `name`, to be used as ``fd:NAME``. QEMU gets a duplicate of it.

        Raises what :meth:`execute` raises.
        """
        self.execute_with_descriptor("getfd", {"fdname": name}, descriptor)

    def mark(self) -> int:
        """Return the present point in the sequence of events, for `wait_for_event` and `events_since`.

        Events that QEMU has sent by now count as before it.
        """
        return self._connection.mark()

    def wait_for_event(
        self,
        names: str | Collection[str],
        *,
        since: int = 0,
        timeout_seconds: float,
        match: Callable[[Event], bool] | None = None,
    ) -> Event:
        """Return the first event after the point `since` that has one of the names and for which `match` holds.
        Blocks.

        :raises VmGone: QEMU ended before
        :raises HypervisorError: no such event in time
        """
        wanted = {names} if isinstance(names, str) else set(names)
        return self._connection.wait_for_event(wanted, since, timeout_seconds, match)

    def events_since(self, mark: int) -> list[Event]:
        """Return the events that came after the point `mark`, those that wait on the socket included. Does not
        block.
        """
        return self._connection.events_since(mark)
