"""What a disk is to whoever writes a backup onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self


class DiskWriter(ABC):
    """A disk that exists, opened to be written onto, which nobody else uses until `close`. Several threads may use it
    at once, each in ranges of its own. A context manager.

    :ivar label: what messages call it
    :ivar address: as hypervisors are told it
    :ivar size_bytes: how large it is
    """

    label: str
    address: str
    size_bytes: int

    @abstractmethod
    def fit(self, size_bytes: int) -> None:
        """Give it that size, or see that it has it; a block device may be larger.

        :raises UsageError: it cannot have it; nothing was changed
        """

    @abstractmethod
    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length of those parts of a range that may be something else than zeros, ascending."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Blocks.

        :raises StorageError: it cannot be read
        """

    @abstractmethod
    def write(self, offset: int, contents: Sequence[bytes | memoryview]) -> None:
        """Write `contents`, one after the other, from `offset` on. Blocks.

        :raises StorageError: it cannot be written
        """

    @abstractmethod
    def write_zeros(self, offset: int, length: int) -> None:
        """Make zeros of a range, without taking room for them where it can. Blocks.

        :raises StorageError: it cannot be written
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when everything written is durable. Blocks; not while another thread writes.

        :raises StorageError: it could not be written
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of it; idempotent.

        :raises StorageError: what was written may be lost
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
