"""Small files in a driver's state folder: written whole or not at all, and read back strictly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from vmsnap.errors import HypervisorError
from vmsnap.model import from_json

T = TypeVar("T")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all; 0600."""
    new = path.with_name(f".{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_whole(path: Path, kind: type[T], what: str) -> T | None:
    """What was written there as JSON; None where nothing was.

    :param what: what the message calls it
    :raises HypervisorError: it is damaged
    """
    try:
        return from_json(path.read_text(), kind)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise HypervisorError(f"{what}, {path}, is damaged") from e
