"""Folders and files that an operation makes on this host: in the journal before they are there, removed in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmsnap.errors import VmsnapError
from vmsnap.journal import Operation
from vmsnap.model import to_json


class Folders:
    """What one operation has made of them, in order."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._made: list[tuple[int, Path]] = []

    def make(self, folder: Path) -> list[int]:
        """Make a folder (0700) and those above it that are missing; returns their positions in the journal, none where
        it exists.

        :raises VmsnapError: it cannot be made
        """
        positions = []
        for missing in reversed([folder, *folder.parents]):
            if not missing.exists():
                positions.append(self.will_make(missing))
                try:
                    missing.mkdir(mode=0o700)
                except OSError as e:
                    raise VmsnapError(f"cannot make the folder {missing}: {e.strerror}") from e
        return positions

    def will_make(self, path: Path) -> int:
        """Enter a file that is about to be made; returns its position in the journal."""
        position = self._operation.will_make("file", "", to_json(str(path)))
        self._made.append((position, path))
        return position

    def not_ours(self, position: int) -> None:
        """Enter that it was somebody else's after all."""
        self._operation.is_gone(position)
        self._made = [(other, path) for other, path in self._made if other != position]

    def remove(self, which: Callable[[Path], bool] = lambda _: True) -> None:
        """Remove those that are still the operation's, the latest first; idempotent.

        :raises VmsnapError: one cannot be removed; the journal keeps it
        """
        for position, path in reversed(self._made):
            if which(path):
                if self._operation.owns(position):
                    remove_file(path)
                    self._operation.is_gone(position)
                self._made = [(other, kept) for other, kept in self._made if other != position]

    def hand_over(self, kept: Callable[[Path], bool]) -> None:
        """Enter that some are the user's now, in one transaction."""
        self._operation.are_gone([position for position, path in self._made if kept(path)])
        self._made = [(position, path) for position, path in self._made if not kept(path)]


def make_standing(folder: Path) -> None:
    """Make a folder that belongs to the installation and stays, as several operations make things in it.

    :raises VmsnapError: it cannot be made
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise VmsnapError(f"cannot make the folder {folder}: {e.strerror}") from e


def used_bytes(folder: Path) -> int:
    """What the files below a folder take: blocks, not sizes."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # removed meanwhile
            continue
    return total


def remove_file(path: Path) -> None:
    """Remove a file or an empty folder that we made; succeeds where there is none.

    :raises VmsnapError: it cannot be removed
    """
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        raise VmsnapError(f"cannot remove {path}: {e.strerror}") from e
