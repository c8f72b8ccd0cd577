"""Asks an agent, on this host by its UNIX socket or on another one over TLS: ``unix:/path`` or ``https://host:port``."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

from vmsnap.errors import (
    AlreadyExists,
    Busy,
    DamageFound,
    DriverUnavailable,
    NotFound,
    UsageError,
    VmsnapError,
)

_TIMEOUT_SECONDS = 60.0
_LARGEST_ANSWER_BYTES = 64 << 20
_LARGEST_LINE_BYTES = 4 << 20
_BY_EXIT_CODE: Mapping[int, type[VmsnapError]] = {
    2: UsageError,
    3: NotFound,
    4: DamageFound,
    5: Busy,
    6: DriverUnavailable,
}
_BY_STATUS: Mapping[int, type[VmsnapError]] = {
    400: UsageError,
    401: UsageError,
    403: UsageError,
    404: NotFound,
    409: AlreadyExists,
    422: UsageError,
}


class AgentClient:
    """One agent. Not shared between threads."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """No I/O. Over TLS the certificate is checked, by the system's authorities or those of ``SSL_CERT_FILE``.

        :raises UsageError: the URL is wrong, or a token is needed
        """
        self.url = url
        self._token = token
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise UsageError("the agent's URL has a password in it", cure="set VMSNAP_AGENT_TOKEN_FILE instead")
        if parts.scheme == "unix" and parts.path.startswith("/"):
            self._path = parts.path
        elif parts.scheme == "https" and parts.hostname and parts.path in ("", "/"):
            self._path = ""
            if not token:
                raise UsageError("a token is needed", cure="set VMSNAP_AGENT_TOKEN_FILE or VMSNAP_AGENT_TOKEN")
        else:
            raise UsageError(f"{url!r} is no agent's URL", cure="unix:/path/of/socket, or https://host:port")
        self._host, self._port = parts.hostname or "localhost", parts.port

    def get(self, path: str, **query: object) -> Any:
        """What the agent answers to GET ``/api/v1`` + `path`.

        :raises VmsnapError: it cannot be reached, or refuses
        """
        given = {key: value for key, value in query.items() if value not in (None, "")}
        return self._ask("GET", f"{path}?{urlencode(given)}" if given else path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers to POST. A key goes along, so that asking again after a lost answer is safe; that is done
        once.

        :raises VmsnapError: it cannot be reached, or refuses
        """
        key = secrets.token_hex(16)
        try:
            return self._ask("POST", path, body, key)
        except _Unreached:
            return self._ask("POST", path, body, key)

    def put(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers to PUT; see `get`."""
        return self._ask("PUT", path, body)

    def delete(self, path: str) -> None:
        """Send DELETE; see `get`."""
        self._ask("DELETE", path, None)

    def pages(self, path: str, cursor: str, **query: object) -> Iterator[dict[str, Any]]:
        """All items of a list, page by page; `cursor` is the parameter that takes ``next``.

        :raises VmsnapError: it cannot be reached, or refuses
        """
        following: object = None
        while True:
            page = self.get(path, **{**query, cursor: following, "limit": 500})
            yield from page["items"]
            following = page.get("next")
            if following is None:
                return

    def watch(self, job: int) -> Iterator[dict[str, Any]]:
        """A job, each time that something changes, until it has ended.

        :raises VmsnapError: the agent cannot be reached any more
        """
        with self._answer("GET", f"/jobs/{job}/events", None, {"Accept": "text/event-stream"}) as response:
            while True:
                line = response.readline(_LARGEST_LINE_BYTES)
                if not line:
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, key: str = "") -> Any:
        with self._answer(method, path, body, {"Idempotency-Key": key} if key else {}) as response:
            return json.loads(response.read(_LARGEST_ANSWER_BYTES) or b"null")

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, extra: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {"Accept": "application/json", **extra}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = self._connection()
        try:
            connection.request(method, f"/api/v1{path}", body=data, headers=headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise _refusal(response.status, response.read(_LARGEST_ANSWER_BYTES))
            yield response
        except ssl.SSLCertVerificationError as e:
            cure = "name its authority in SSL_CERT_FILE"
            raise VmsnapError(f"the agent at {self.url} cannot be trusted: {e.verify_message}", cure=cure) from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise _Unreached(f"the agent at {self.url} cannot be reached: {e}", cure="is it running?") from e
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._path:
            return _UnixConnection(self._path)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS, context=context)


class _Unreached(VmsnapError):
    """It cannot be reached: whether it has heard us is not known."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_SECONDS)
        self._socket_path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


def job_error(job: Mapping[str, Any]) -> VmsnapError:
    """The error that a job which ended otherwise than done means, with the exit code that the command had."""
    kind = _BY_EXIT_CODE.get(job["exit_code"] or 1, VmsnapError)
    return kind(job["message"] or f"job {job['job']} is {job['state']}")


def _refusal(status: int, body: bytes) -> VmsnapError:
    try:
        told = json.loads(body)
        message, cure = str(told["error"]), str(told["cure"])
    except (ValueError, KeyError, TypeError):
        message, cure = "", ""
    return _BY_STATUS.get(status, VmsnapError)(f"the agent refused: {message or status}", cure=cure)
