"""The passphrase keys of an open repository: which there are, and how they come and go.

All of them wrap the same root secret, so none of this rewrites data. Whatever happens in between, a key that opens is
left: a new one is read back and opened before an old one goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from vmsnap.errors import (
    Busy,
    DamageFound,
    NotFound,
    ObjectNotFound,
    RepositoryError,
    StorageError,
    UsageError,
    WrongPassphrase,
)
from vmsnap.repository.format import KEYS_PREFIX
from vmsnap.repository.keys import KeyCost, decode_key, unwrap_root, wrap_root
from vmsnap.repository.manifest import check_tag
from vmsnap.roles.storage import StorageBackend


@dataclass(frozen=True)
class KeyInfo:
    """One passphrase key, without anything secret.

    `opened`: it is the one that opened this repository. `fault` says what is wrong with it (it is damaged, or of a
    newer format), and is empty where nothing is; a faulty one has no `cost`. Nothing but the id is authenticated:
    whoever can write to the storage can change `created` and `label`.
    """

    id: str
    created: str
    label: str
    cost: KeyCost | None
    opened: bool
    fault: str = ""


class KeyRing:
    """The keys of one repository, in the hands of somebody who has opened it."""

    def __init__(self, storage: StorageBackend, root: bytes, bound: bytes, opened: str) -> None:
        """:param root: the root secret
        :param bound: the config's digest
        :param opened: the object key of the key that has opened the repository
        """
        self._storage = storage
        self._root = root
        self._bound = bound
        self._opened = opened

    def __repr__(self) -> str:
        return f"KeyRing({self._opened})"

    def keys(self) -> tuple[KeyInfo, ...]:
        """See `Repository.keys`."""
        found = [self._info(key, data) for key, data in self._objects().items()]
        return tuple(sorted(found, key=lambda info: (info.created, info.id)))

    def add(self, passphrase: str, label: str, cost: KeyCost | None) -> str:
        """See `Repository.add_key`."""
        if label:
            check_tag(label)
        found = self._opened_by(self._objects(), passphrase)
        if found is not None:
            raise UsageError(f"this passphrase opens key {_id(found)} already", cure="choose another one")
        return _id(self._put_new(passphrase, label, cost))

    def remove(self, key_id: str) -> None:
        """See `Repository.remove_key`."""
        key, objects = KEYS_PREFIX + key_id, self._objects()
        if key not in objects:
            raise NotFound(f"the repository has no key {key_id!r}", cure="vmsnap key list shows them")
        if key == self._opened:
            raise UsageError(
                f"key {key_id} is the one that your passphrase opens",
                cure="use vmsnap key change, or open the repository with another passphrase",
            )
        if not _intact(objects, without=key):
            raise UsageError(f"key {key_id} is the last one that can be opened", cure="add another one first")
        self._delete(key, objects[key])

    def change(self, passphrase: str, cost: KeyCost | None) -> str:
        """See `Repository.change_passphrase`."""
        objects, old = self._objects(), self._opened
        # There already, where a change was killed between its two steps: this one finishes it.
        new = self._opened_by(objects, passphrase)
        if new == old:
            raise UsageError("the repository opens with this passphrase already", cure="choose another one")
        if new is None:
            label = self._info(old, objects[old]).label if old in objects else ""
            new = self._put_new(passphrase, label, cost)
        self._opened = new
        try:
            if old in objects:
                self._delete(old, objects[old])
        except StorageError as e:
            raise StorageError(
                f"the new passphrase opens the repository, and the old one still does: {e.message}",
                cure=f"remove it later: vmsnap key remove {_id(old)}",
            ) from e
        return _id(new)

    # -- inside

    def _objects(self) -> dict[str, bytes]:
        objects = {}
        for info in self._storage.list(KEYS_PREFIX):
            with suppress(ObjectNotFound):
                objects[info.key] = self._storage.get(info.key)
        return objects

    def _info(self, key: str, data: bytes) -> KeyInfo:
        opened = key == self._opened
        try:
            found, _, _ = decode_key(key, data)
        except (DamageFound, RepositoryError) as e:
            return KeyInfo(_id(key), "", "", None, opened, e.message)
        return KeyInfo(_id(key), found.created, found.label, found.cost, opened)

    def _opened_by(self, objects: Mapping[str, bytes], passphrase: str) -> str | None:
        try:
            return unwrap_root(objects, passphrase, self._bound)[0]
        except (WrongPassphrase, DamageFound, RepositoryError):
            return None

    def _put_new(self, passphrase: str, label: str, cost: KeyCost | None) -> str:
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        key, data = wrap_root(self._root, passphrase, self._bound, created=now, label=label, cost=cost)
        try:
            self._storage.put(key, data, if_absent=True)
            if unwrap_root({key: self._storage.get(key)}, passphrase, self._bound) != (key, self._root):
                raise DamageFound(f"{key} opens another repository")
        except BaseException:
            # The answer can have been lost: no key is left that its owner was told had failed.
            with suppress(StorageError):
                self._storage.delete(key)
            raise
        return key

    def _delete(self, key: str, data: bytes) -> None:
        self._storage.delete(key)
        # Two sessions may each remove the other's key; both see it then, and put theirs back.
        if not _intact(self._objects()):
            self._storage.put(key, data)
            raise Busy("somebody else removed the other keys at the same moment; this one was put back")


def _id(key: str) -> str:
    return key.removeprefix(KEYS_PREFIX)


def _intact(objects: Mapping[str, bytes], without: str = "") -> int:
    """How many of the key objects can be opened by those who know their passphrases."""
    count = 0
    for key, data in objects.items():
        with suppress(DamageFound, RepositoryError):
            decode_key(key, data)
            count += key != without
    return count
