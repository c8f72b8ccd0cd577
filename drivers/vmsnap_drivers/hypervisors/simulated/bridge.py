"""The virtual bridge: a folder of UNIX datagram sockets, one a connected network interface.

A frame goes to every other socket in the folder; a full queue drops it, as a switch does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path


class BridgePort:
    """One network interface: plugged into a bridge, or not."""

    def __init__(self, vm: str, mac: str, bridge: Path, *, connected: bool) -> None:
        """Plug it in, unless not `connected`."""
        self.mac = mac
        self.bridge = bridge
        self.sent = 0
        self.received = 0
        self.socket: socket.socket | None = None
        self._vm = vm
        self._folder = -1
        if connected:
            self._plug_in()

    def _plug_in(self) -> None:
        self.bridge.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = os.open(self.bridge, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._vm, dir_fd=self._folder)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.socket.bind(self._address(self._vm))

    def _address(self, name: str) -> str:
        # A UNIX socket's address holds 107 bytes, whatever the folder's path is.
        return f"/proc/self/fd/{self._folder}/{name}"

    @property
    def connected(self) -> bool:
        """Whether a frame can pass."""
        return self.socket is not None

    def broadcast(self, counter: int) -> None:
        """Send one frame to everybody else on the bridge."""
        if self.socket is None:
            return
        frame = json.dumps({"vm": self._vm, "mac": self.mac, "counter": counter}).encode()
        for name in os.listdir(self.bridge):  # noqa: PTH208 - a string a call, a hundred times a second
            if name != self._vm:
                # gone, dead, or full: a switch drops the frame
                with contextlib.suppress(OSError):
                    self.socket.sendto(frame, self._address(name))
        self.sent += 1

    def receive(self) -> None:
        """Take in the frames that wait."""
        while self.socket is not None:
            try:
                self.socket.recv(4096)
            except BlockingIOError:
                return
            self.received += 1

    def cut(self) -> None:
        """Unplug it for good; idempotent."""
        if self.socket is None:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._vm, dir_fd=self._folder)
        self.socket.close()
        self.socket = None
        os.close(self._folder)
