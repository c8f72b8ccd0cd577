"""A bridge of this host's with a TAP for a guest, and who listens on it to the numbered packets of guests."""

import re
import socket
import subprocess
import threading
from types import TracebackType

_ALL_PROTOCOLS = 3  # ETH_P_ALL, packet(7)
_MAGIC = b"VMSNAPPK"


class Bridge:
    """Made by `with`, as root; gone afterwards. Notes the numbers of all packets of guest/programs/packets.c.

    Its names are short, unique to this process and `number`.
    """

    def __init__(self, number: int) -> None:
        """Nothing is made yet."""
        suffix = f"{threading.get_native_id() % 100000}.{number}"
        self.name = f"vsbr{suffix}"
        self.tap = f"vstap{suffix}"
        self.network = f"tap,ifname={self.tap},script=no,downscript=no,vhost=off"
        """For `LabMachine`."""
        self._socket: socket.socket | None = None
        self._numbers: list[int] = []
        self._thread = threading.Thread(target=self._listen, name=self.name, daemon=True)

    def __enter__(self) -> "Bridge":
        try:
            _ip("link", "add", self.name, "type", "bridge")
            # A host that asks for an address, or announces one, would be heard among the guests.
            _ip("link", "set", self.name, "addrgenmode", "none", "up")
            _ip("tuntap", "add", self.tap, "mode", "tap")
            _ip("link", "set", self.tap, "addrgenmode", "none", "master", self.name, "up")
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
            self._socket.bind((self.name, _ALL_PROTOCOLS))
            self._socket.settimeout(0.1)
        except BaseException:
            self._remove()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        listening, self._socket = self._socket, None
        self._thread.join()
        if listening is not None:
            listening.close()
        self._remove()

    def numbers(self) -> list[int]:
        """The numbers of the packets that came so far, in order."""
        return list(self._numbers)

    def repeated(self) -> set[int]:
        """Numbers that came more than once: two machines with the same memory were sending."""
        seen = self.numbers()
        return {number for number in seen if seen.count(number) > 1}

    def members(self) -> set[str]:
        """The interfaces on the bridge."""
        answer = subprocess.run(
            ["ip", "-o", "link", "show", "master", self.name], check=True, capture_output=True, text=True
        )
        return set(re.findall(r"^\d+: ([^:@]+)", answer.stdout, re.MULTILINE))

    def _listen(self) -> None:
        while (listening := self._socket) is not None:
            try:
                frame = listening.recv(2048)
            except TimeoutError:
                continue
            at = frame.find(_MAGIC)
            if at >= 0:
                self._numbers.append(int.from_bytes(frame[at + 8 : at + 16], "big"))

    def _remove(self) -> None:
        for interface in (self.tap, self.name):
            subprocess.run(["ip", "link", "del", interface], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
