"""Some connections to one server, for the threads of one backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

from vmsnap_storage_backends.sftp.connection import Connection
from vmsnap_storage_backends.sftp.conversation import Conversation, Lost
from vmsnap_storage_backends.sftp.wire import Malformed

# Connections hide the way to the server and back. From one that is near, two bring as much as this process can take:
# with more, their threads only wait for each other's turn of the interpreter (a tenth slower with four).
_NEAR_SECONDS = 0.002
_NEAR_CONNECTIONS = 2


class Pool:
    """Lends conversations to threads, each to one at a time; those that wait get one when it comes back."""

    def __init__(self, connect: Callable[[], Connection], most: int) -> None:
        """:param most: connections at the same time; with a server that turns out to be near, two are enough"""
        self._connect = connect
        self._most = most
        self._changed = Condition()
        self._idle: list[Connection] = []
        self._busy: list[Connection] = []
        self._lent = 0
        self._closed = False

    @contextmanager
    def conversation(self) -> Iterator[Conversation]:
        """A conversation for the time of a ``with``: one that is idle, a new one, or one that comes back. Blocks.

        :raises Lost: the connection broke, or none comes about now
        :raises VmsnapError: what `connect` raises
        """
        connection = self._borrow()
        try:
            yield connection.talk
        except Malformed as e:
            connection.talk.lost = True
            raise Lost(str(e)) from e
        except Lost:
            connection.talk.lost = True
            raise
        except BaseException as e:
            # Whatever was interrupted, answers to it may still come; refusals have all theirs.
            connection.talk.lost = connection.talk.lost or not isinstance(e, Exception)
            raise
        finally:
            self._give_back(connection)

    def close(self) -> None:
        """Close all connections; those that are lent, when they come back. Idempotent."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def interrupt(self) -> None:
        """Close the connections that are lent: whoever waits for the server gets `Lost`."""
        with self._changed:
            busy = list(self._busy)
        for connection in busy:
            connection.close()

    def _borrow(self) -> Connection:
        broken: list[Connection] = []
        try:
            with self._changed:
                while self._lent >= self._most:
                    self._changed.wait()
                self._lent += 1
                while self._idle:
                    connection = self._idle.pop()
                    if connection.is_usable():
                        self._busy.append(connection)
                        return connection
                    broken.append(connection)
        finally:
            for connection in broken:
                connection.close()
        try:
            connection = self._connect()
        except BaseException:
            with self._changed:
                self._lent -= 1
                self._changed.notify()
            raise
        with self._changed:
            self._busy.append(connection)
            answered = connection.talk.answer_seconds
            if answered is not None and answered < _NEAR_SECONDS:
                self._most = min(self._most, _NEAR_CONNECTIONS)
        return connection

    def _give_back(self, connection: Connection) -> None:
        with self._changed:
            self._lent -= 1
            self._busy.remove(connection)
            keep = not self._closed and connection.is_usable()
            if keep:
                self._idle.append(connection)
            self._changed.notify()
        if not keep:
            connection.close()
