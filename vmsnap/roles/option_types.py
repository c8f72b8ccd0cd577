"""What the value of a driver's option can be: text, a path, yes or no, a number, a size. Values are checked before a
driver is made, and read by the driver with the same type, so that what is declared and what is understood agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from vmsnap.errors import UsageError

T = TypeVar("T")

_WHOLE = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")
_SIZE = re.compile(r"([0-9]{1,15})\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class OptionType(Generic[T]):
    """A kind of values.

    `name` stands in ``vmsnap drivers show --json``, `metavar` in the help, and `meaning` completes "it is no …".
    `convert` makes a value of a text, and raises ValueError where it is none.
    """

    name: str
    metavar: str
    meaning: str
    convert: Callable[[str], T] = field(repr=False, compare=False)

    def read(self, text: str, option: str = "") -> T:
        """The value that `text` means, that of the `option` of this name where one is given.

        :raises UsageError: it means none
        """
        try:
            return self.convert(text)
        except ValueError:
            raise UsageError(f"{option}{'=' if option else ''}{text!r} is no {self.meaning}") from None


def whole_number(least: int = 0, most: int | None = None) -> OptionType[int]:
    """Whole numbers, written in decimal digits."""

    def convert(text: str) -> int:
        if not _WHOLE.fullmatch(text) or int(text) < least or (most is not None and int(text) > most):
            raise ValueError(text)
        return int(text)

    to = f"of at least {least}" if most is None else f"from {least} to {most}"
    return OptionType("whole number", "N", f"whole number {to}", convert)


def number(most: float, name: str = "number", metavar: str = "N") -> OptionType[float]:
    """Numbers above 0, written in decimal digits, with a point or without."""

    def convert(text: str) -> float:
        if not _NUMBER.fullmatch(text) or not 0 < float(text) <= most:
            raise ValueError(text)
        return float(text)

    of = "" if name == "number" else f" of {name}"
    return OptionType(name, metavar, f"number{of} above 0 and up to {most:g}", convert)


def seconds(most: float = 86400.0) -> OptionType[float]:
    """Numbers of seconds above 0."""
    return number(most, "seconds", "SECONDS")


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(text)
    return int(found[1]) * _FACTORS[(found[2] or "").upper()]


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(text)
    return Path(text)


def _yes_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(text)
    return text == "yes"


TEXT: OptionType[str] = OptionType("text", "TEXT", "text", str)
"""Anything."""
PATH: OptionType[Path] = OptionType("path", "PATH", "path", _path)
"""A path of this host; relative ones count from the folder in which vmsnap is called."""
YES_NO: OptionType[bool] = OptionType("yes or no", "yes|no", "yes or no", _yes_no)
"""``yes`` or ``no``; in the configuration file also true and false."""
SIZE: OptionType[int] = OptionType("size", "SIZE", "size such as 4096, 64M or 8GiB", _size)
"""Bytes: ``4096``, ``64M``, ``8GiB``; K, M, G and T are powers of 1024."""
