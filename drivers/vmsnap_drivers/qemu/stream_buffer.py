"""A large reusable buffer between a descriptor and a parser: bytes come in by ``readv``, and are looked at in place."""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmsnap_drivers.qemu.stream_format import StreamError

# A parser that is called for each few KiB spends its time on being called. Where a writer has more to give at once,
# this much is gathered before anything is parsed.
_GATHER_BYTES: Final = 512 * 1024
_PIPE_BYTES: Final = 1024 * 1024


class StreamBuffer:
    """The unread bytes are ``data[begin:end]``, or ``view[begin:end]``; a parser looks at them and moves ``begin``.

    :param fd: pipe, UNIX socket or regular file, blocking or not; read from its present offset, never closed
    :param buffer_bytes: size of the buffer
    :param stall_timeout_seconds: longest time without a byte; ``None`` waits for ever
    :param on_progress: called after each read with the number of bytes read so far
    """

    def __init__(
        self,
        fd: int,
        *,
        buffer_bytes: int,
        stall_timeout_seconds: float | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.data = bytearray(buffer_bytes)
        self.begin = 0
        self.end = 0
        self.read_bytes = 0
        self._fd = fd
        self.view = memoryview(self.data)
        self._stall_timeout_seconds = stall_timeout_seconds
        self._on_progress = on_progress
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        kind = os.fstat(fd).st_mode
        self._may_block = not stat.S_ISREG(kind)
        if stat.S_ISFIFO(kind):
            _enlarge_pipe(fd)

    @property
    def position(self) -> int:
        """Offset in the stream of the next unread byte."""
        return self.read_bytes - (self.end - self.begin)

    def words_at_any_offset(self) -> npt.NDArray[np.uint64]:
        """The buffer as overlapping big-endian 64-bit words: item *i* begins at byte *i*."""
        return np.ndarray((len(self.data) - 7,), ">u8", self.data, 0, (1,))

    def pages_at_any_offset(self, page_bytes: int) -> npt.NDArray[Any]:
        """The buffer as overlapping pages: item *i* is the ``page_bytes`` bytes from byte *i* on."""
        return np.ndarray((len(self.data) - page_bytes + 1,), f"V{page_bytes}", self.data, 0, (1,))

    def need(self, count: int) -> None:
        """Have at least ``count`` unread bytes.

        :raises StreamError: when the stream ends before that, or stalls
        """
        while self.end - self.begin < count:
            if not self.fill():
                raise StreamError(f"the migration stream ends too early, after {self.read_bytes} bytes")

    def peek(self) -> int:
        """The next byte, which stays unread.

        :raises StreamError: when the stream ends before it, or stalls
        """
        self.need(1)
        return self.data[self.begin]

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes.

        :raises StreamError: when the stream ends before that, or stalls
        """
        self.need(count)
        begin = self.begin
        self.begin = begin + count
        return bytes(self.view[begin : begin + count])

    def take_number(self, count: int) -> int:
        """The next ``count`` bytes as one unsigned number."""
        return int.from_bytes(self.take(count), "big")

    def take_text(self, length_bytes: int, what: str) -> str:
        """A text of that length.

        :param what: what the text is, for the message
        :raises StreamError: when it is not UTF-8, or the stream ends before that, or stalls
        """
        text = self.take(length_bytes)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise StreamError(f"{what} at byte {self.position - length_bytes} of the stream is not a text") from error

    def unread(self) -> memoryview:
        """The unread bytes, in place: valid until the next read."""
        return self.view[self.begin : self.end]

    def fill(self) -> bool:
        """Read more, blocking until at least one byte is there.

        :return: False at the end of the stream
        :raises StreamError: when nothing comes for too long, or reading fails
        """
        if self.begin == self.end:
            self.begin = self.end = 0
        elif self.begin:
            length = self.end - self.begin
            self.data[:length] = self.data[self.begin : self.end]
            self.begin, self.end = 0, length
        if not self._read_once():
            return False
        while self._may_block and self.end - self.begin < min(_GATHER_BYTES, len(self.data)) and self._poll.poll(0):
            if not self._read_once():
                break
        if self._on_progress:
            self._on_progress(self.read_bytes)
        return True

    def _read_once(self) -> int:
        while True:
            if self._may_block and self._stall_timeout_seconds is not None:
                self._wait()
            try:
                count = os.readv(self._fd, [self.view[self.end :]])
            except BlockingIOError:
                self._wait()
                continue
            except OSError as error:
                raise StreamError(f"the migration stream cannot be read: {error.strerror}") from error
            self.end += count
            self.read_bytes += count
            return count

    def _wait(self) -> None:
        seconds = self._stall_timeout_seconds
        if not self._poll.poll(None if seconds is None else seconds * 1000):
            raise StreamError(f"the migration stream stands still since {seconds:g} s, at byte {self.read_bytes}")


def _enlarge_pipe(fd: int) -> None:
    """Let a pipe hold 1 MiB, so that the writer and we change places 16 times less often than with Linux's 64 KiB."""
    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) >= _PIPE_BYTES:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except PermissionError:
        # Beyond the user's limit (fs.pipe-max-size, pipe-user-pages-soft): the pipe works as it is, only slower.
        return
