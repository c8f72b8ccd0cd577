"""How reports look to people: aligned tables, sizes and times. JSON has plain bytes, seconds and UTC instead."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

import click


def size(count_bytes: int | float) -> str:
    """Bytes for people: ``512 B``, ``64.0 MiB``."""
    amount = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def milliseconds(seconds: float | None) -> str:
    """A pause for people; a dash where there was none."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def duration(seconds: float) -> str:
    """A time span for people: ``42 s``, ``3.5 min``, ``12.0 h``, ``2.0 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def local_time(utc: str) -> str:
    """A UTC time (RFC 3339) in the local time zone, ISO 8601; as it is where it cannot be read."""
    try:
        return datetime.fromisoformat(utc).astimezone().isoformat(sep=" ", timespec="seconds")
    except ValueError:
        return utc


def utc_time(wall_ns: int) -> str:
    """Nanoseconds since 1970 as UTC time, RFC 3339, to the microsecond."""
    return f"{datetime.fromtimestamp(wall_ns / 1e9, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, right: Collection[str] = ()) -> None:
    """Write an aligned table; the columns headed as in `right` are right-aligned."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max([_width(heading), *(_width(row[i]) for row in cells)]) for i, heading in enumerate(headings)]

    def line(row: Sequence[str]) -> str:
        parts = []
        for heading, cell, width in zip(headings, row, widths, strict=True):
            room = " " * (width - _width(cell))
            parts.append(room + cell if heading in right else cell + room)
        return "  ".join(parts).rstrip()

    click.echo(click.style(line(list(headings)), bold=True))
    for row in cells:
        click.echo(line(row))


def fields(pairs: Sequence[tuple[str, object]]) -> None:
    """Write names and values, one pair a line, the values aligned."""
    width = max(_width(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {printable(str(value))}".rstrip())


def printable(text: str) -> str:
    """`text` without control characters: names from outside must not drive the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
