"""Keeps the index objects of a remote repository in a local folder, so that not every command fetches them anew.

Only ever a cache: whatever is missing, cut short, changed or unreadable in it is fetched from the storage, and nothing
that fails here fails anything else. The objects lie there as they lie in the storage: sealed, and bound to the
repository and their key, so that what is not the true one does not open. Delete the folder at any time.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from vmsnap.repository.format import INDEX_PREFIX
from vmsnap.roles.storage import StorageBackend

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = "unfinished-"
_DEAD_AFTER_SECONDS = 3600.0


class IndexCache:
    """The cached index objects of one repository, one file each. Several processes may use one folder at once."""

    def __init__(self, folder: Path) -> None:
        """No I/O.

        :param folder: for this repository alone; it, and missing folders above it, are made when they are needed
        """
        self._folder = folder

    @classmethod
    def beside(cls, storage: StorageBackend, cache_dir: Path | None, repository: str) -> IndexCache | None:
        """The cache of a repository's index below `cache_dir`; None where it is not worth while: for storage on this
        host, or without a folder.

        :param repository: the repository's id
        """
        return cls(cache_dir / repository / "index") if cache_dir and storage.remote else None

    def get(self, key: str) -> bytes | None:
        """What is kept of the index object `key`; None if there is nothing. Not authenticated yet."""
        path = self._path(key)
        try:
            return path.read_bytes() if path and self._is_ours() else None
        except OSError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Keep an index object. Atomic; where there is no room, or no right to write, nothing is kept."""
        path = self._path(key)
        temporary = self._folder / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._make_folder()
            if not path or not self._is_ours():
                return
            try:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                temporary.replace(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        except OSError:
            return  # only ever a cache

    def keep_only(self, keys: Collection[str]) -> None:
        """Remove all but the index objects that are listed, and what a dead process left unfinished."""
        listed = {key.removeprefix(INDEX_PREFIX) for key in keys}
        with suppress(OSError):
            for entry in list(os.scandir(self._folder)):
                if entry.name not in listed and not _may_be_in_work(entry):
                    with suppress(OSError):
                        Path(entry.path).unlink()

    def _path(self, key: str) -> Path | None:
        # What else lies below index/ is not ours, and its name could be anything.
        name = key.removeprefix(INDEX_PREFIX)
        return self._folder / name if _NAME.fullmatch(name) else None

    def _make_folder(self) -> None:
        if not self._folder.is_dir():
            # Path.mkdir gives its mode to the last folder alone.
            for folder in (*reversed(self._folder.parents), self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)

    def _is_ours(self) -> bool:
        """Whether the folder is this user's alone: a repository without encryption has nothing else to tell what
        somebody put there from what was in the storage.
        """
        found = self._folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _may_be_in_work(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(_UNFINISHED) and time.time() - entry.stat().st_mtime < _DEAD_AFTER_SECONDS
