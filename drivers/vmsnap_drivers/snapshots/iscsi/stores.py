"""What lies behind LUNs, and how it is snapshotted where it lies: files by reflink, volumes by LVM.

Whatever is made lies beside its origin, in the same folder or volume group, and is named by its plan.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, Final

from vmsnap.errors import SnapshotError
from vmsnap_drivers.runner import Output, Runner, one_line

TAG: Final = re.compile(r"vmsnap-[A-Za-z0-9._-]+")
VOLUME_PREFIX: Final = "iscsi.vmsnap-"
"""Begins the names of the volumes that we make."""
_SECONDS: Final = 120.0


def is_on_ours(path: str) -> bool:
    """Whether a backing store is named as ours are."""
    return TAG.search(PurePosixPath(path).name) is not None


@dataclass(frozen=True)
class Origin:
    """The backing store of a disk: its path as we call it, and what it is."""

    kind: str
    path: str
    size_bytes: int


@dataclass(frozen=True)
class Owned:
    """Something of ours beside an origin: a ``snapshot`` or a ``clone``, made for the plan `tag`."""

    kind: str
    path: str
    tag: str


@dataclass(frozen=True)
class Fill:
    """How full what snapshots take their room from is, from 0 to 1; `what` is as messages call it."""

    what: str
    used: float


class Stores(ABC):
    """One kind of backing stores, where `runner` runs commands. Paths are absolute.

    A further kind is a further class: `kind` names it in plans, `look` tells its own from others', and `places.Place`
    has the list.
    """

    kind: ClassVar[str]

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @abstractmethod
    def look(self, path: str) -> Origin | None:
        """What that is; None where it is none of this kind, so that the next kind is asked.

        :raises SnapshotError: it is not there, or cannot be snapshotted
        """

    def name(self, tag: str, index: int, clone: str = "") -> str:
        """What a snapshot is called, or the clone of it with that name; as volumes may be called."""
        return f"iscsi.{tag}.{index}.{clone}.clone" if clone else f"iscsi.{tag}.{index}"

    def beside(self, origin: str, tag: str, index: int, clone: str = "") -> str:
        """The path of a snapshot, or of the clone of it with that name."""
        if not TAG.fullmatch(tag):
            raise SnapshotError(f"{tag!r} is no tag")
        return str(PurePosixPath(origin).parent / self.name(tag, index, clone))

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is something at that path."""

    def prepare(self, origin: str, path: str, tag: str) -> None:
        """Do what is slow about a snapshot; whoever writes to the origin goes on."""

    @abstractmethod
    def snapshot(self, origin: str, path: str, tag: str, seconds: float) -> None:
        """Fix the content of `origin`, within so many seconds.

        :raises SnapshotError: it failed
        """

    def settle(self, path: str) -> None:
        """Let a snapshot be opened."""

    def fill(self, origin: str) -> Fill | None:
        """How full the pool is from which both take room, a snapshot and whoever writes to its origin; None where there
        is none.

        :raises SnapshotError: it cannot be asked
        """
        return None

    @abstractmethod
    def clone(self, source: str, path: str, tag: str) -> None:
        """Make a writable copy of a snapshot, which outlives it.

        :raises SnapshotError: it failed
        """

    @abstractmethod
    def remove(self, path: str, tag: str) -> None:
        """Remove what was made for that plan; nothing where it is not there, or not ours.

        :raises SnapshotError: it cannot be removed
        """

    @abstractmethod
    def owned(self, origins: Iterable[str]) -> list[Owned]:
        """What is ours, beside these origins at least."""

    def foreign(self, origins: Iterable[str]) -> list[str]:
        """The paths of what is named as ours are, beside these origins at least, and that we have not made: it may be
        in our way, and is left alone. Nothing where the name alone is what makes something ours.
        """
        return []

    def _run(self, argv: Sequence[str], seconds: float = _SECONDS, *, changes: bool = False) -> str:
        done = self._ask(argv, seconds, changes=changes)
        if done.status:
            raise SnapshotError(f"{argv[0]} failed: {one_line(done.stderr) or f'status {done.status}'}")
        return done.stdout

    def _ask(self, argv: Sequence[str], seconds: float = _SECONDS, *, changes: bool = False) -> Output:
        return self._runner.run(argv, seconds, changes=changes)
