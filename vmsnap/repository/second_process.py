"""A second process that writes its share of an image: one Python process keeps hardly more than one processor busy with
chunks, as its threads pass Python's lock on between each two calls into C.

It opens the storage again by its URL, and gets the repository's keys through a pipe. Asked by whom it serves, it reads
some chunks, authenticates them, and writes them to the file that it has inherited. It decides nothing: what it cannot
do, for whatever reason, its parent does itself, and finds out why. It ends with its parent.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection, Pipe
from threading import Lock, Thread
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from vmsnap.errors import VmsnapError
from vmsnap.repository.blobs import Wanted
from vmsnap.repository.index import Location
from vmsnap.repository.runs import runs
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

if TYPE_CHECKING:
    from vmsnap.pagecache import QuietWriter
    from vmsnap.repository.blobs import BlobReader

Channel: TypeAlias = "Connection[list[Piece], bool]"

_CHANNELS: Final = 3
_NOT_WORTH_BATCHES: Final = 16
"""So many batches are over before a process has started."""


class Piece(NamedTuple):
    """A chunk, where it lies, and where in the file it belongs."""

    place: Location
    want: Wanted
    offset: int


class SecondProcess:
    """The parent's side. Used by several threads at once; closed when none uses it any more."""

    def __init__(self, storage: StorageBackend, vault: Vault, fd: int) -> None:
        """No I/O: the process is started when there is enough to do for it.

        :param fd: the file that it writes; it stays the caller's
        """
        self._storage = storage
        self._vault = vault
        self._fd = fd
        self._wanted = storage.reopens and len(os.sched_getaffinity(0)) > 1
        self._batches = 0
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channels: list[Channel] = []
        self._free: list[Channel] = []

    def write(self, pieces: Callable[[], Sequence[Piece]]) -> bool:
        """Have these pieces written, if the process is there and has time; False where it has not, or could not, and
        may have written some of them. Blocks.

        :param pieces: called where it has time; none: nothing is to be done here
        """
        channel = self._take()
        if channel is None:
            return False
        try:
            wanted = list(pieces())
            channel.send(wanted)
            done = channel.recv() and bool(wanted)
        except (OSError, EOFError):  # it has ended; this channel is no longer used
            return False
        with self._lock:
            self._free.append(channel)
        return done

    def close(self) -> None:
        """End the process, and wait until it has ended; idempotent. No other call may be running."""
        for channel in self._channels:
            channel.close()
        self._channels, self._free = [], []
        if self._process:
            self._process.wait()
            self._process = None

    def _take(self) -> Channel | None:
        with self._lock:
            self._batches += 1
            if self._wanted and self._batches > _NOT_WORTH_BATCHES:
                self._wanted = False
                with suppress(OSError):  # no room for one more process: all is done here
                    self._start()
            return self._free.pop() if self._free else None

    def _start(self) -> None:
        pairs: list[tuple[Channel, Channel]] = [Pipe() for _ in range(_CHANNELS)]
        try:
            theirs = [far.fileno() for _, far in pairs]
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *map(str, (self._fd, *theirs))],
                stdin=subprocess.PIPE,
                pass_fds=(self._fd, *theirs),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            self._channels = [near for near, _ in pairs]
            self._free = list(self._channels)
            if stdin := self._process.stdin:
                with stdin:
                    stdin.write(pickle.dumps((self._storage.name, self._storage.url, self._vault)))
        finally:
            for near, far in pairs:
                far.close()
                if near not in self._channels:
                    near.close()


def main() -> None:
    """The process itself; see the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to heed; it says so by hanging up
    target, *channels = map(int, sys.argv[1:])

    from vmsnap import registry
    from vmsnap.pagecache import QuietWriter
    from vmsnap.repository.blobs import BlobReader
    from vmsnap.repository.index import ChunkIndex

    scheme, url, vault = pickle.load(sys.stdin.buffer)
    storage = registry.storage_backend(scheme)(url, {})
    with closing(storage), closing(QuietWriter(target)) as file:
        blobs = BlobReader(storage, vault, ChunkIndex())
        threads = [Thread(target=_serve, args=(Connection(channel), blobs, file)) for channel in channels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _serve(channel: Connection[bool, list[Piece]], blobs: BlobReader, file: QuietWriter) -> None:
    # Whatever happens here, the parent hears that its question is not answered.
    with channel, suppress(EOFError, ConnectionError):
        while True:
            pieces = channel.recv()
            try:
                for offset, contents in runs(_contents(pieces, blobs)):
                    file.write_all(contents, offset)
            except (VmsnapError, OSError):
                channel.send(False)
            else:
                channel.send(True)


def _contents(pieces: Iterable[Piece], blobs: BlobReader) -> Iterator[tuple[int, bytes | memoryview]]:
    ordered = sorted(pieces)
    found = blobs.read_at([(piece.want, piece.place) for piece in ordered])
    for piece, content in zip(ordered, found, strict=True):
        yield piece.offset, content


if __name__ == "__main__":
    main()
