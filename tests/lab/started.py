"""What the lab starts, and ends whatever happens."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Started(ABC):
    """One such thing. Use with ``with``, or call `start` and, whatever happens, `kill`."""

    @abstractmethod
    def start(self) -> None:
        """Start it, and return when it does what it is for."""

    @abstractmethod
    def kill(self) -> None:
        """End it now. Killing twice, or what was never started, is fine."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
