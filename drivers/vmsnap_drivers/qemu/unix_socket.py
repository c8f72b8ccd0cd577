"""Connects to UNIX sockets whose path is longer than the room for an address."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

_LONGEST_ADDRESS: Final = 107
"""unix(7): 108 bytes in ``sun_path``, the last of them zero."""


def connect_unix(client: socket.socket, path: Path) -> None:
    """Connect `client` to the socket at `path`, through its folder's descriptor where the path itself is too long.

    :raises OSError: it cannot be reached
    """
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        client.connect(str(path))
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        client.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
