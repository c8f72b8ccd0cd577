"""A connection to libvirt and one domain of it, with the events that it sends: opened, and closed, as a whole."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from vmsnap.errors import HypervisorError, VmsnapError
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress
from vmsnap_drivers.qemu.libvirt.calls import CALL_SECONDS, Unreachable, binding, within
from vmsnap_drivers.qemu.libvirt.events import start_event_loop

OPEN_SECONDS: Final = 10.0
_KEEPALIVE_SECONDS: Final = 5
_KEEPALIVE_COUNT: Final = 3
_BARRIER: Final = "urn:vmsnap:barrier"


def open_connection(uri: str) -> Any:
    """A `virConnect`, which notices within 20 s when its libvirtd hangs.

    :raises Unreachable: nobody answers there
    :raises UsageError: the URI is wrong, or this user is not admitted
    :raises DriverUnavailable: the binding is not installed
    """
    lib = binding()
    start_event_loop(lib)
    connection = within(OPEN_SECONDS, f"libvirt at {uri!r} cannot be reached", lambda: lib.open(uri))
    with suppress(lib.libvirtError):  # not all connections can, such as test:///default
        connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
    return connection


class Link:
    """One connection. Once it is `lost` (or the domain has ended) it stays so, and another is opened.

    :param on_event: is given name, data and time of each of QEMU's events, by libvirt's thread
    :param on_end: is called, by libvirt's thread, when the connection is lost or the domain has ended
    :ivar lost: libvirtd hung up
    :ivar ended: why the domain is not here any more; empty while it is
    """

    def __init__(
        self,
        address: LibvirtAddress,
        on_event: Callable[[str, dict[str, Any], int], None],
        on_end: Callable[[], None],
    ) -> None:
        """Connect.

        :raises UnknownVm: there is no such domain
        :raises VmsnapError: what `open_connection` raises
        """
        import libvirt_qemu

        self._lib = binding()
        self._what = f"domain {address.uuid} at {address.uri}"
        self._on_event, self._on_end = on_event, on_end
        self._passed = threading.Condition()
        self._tickets = 0
        self._seen = 0
        self._key = f"{_BARRIER}:{secrets.token_hex(8)}"
        self.lost = False
        self.ended = ""
        self._is_closed = False
        self._registered: list[Callable[[], object]] = []
        self._connection = open_connection(address.uri)
        try:
            self.domain = self._call(
                "it cannot be looked up", lambda: self._connection.lookupByUUIDString(address.uuid)
            )
            self._call("its events cannot be had", lambda: self._subscribe(libvirt_qemu))
        except BaseException:
            self.close()
            raise

    def command(self, command: str, arguments: object, descriptors: Sequence[int], seconds: float) -> dict[str, Any]:
        """QEMU's answer to a QMP command, errors included.

        :raises Unreachable: libvirtd hung up or did not answer; the command may have been carried out
        """
        import libvirt_qemu

        message: dict[str, object] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        text = json.dumps(message)

        def send() -> str:
            if descriptors:
                answer, _ = libvirt_qemu.qemuMonitorCommandWithFiles(self.domain, text, list(descriptors), 0)
                return str(answer)
            return str(libvirt_qemu.qemuMonitorCommand(self.domain, text, 0))

        answer = json.loads(self._call(f"{command} was not carried out", send, seconds))
        if not isinstance(answer, dict):
            raise HypervisorError(f"{self._what} answered {command} with {answer!r}")
        return answer

    def await_events(self) -> None:
        """Return when all events have come that QEMU sent before its last answer to us. Takes about 0.6 ms.

        libvirtd queues all its events in one order, and sends answers beside it. So one more is put behind those that
        are on their way: the event of a change of metadata, namely that an element of ours is removed, which never
        was (``qemuDomainSetMetadata``, ``src/qemu/qemu_driver.c``, 9.0).

        :raises Unreachable: libvirtd hung up, or is too slow
        """
        lib = self._lib
        with self._passed:
            self._tickets += 1
            ticket = self._tickets
        kind, where = lib.VIR_DOMAIN_METADATA_ELEMENT, lib.VIR_DOMAIN_AFFECT_LIVE
        key = f"{self._key}:{ticket}"
        self._call("its events cannot be had", lambda: self.domain.setMetadata(kind, None, None, key, where))
        with self._passed:
            came = self._passed.wait_for(lambda: self._seen >= ticket or self.lost or self.ended, CALL_SECONDS)
        if self.lost or not came:
            raise Unreachable(f"libvirt hung up: {self._what}", cure="see whether libvirtd runs")

    def close(self) -> None:
        """Disconnect; idempotent, and given up when libvirtd hangs. Nothing is told any more."""
        self._is_closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(VmsnapError):
                within(OPEN_SECONDS, "closing", lambda: self._disconnect(connection))

    def _disconnect(self, connection: Any) -> None:
        # What is registered holds the connection open, whose events another link would get once more.
        while self._registered:
            with suppress(self._lib.libvirtError):  # it is broken: nothing comes from it
                self._registered.pop()()
        connection.close()

    def _subscribe(self, libvirt_qemu: Any) -> None:
        lib, connection = self._lib, self._connection
        connection.registerCloseCallback(self._closed, None)
        self._registered.append(connection.unregisterCloseCallback)
        number = libvirt_qemu.qemuMonitorEventRegister(connection, self.domain, None, self._told, None, 0)
        self._registered.append(partial(libvirt_qemu.qemuMonitorEventDeregister, connection, number))
        for kind, callback in (
            (lib.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._metadata_changed),
            (lib.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._life_changed),
        ):
            number = connection.domainEventRegisterAny(self.domain, kind, callback, None)
            self._registered.append(partial(connection.domainEventDeregisterAny, number))

    def _call(self, what: str, call: Callable[[], Any], seconds: float = CALL_SECONDS) -> Any:
        if self.lost:
            raise Unreachable(f"libvirt hung up: {self._what}", cure="see whether libvirtd runs")
        try:
            return within(seconds, f"{self._what}: {what}", call)
        except Unreachable:
            self._set_lost()
            raise

    # -- called by libvirt's thread

    def _told(self, _: Any, __: Any, name: str, seconds: int, micros: int, details: str | None, ___: Any) -> None:
        if self._is_closed:
            return
        self._on_event(name, json.loads(details) if details else {}, seconds * 10**9 + micros * 1000)

    def _metadata_changed(self, _: Any, __: Any, ___: int, key: str | None, ____: Any) -> None:
        ours, _, ticket = (key or "").rpartition(":")
        if ours == self._key:
            with self._passed:
                self._seen = max(self._seen, int(ticket))
                self._passed.notify_all()

    def _life_changed(self, _: Any, __: Any, event: int, detail: int, ___: Any) -> None:
        lib = self._lib
        if event in (lib.VIR_DOMAIN_EVENT_STOPPED, lib.VIR_DOMAIN_EVENT_CRASHED):
            why = {
                lib.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: "was migrated",
                lib.VIR_DOMAIN_EVENT_STOPPED_SAVED: "was saved",
            }
            self._end(why.get(detail, "ended"))

    def _closed(self, *_: Any) -> None:
        self._set_lost()

    def _set_lost(self) -> None:
        self.lost = True
        self._tell_end()

    def _end(self, why: str) -> None:
        self.ended = why
        self._tell_end()

    def _tell_end(self) -> None:
        with self._passed:
            self._passed.notify_all()
        self._on_end()
