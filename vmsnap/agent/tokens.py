"""Tokens with which the API is used over TCP: kept as digests, so that the database gives nobody access."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from vmsnap.agent.times import utc_time
from vmsnap.database import Database
from vmsnap.errors import AlreadyExists, NotFound, UsageError
from vmsnap.model import check_name

READ = "read"
OPERATE = "operate"
ADMIN = "admin"
ROLES = (READ, OPERATE, ADMIN)
"""Each may do what those before it may."""

_PREFIX = "vmsnap_"


@dataclass(frozen=True)
class Token:
    """Whom a token names, and what they may do. Times are nanoseconds since 1970; `expires_ns` None: never."""

    name: str
    role: str
    created_ns: int = 0
    expires_ns: int | None = None

    def may(self, role: str) -> bool:
        """Whether what needs `role` is allowed to it."""
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_ns is not None and self.expires_ns <= time.time_ns()


class Tokens:
    """All tokens. Each change is one durable transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, name: str, role: str, lives_seconds: int | None = None) -> str:
        """Make a token and return it: it cannot be shown again. It has 256 random bits, so a plain digest hides it.

        :raises AlreadyExists: the name is taken
        :raises UsageError: name, role or time is wrong
        """
        check_name(name, "token name")
        if role not in ROLES:
            raise UsageError(f"{role!r} is no role", cure=f"one of: {', '.join(ROLES)}")
        if lives_seconds is not None and not 0 < lives_seconds <= 100 * 366 * 86400:
            raise UsageError("a token lives for a second at least", cure="such as --expires 90d")
        token = _PREFIX + secrets.token_urlsafe(32)
        now = time.time_ns()
        expires = None if lives_seconds is None else now + lives_seconds * 10**9
        with self._database.transaction() as db:
            if db.execute("SELECT 1 FROM token WHERE name = ?", (name,)).fetchone():
                raise AlreadyExists(f"there is a token named {name!r}", cure="choose another name, or remove it first")
            db.execute("INSERT INTO token VALUES (?, ?, ?, ?, ?)", (name, role, _digest(token), now, expires))
        return token

    def find(self, token: str) -> Token | None:
        """Whom a token names; None where it is unknown or its time is over."""
        # Looked up by digest: how long that takes tells nothing about tokens that there are.
        rows = self._database.rows("SELECT * FROM token WHERE digest = ?", _digest(token))
        found = _token(rows[0]) if rows else None
        return None if found is None or found.expired else found

    def rows(self) -> list[Token]:
        """All of them, by name, those whose time is over too."""
        return [_token(row) for row in self._database.rows("SELECT * FROM token ORDER BY name")]

    def remove(self, name: str) -> None:
        """Remove one; what is asked with it from now on is refused.

        :raises NotFound: there is none of that name
        """
        with self._database.transaction() as db:
            if not db.execute("DELETE FROM token WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"there is no token named {name!r}", cure="see: vmsnap agent token list")


def token_document(token: Token) -> dict[str, Any]:
    """A token as JSON shows it, without what it is."""
    return {
        "name": token.name,
        "role": token.role,
        "created": utc_time(token.created_ns),
        "expires": utc_time(token.expires_ns),
        "expired": token.expired,
    }


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _token(row: sqlite3.Row) -> Token:

    return Token(row["name"], row["role"], row["created_ns"], row["expires_ns"])
