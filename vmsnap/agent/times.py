"""Times as JSON has them."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_time(ns: int | None) -> str | None:
    """Nanoseconds since 1970 as UTC time, RFC 3339, to the microsecond; None stays so."""
    return None if ns is None else f"{datetime.fromtimestamp(ns / 1e9, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
