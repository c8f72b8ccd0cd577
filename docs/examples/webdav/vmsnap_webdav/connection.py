"""HTTP to one server: a connection a thread, and its failures told apart."""

from __future__ import annotations

import base64
import contextlib
import http.client
import netrc
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from vmsnap.errors import StorageError, StorageFull, TransientStorageError, UsageError

_IDLE_SECONDS = 2.0
"""Servers end a connection that is not used, after 5 s and more: one that could be dead is not used again."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Answer:
    """What the server said. `size_bytes` is the ``Content-Length``, of the whole object where it was HEAD."""

    status: int
    body: bytes
    size_bytes: int


class Connections:
    """Connections to the server of one URL; may be used by several threads."""

    def __init__(self, url: str, scheme: str, timeout_seconds: float, ca: str | None) -> None:
        """No I/O.

        :raises UsageError: the URL names no server, or holds a password
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as e:
            raise UsageError(f"the URL is none: {e}", cure=f"such as {scheme}://host:8080/backups") from None
        if parts.scheme != scheme or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"{url!r} names no WebDAV server", cure=f"such as {scheme}://host:8080/backups")
        if parts.username is not None or parts.password is not None:
            raise UsageError("the URL holds a user or a password", cure="put them into ~/.netrc")
        self.folder = quote(unquote(parts.path.rstrip("/")))
        self._host, self._port, self._tls = parts.hostname, port, scheme.endswith("s")
        self._timeout_seconds, self._ca = timeout_seconds, ca
        self._of_thread = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    @property
    def _where(self) -> str:
        return f"{self._host}:{self._port}" if self._port else self._host

    def absolute(self, path: str) -> str:
        """The URL that the server itself has for a path."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}{f':{self._port}' if self._port else ''}{path}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | bytearray | memoryview | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        expected: tuple[int, ...] | None,
    ) -> Answer:
        """Send one request and read the whole answer. Blocks for the time-out at most at every step.

        :param expected: the statuses that are returned; None: any, and a failure is one as well
        :raises StorageFull: 507
        :raises TransientStorageError: no answer, or one that may be another next time
        :raises StorageError: another status
        """
        try:
            answer = self._send(method, path, body, {**self._authorization(), **(headers or {})})
        except (OSError, http.client.HTTPException) as e:
            self._drop()
            if expected is None:
                return Answer(0, b"", 0)
            why = str(e) or type(e).__name__
            if isinstance(e, ssl.SSLCertVerificationError):
                raise StorageError(f"{method} {path} on {self._where}: {why}", cure="see the option ca") from e
            raise TransientStorageError(f"{method} {path} on {self._where}: {why}") from e
        if expected is None or answer.status in expected:
            return answer
        raise self._error(f"{method} {path} on {self._where}: HTTP {answer.status}", answer.status)

    def _send(
        self, method: str, path: str, body: bytes | bytearray | memoryview | None, headers: Mapping[str, str]
    ) -> Answer:
        connection = self._connection()
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        content = response.read()
        self._of_thread.used = time.monotonic()
        return Answer(response.status, content, int(response.headers.get("Content-Length") or 0))

    def _connection(self) -> http.client.HTTPConnection:
        found: http.client.HTTPConnection | None = getattr(self._of_thread, "connection", None)
        if found is not None and time.monotonic() - self._of_thread.used > _IDLE_SECONDS:
            found.close()  # it connects anew when it is used
        if found is None:
            found = self._new()
            self._of_thread.connection = found
            with self._lock:
                self._all.append(found)
        self._of_thread.used = time.monotonic()
        return found

    def _new(self) -> http.client.HTTPConnection:
        if not self._tls:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_seconds)
        context = ssl.create_default_context(cafile=self._ca)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_seconds, context=context)

    def _authorization(self) -> dict[str, str]:
        try:
            known = netrc.netrc(Path.home() / ".netrc").authenticators(self._host)
        except FileNotFoundError:
            return {}
        except netrc.NetrcParseError as e:
            raise UsageError(f"~/.netrc cannot be read, line {e.lineno}") from None
        if known is None:
            return {}
        if not self._tls and self._host not in _LOOPBACK:
            raise UsageError(f"{self._host} would get the password without TLS", cure="use webdavs://")
        user, _, password = known
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}

    @staticmethod
    def _error(message: str, status: int) -> StorageError:
        if status == 507:
            return StorageFull(message, cure="free some room on the server")
        if status in (401, 403):
            return StorageError(message, cure="see the rights there, and the user and password in ~/.netrc")
        if status in (408, 423, 429) or status >= 500:
            return TransientStorageError(message, overloaded=status in (429, 503))
        return StorageError(message)

    def _drop(self) -> None:
        """The connection of this thread is in no state to be used again."""
        found: http.client.HTTPConnection | None = getattr(self._of_thread, "connection", None)
        if found is not None:
            found.close()

    def interrupt(self) -> None:
        """What waits for the server, in any thread, fails now."""
        with self._lock:
            for connection in self._all:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):  # it ended by itself
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End all connections; idempotent."""
        with self._lock:
            while self._all:
                self._all.pop().close()
