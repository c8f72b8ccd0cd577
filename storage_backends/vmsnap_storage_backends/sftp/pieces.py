"""What a channel has received and nobody has read yet, kept in the pieces in which it came.

paramiko's own buffer copies each byte three times with the interpreter locked: into an array, out of it, and down to
its beginning. For a reader that takes all there is, nothing need be copied.
"""

from __future__ import annotations

from collections import deque
from threading import Condition, Event

from paramiko.buffered_pipe import PipeTimeout

_MOMENT_SECONDS = 0.005


class Pieces:
    """In place of a channel's buffer (paramiko's ``BufferedPipe``): its transport's thread fills it, another reads."""

    def __init__(self) -> None:
        """Empty, and open."""
        self._changed = Condition()
        self._pieces: deque[bytes] = deque()
        self._held_bytes = 0
        self._awaited_bytes = 1
        self._is_closed = False
        self._event: Event | None = None

    def set_event(self, event: Event) -> None:
        """Have an event set whenever there is something to read, or never will be again."""
        with self._changed:
            self._event = event
            self._tell()

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        with self._changed:
            self._pieces.append(data)
            self._held_bytes += len(data)
            self._tell()

    def gather(self, count: int) -> None:
        """Wait until so many bytes may be read, or they stop coming for a moment. Whoever will have need of them all
        so wakes once and not for every piece, which costs as much as the piece itself.
        """
        with self._changed:
            self._awaited_bytes = count
            while self._held_bytes < count and not self._is_closed:
                before = self._held_bytes
                self._changed.wait(_MOMENT_SECONDS)
                if self._held_bytes == before:
                    break
            self._awaited_bytes = 1

    def read_ready(self) -> bool:
        """Whether `read` need not wait for bytes."""
        return self._held_bytes > 0

    def read(self, nbytes: int, timeout: float | None = None) -> bytes:
        """The next piece, or so much of it; nothing when all was read and nothing more comes.

        :raises PipeTimeout: nothing came within so many seconds
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._held_bytes or self._is_closed, timeout):
                raise PipeTimeout
            if not self._held_bytes:
                return b""
            piece = self._pieces.popleft()
            if len(piece) > nbytes:
                self._pieces.appendleft(piece[nbytes:])
                piece = piece[:nbytes]
            self._held_bytes -= len(piece)
            self._tell()
            return piece

    def empty(self) -> bytes:
        """All that is there, which is then gone."""
        with self._changed:
            everything = b"".join(self._pieces)
            self._pieces.clear()
            self._held_bytes = 0
            self._tell()
            return everything

    def close(self) -> None:
        """Nothing more comes; idempotent."""
        with self._changed:
            self._is_closed = True
            self._tell()

    def __len__(self) -> int:
        """How many bytes may be read."""
        return self._held_bytes

    def _tell(self) -> None:
        if self._held_bytes >= self._awaited_bytes or self._is_closed:
            self._changed.notify_all()
        if self._event is not None:
            if self._held_bytes or self._is_closed:
                self._event.set()
            else:
                self._event.clear()
