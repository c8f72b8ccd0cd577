"""Who may ask: the guard in front of everything that is served.

Over TCP (always TLS) a token says who asks. Over the UNIX socket it is whoever may open it, which is its owner; but a
forwarded port makes a browser's requests arrive there too, so every request is looked at for what only another site's
page would send. There are no cookies: nothing that a browser adds by itself lets anybody in.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmsnap.agent.tokens import ADMIN, Token

LARGEST_BODY_BYTES = 1 << 20

_OPEN = ("/api/v1/health", "/api/v1/openapi.json")
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
        b" form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True)
class Door:
    """Where requests come in. `names` are the host names under which it may be asked, beside addresses; `trusted` says
    that who can reach it needs no token.
    """

    scheme: str
    names: frozenset[str]
    trusted: bool


class _Refused(Exception):
    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


class Guard:
    """ASGI middleware: refuses, or passes on with ``scope["state"]["caller"]``, a `Token` or None for nobody."""

    def __init__(self, app: ASGIApp, door: Door, find: Callable[[str], Token | None]) -> None:
        """:param find: finds the token that a text is; called in a thread"""
        self._app = app
        self._door = door
        self._find = find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        api = scope["path"].startswith(("/api/", "/metrics"))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                cache = ((b"cache-control", b"no-store" if api else b"no-cache"),)
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS, *cache]}
            await send(message)

        try:
            self._check_origin(scope["method"], headers)
            length = headers.get("content-length", "")
            if length.isdecimal() and int(length) > LARGEST_BODY_BYTES:
                raise _Refused(413, "that is too much")
            caller = await self._caller(headers)
            if caller is None and api and scope["path"] not in _OPEN:
                raise _Refused(401, "a token is needed")
        except _Refused as refused:
            await _answer(send_with_headers, refused)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, _limited(receive), send_with_headers)

    def _check_origin(self, method: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self._known_host(host):
            raise _Refused(421, "the agent is not called so; see 'names' in its settings")
        # A link from another site may open the page; nothing of that site may ask for more.
        opened = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opened:
            raise _Refused(403, "asked by another site")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"{self._door.scheme}://{host}", f"http://{host}", f"https://{host}"):
            raise _Refused(403, "asked by another site")
        if method in _SAFE or method == "DELETE":
            return
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "send application/json")

    def _known_host(self, text: str) -> bool:
        host = text.rpartition(":")[0] if ":" in text and not text.endswith("]") else text
        host = host.removeprefix("[").removesuffix("]").lower()
        if host in self._door.names:
            return True
        try:
            # A name can be made to mean another address after the page was loaded; an address cannot.
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    async def _caller(self, headers: dict[str, str]) -> Token | None:
        given = headers.get("authorization")
        if given is None:
            return Token("socket", ADMIN) if self._door.trusted else None
        kind, _, token = given.partition(" ")
        found = await run_in_threadpool(self._find, token.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise _Refused(401, "the token is unknown, or its time is over")
        return found


def _limited(receive: Receive) -> Receive:
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > LARGEST_BODY_BYTES:
            # As a client that went away: nobody builds up more than this in memory.
            return {"type": "http.disconnect"}
        return message

    return limited


async def _answer(send: Send, refused: _Refused) -> None:
    body = json.dumps({"error": refused.error, "cure": ""}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
