"""Tells systemd how the service does (sd_notify(3)): nothing where it was not systemd that started us."""

from __future__ import annotations

import os
import socket


def notify(text: str) -> None:
    """Send such as ``READY=1`` or ``WATCHDOG=1``. Does not block; what cannot be delivered is not."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address or address[0] not in "/@":
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
        try:
            sender.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            # A watchdog that hears nothing acts, which is its purpose.
            return


def passed_sockets() -> list[socket.socket]:
    """The listening sockets that systemd has opened for us (sd_listen_fds(3)); each call takes them away."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    found = []
    for fd in range(3, 3 + count):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found
