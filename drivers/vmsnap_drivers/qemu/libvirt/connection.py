"""`LibvirtConnection`: what stands behind a `Monitor` that goes by way of libvirt.

Commands go through ``virDomainQemuMonitorCommand`` (with descriptors: ``…WithFiles``, libvirt 8.2), events come by
``virConnectDomainQemuMonitorEventRegister``, with the times that QEMU wrote into them. libvirt calls both unsupported
and marks the domain as tainted; it follows what QEMU does (STOP, RESUME) all the same, so its state stays right. A
round trip takes 0.5 to 1.5 ms (2 cores, TCG), against 0.1 ms over a QMP socket.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from vmsnap.errors import HypervisorError, UnknownVm, VmGone
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress
from vmsnap_drivers.qemu.libvirt.calls import Unreachable
from vmsnap_drivers.qemu.libvirt.link import Link
from vmsnap_drivers.qemu.libvirt.process import find_qemu
from vmsnap_drivers.qemu.monitor_connection import Event, MonitorError, wall_ahead_ns

_EVENTS_KEPT: Final = 10_000
_OPEN_SECONDS: Final = 10.0
_ENDING_SECONDS: Final = 2.0


class LibvirtConnection:
    """What the borrowers share. When libvirtd hangs up, the call that was made fails, and the next one connects anew;
    as QEMU's events of the time between are lost, whoever asks for events since before gets an error.
    """

    _open: ClassVar[dict[tuple[int, str], LibvirtConnection]] = {}
    _open_lock = threading.Lock()

    def __init__(self, address: LibvirtAddress) -> None:
        self.path = self.address = address.text()
        self._parsed = address
        self._borrowers = 0
        self._linking = threading.RLock()
        self._link_now: Link | None = None
        self._changed = threading.Condition()
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._last_event = 0
        self._first_known = 0
        self._has_ended = False
        self._why_new = ""
        self._version: tuple[int, int, int] | None = None
        self._pid: int | None = None

    @classmethod
    def get(cls, text: str) -> LibvirtConnection:
        """The connection to a domain, opened where this process has none; one borrower more.

        :raises UnknownVm: there is no such domain
        :raises VmGone: it does not run
        :raises Unreachable: libvirtd does not answer
        """
        key = (os.getpid(), text)
        with cls._open_lock:
            known = cls._open.get(key)
            if known is None:
                known = cls(LibvirtAddress.parse(text))
            known._borrowers += 1
        try:
            known.execute("query-status", None, (), _OPEN_SECONDS)
        except BaseException:
            known.give_back()
            raise
        with cls._open_lock:
            cls._open[key] = known
        return known

    def give_back(self) -> None:
        """One borrower less; the last one disconnects."""
        with self._open_lock:
            self._borrowers -= 1
            if self._borrowers:
                return
            for key in [key for key, connection in self._open.items() if connection is self]:
                del self._open[key]
        with self._linking:
            if self._link_now is not None:
                self._link_now.close()
                self._link_now = None

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version."""
        if self._version is None:
            numbers = self.execute("query-version", None, (), _OPEN_SECONDS)["qemu"]
            self._version = (numbers["major"], numbers["minor"], numbers["micro"])
        return self._version

    @property
    def peer_pid(self) -> int:
        """QEMU's process.

        :raises CannotCapture: it does not run on this host
        """
        if self._pid is None:
            self._pid = find_qemu(self._parsed.uuid)
        return self._pid

    def execute(
        self, command: str, arguments: Mapping[str, object] | None, descriptors: Sequence[int], timeout_seconds: float
    ) -> Any:
        """See `Monitor.execute`."""
        link = self._link()
        try:
            answer = link.command(command, arguments, descriptors, timeout_seconds)
        except UnknownVm as e:
            # It was transient, and there when the link was opened.
            raise self._ended(link) from e
        except Unreachable:
            raise
        except HypervisorError as e:
            if self._is_ending(link, e.message):
                raise self._ended(link) from e
            raise
        if "error" in answer:
            raise MonitorError(command, answer["error"].get("class", ""), answer["error"].get("desc", ""))
        return answer["return"]

    def execute_all(
        self,
        commands: Sequence[tuple[str, Mapping[str, object] | None]],
        descriptors: Sequence[int],
        timeout_seconds: float,
    ) -> list[Any]:
        """See `Monitor.execute_all`; here each takes a round trip."""
        deadline = time.monotonic() + timeout_seconds
        results: list[Any] = []
        failures: list[MonitorError] = []
        for command, arguments in commands:
            try:
                results.append(self.execute(command, arguments, descriptors, max(0.0, deadline - time.monotonic())))
            except MonitorError as e:
                failures.append(e)
        if failures:
            raise failures[0]
        return results

    def mark(self) -> int:
        """See `Monitor.mark`."""
        self._await_events()
        return self._last_event

    def events_since(self, mark: int) -> list[Event]:
        """See `Monitor.events_since`; blocks for a round trip.

        :raises Unreachable: libvirtd hung up since
        """
        self._await_events()
        with self._changed:
            self._check_known(mark)
            return [event for event in self._events if event.number > mark]

    def wait_for_event(
        self, names: set[str], since: int, timeout_seconds: float, match: Callable[[Event], bool] | None
    ) -> Event:
        """See `Monitor.wait_for_event`.

        :raises Unreachable: libvirtd hung up
        """
        found: list[Event] = []
        seen = since

        def look() -> bool:
            nonlocal seen
            for event in list(self._events):
                if event.number > seen and event.name in names and (match is None or match(event)):
                    found.append(event)
                    return True
            seen = max(seen, self._last_event)
            return False

        with self._changed:
            # What has come already counts, also of a domain that has ended since.
            if look():
                return found[0]
        link = self._link()
        with self._changed:
            self._check_known(since)
            self._changed.wait_for(lambda: look() or link.lost or bool(link.ended), timeout_seconds)
        if found:
            return found[0]
        if link.ended:
            raise self._ended(link)
        if link.lost:
            raise Unreachable(f"libvirt hung up: {self.path}", cure="see whether libvirtd runs")
        raise HypervisorError(
            f"QEMU at {self.path} sent no event {' or '.join(sorted(names))} within {timeout_seconds:g} s"
        )

    def _await_events(self) -> None:
        link = self._link()
        try:
            link.await_events()
        except (UnknownVm, VmGone) as e:
            raise self._ended(link) from e

    def _check_known(self, mark: int) -> None:
        if mark < self._first_known:
            raise VmGone(self._why_new) if self._has_ended else Unreachable(self._why_new)

    def _is_ending(self, link: Link, message: str) -> bool:
        """Whether the domain has ended, or is about to: a QEMU that ends closes its monitor first ("Unable to read from
        monitor", "End of file from qemu monitor"), and libvirt tells of the end later.
        """
        if not link.ended and "monitor" in message:
            with self._changed:
                self._changed.wait_for(lambda: link.ended or link.lost, _ENDING_SECONDS)
        return bool(link.ended)

    def _ended(self, link: Link) -> VmGone:
        return VmGone(f"the domain behind {self.path} {link.ended or 'ended'}")

    def _link(self) -> Link:
        """The link, opened anew where it was lost, or the domain has ended since: it may have been started again.

        :raises VmGone: the domain has ended, and libvirt has forgotten it
        """
        with self._linking:
            link = self._link_now
            if link is not None and not link.lost and not link.ended:
                return link
            if link is not None:
                link.close()
                self._link_now = None
                self._forget(link)
            try:
                self._link_now = Link(self._parsed, self._take, self._wake)
            except UnknownVm as e:
                if self._has_ended:
                    raise VmGone(self._why_new) from e
                raise
            return self._link_now

    def _forget(self, link: Link) -> None:
        """No mark of before counts from now on."""
        self._pid = self._version = None
        self._has_ended = bool(link.ended)
        self._why_new = (
            f"the domain behind {self.path} {link.ended}"
            if link.ended
            else f"libvirt hung up meanwhile, and what QEMU told is lost: {self.path}"
        )
        with self._changed:
            self._last_event += 1
            self._first_known = self._last_event

    def _take(self, name: str, data: dict[str, Any], wall_ns: int) -> None:
        with self._changed:
            self._last_event += 1
            self._events.append(Event(name, data, wall_ns, wall_ns - wall_ahead_ns(), self._last_event))
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
