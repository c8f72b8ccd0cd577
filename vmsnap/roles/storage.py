"""The role of a storage backend: keeps the repository's objects, small ones and packs of tens of MiB, under keys."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

from vmsnap.errors import StorageError, UsageError
from vmsnap.model import Finding
from vmsnap.roles.needs import Need
from vmsnap.roles.options import Option

MAX_KEY_LENGTH = 200
_KEY = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")


def check_key(key: str) -> str:
    """Return `key` if it is one: lower-case words of ``a-z 0-9 . _ -`` joined by slashes, each beginning with a
    letter or a digit (so that no key leaves its folder or hides), `MAX_KEY_LENGTH` characters at most.

    :raises UsageError: anything else
    """
    if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise UsageError(f"{key!r} is not a valid object key")
    return key


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of one object."""

    key: str
    size_bytes: int


@dataclass(frozen=True)
class StorageProperties:
    """What a backend can promise at its address, asked once when a repository is opened.

    `conditional_put`: ``put(if_absent=True)`` is atomic against other writers; without it the backend looks first
    and then writes. `free_bytes`: room left, None where the storage does not say.
    """

    conditional_put: bool
    free_bytes: int | None = None


class StorageBackend(ABC):
    """Objects under keys: written whole, never changed, deleted when told.

    Contract:

    - **All or nothing.** After `put` returns the object is durable and whole; whatever happens before that (an
      exception, a kill, a power cut), `get`, `stat` and `list` show either the whole object or none, and an object
      that was there before under the same key is either the old or the new one, whole.
    - **Idempotent delete.** Deleting what is not there succeeds.
    - **Fresh.** A `list` or `get` that begins after a `put` or `delete` has returned sees it.
    - Keys are checked by `check_key` before they are used.
    - Methods block, raise `ObjectNotFound`, `ObjectExists`, `StorageFull`, else `StorageError`, and leave the
      backend usable. What may succeed when it is tried again is a `TransientStorageError`; the backend itself never
      tries again.
    - Unlike other drivers, a storage backend may be used by several threads at once.
    """

    name: ClassVar[str]
    """The URL scheme it serves: ``file``, ``s3``, ``sftp``."""
    options: ClassVar[Sequence[Option]] = ()
    needs: ClassVar[Sequence[Need]] = ()
    """Programs and modules without which it does nothing here; ``vmsnap drivers`` names those that are missing."""
    remote: ClassVar[bool] = True
    """Whether it pays to keep small objects on this host instead of getting them again."""
    reopens: ClassVar[bool] = False
    """Whether another process that runs as the same user can open it by its URL alone, and read beside this one."""
    retention_seconds: float | None = None
    """For how long from now the user wants that nobody can delete what a backup needs, see `retain`; None: retention
    was not asked for.
    """

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        """Remember the address; no I/O. `url` has this backend's scheme (or is a plain path, for ``file``).

        :raises UsageError: the URL has not the shape that this backend needs
        """
        self.url = url

    @abstractmethod
    def create(self) -> None:
        """Make the place itself (the folder, the prefix) where it does not exist yet; idempotent."""

    @abstractmethod
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """Store `data` under `key`, all or nothing, durable on return.

        An object of that key is replaced, unless `if_absent`.

        :raises ObjectExists: `if_absent` and an object is there (it is untouched)
        :raises StorageFull: no room; nothing of it is left
        """

    @abstractmethod
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return the object, or exactly the range of `length` bytes from `offset` (to its end where None).

        :raises ObjectNotFound: no such object
        :raises StorageError: the range reaches past the end, or the read came short
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Return key and size.

        :raises ObjectNotFound: no such object
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key begins with `prefix` (a plain string prefix), in ascending order of keys.

        Lazily, in bounded memory. Temporary files of unfinished puts are never shown.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; succeeds where there is none."""

    @abstractmethod
    def properties(self) -> StorageProperties:
        """Say what this backend promises at this address."""

    @abstractmethod
    def doctor(self) -> Sequence[Finding]:
        """Look whether this address can be used, and name the cure where not. Changes nothing, never raises
        VmsnapError.
        """

    def retain(self, keys: Iterable[str], until: datetime) -> None:
        """Let nobody delete or replace these objects before `until` (UTC, in the future), not even with the
        credentials that stored them. Those that are kept longer already stay so. Idempotent; where it fails, some of
        them may be retained. Called only where there are `retention_seconds`.

        :raises ObjectNotFound: one of them is not there
        :raises StorageError: the storage cannot do it, or failed
        """
        raise StorageError(f"{self.url} cannot keep objects from being deleted", cure="leave retention away")

    def retained(self, keys: Iterable[str]) -> dict[str, datetime]:
        """Of these objects those that are retained now, each with the time until which it is; `delete` would raise
        `ObjectRetained`. Those that are not there are not named.
        """
        return {}

    def hurry(self) -> None:
        """What is being done is given up: calls that wait for better times fail now. Later calls are as ever."""

    def close(self) -> None:
        """Let go of connections; the object is not used afterwards. Idempotent."""
