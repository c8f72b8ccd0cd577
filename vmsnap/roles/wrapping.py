"""Storage around storage: what a wrapper (of retries, of a rate limit, …) does not change goes to what it wraps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from vmsnap.model import Finding
from vmsnap.roles.storage import ObjectInfo, StorageBackend, StorageProperties


class WrappedStorage(StorageBackend):
    """A storage backend that hands every call to another one; inherit it and override what is to differ.

    It looks like the backend that it wraps: same name, URL and options. Closing it closes that one.
    """

    def __init__(self, inner: StorageBackend) -> None:
        """No I/O."""
        super().__init__(inner.url, {})
        # Class variables of the role, of this one object.
        vars(self).update(name=inner.name, options=inner.options, remote=inner.remote)
        self.retention_seconds = inner.retention_seconds
        self.inner = inner

    def create(self) -> None:
        """See the role."""
        self.inner.create()

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See the role."""
        self.inner.put(key, data, if_absent=if_absent)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See the role."""
        return self.inner.get(key, offset, length)

    def stat(self, key: str) -> ObjectInfo:
        """See the role."""
        return self.inner.stat(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See the role."""
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        """See the role."""
        self.inner.delete(key)

    def properties(self) -> StorageProperties:
        """See the role."""
        return self.inner.properties()

    def doctor(self) -> Sequence[Finding]:
        """See the role."""
        return self.inner.doctor()

    def retain(self, keys: Iterable[str], until: datetime) -> None:
        """See the role."""
        self.inner.retain(keys, until)

    def retained(self, keys: Iterable[str]) -> dict[str, datetime]:
        """See the role."""
        return self.inner.retained(keys)

    def hurry(self) -> None:
        """See the role."""
        self.inner.hurry()

    def close(self) -> None:
        """See the role."""
        self.inner.close()
