"""Binds, and connects to, UNIX sockets whose path is longer than the room for an address."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_LONGEST_ADDRESS: Final = 107
"""unix(7): 108 bytes in ``sun_path``, the last of them zero."""


def connect_unix(client: socket.socket, path: Path) -> None:
    """Connect `client` to the socket at `path`, through its folder's descriptor where the path itself is too long.

    :raises OSError: it cannot be reached
    """
    with _short(path) as address:
        client.connect(address)


def bind_unix(server: socket.socket, path: Path) -> None:
    """Bind `server` to the socket at `path`, which is made.

    :raises OSError: it cannot be made
    """
    with _short(path) as address:
        server.bind(address)


@contextmanager
def _short(path: Path) -> Iterator[str]:
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
