"""Ports of the loopback for servers that are told theirs, and open it some time later.

A port that the kernel gives out may be given to the next one who asks as soon as it is closed, or to a connection.
These lie below those that it gives out (ip(7), ``ip_local_port_range``), and each is this process's alone until it
ends: an abstract socket with its number, which no second one can have, says so to all others that take ports here.
"""

from __future__ import annotations

import random
import socket

ADDRESS = "127.0.0.1"
_RANGE = range(20000, 32000)
_held: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, all different.

    :raise OSError: there are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_RANGE, len(_RANGE)):
        if len(found) == count:
            return found
        if _take(port):
            found.append(port)
    raise OSError(f"there are no {count} free ports between {_RANGE.start} and {_RANGE.stop}")


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


def _take(port: int) -> bool:
    mark = socket.socket(socket.AF_UNIX)
    with socket.socket() as trial:
        try:
            mark.bind(f"\0vmsnap-lab-port-{port}")
            trial.bind((ADDRESS, port))
        except OSError:  # somebody has it
            mark.close()
            return False
    _held.append(mark)
    return True
