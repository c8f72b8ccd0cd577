"""Brings the repository's index into memory, and keeps it up to date."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from vmsnap.errors import DamageFound, ObjectNotFound, StorageError
from vmsnap.repository.format import INDEX_PREFIX, PACKS_PREFIX, pack_of_key
from vmsnap.repository.index import ChunkIndex, IndexedPack, open_index
from vmsnap.repository.packs import read_trailer
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

if TYPE_CHECKING:
    from vmsnap.repository.cache import IndexCache

# Somebody would have to rewrite the index as often as that while it is read.
_ROUNDS = 100


class IndexLoader:
    """Reads index objects once each. Where some are damaged, the packs that no other one lists are asked for what
    they hold, so that nothing is lost with an index.
    """

    def __init__(self, storage: StorageBackend, vault: Vault, cache: IndexCache | None = None) -> None:
        self.index = ChunkIndex()
        self.damaged: dict[str, DamageFound] = {}
        """The index objects that could not be read, by key."""
        self.listings: dict[str, frozenset[bytes]] = {}
        """The packs that each index object lists, by its key."""
        self.unlisted: frozenset[bytes] = frozenset()
        """The packs that were asked themselves. To be read from, and not to be relied on by what is written: they may
        belong to somebody who gives up, and removes them."""
        self._storage = storage
        self._vault = vault
        self._cache = cache

    def load(self) -> ChunkIndex:
        """Read what is new, and return the index. Earlier results stay as they were. Blocks.

        Garbage collection puts new index objects before it deletes old ones; a listing may still show neither, when
        both happens while it is made. So they are listed until two listings are the same, and all of that was read.

        :raises StorageError: the storage failed
        """
        before: set[str] | None = None
        for _ in range(_ROUNDS):
            keys = {info.key for info in self._storage.list(INDEX_PREFIX)}
            if keys == before == self.listings.keys():
                break
            if keys != self.listings.keys():
                self._take(keys)
            before = keys
        else:
            raise StorageError("the index of the repository changes while it is read", cure="try again")
        if self.damaged:
            self._ask_unlisted()
        return self.index

    def _take(self, keys: set[str]) -> None:
        """Go over to the index objects of these keys, as far as they are there."""
        gone = self.listings.keys() - keys
        for key in gone:
            del self.listings[key]
            self.damaged.pop(key, None)
        fresh = sorted(keys - self.listings.keys())
        if gone:
            # What stands in a new object instead counts, and what stands in none is no longer there.
            packs = {pack.id: pack for pack in self._opened(fresh)}
            known = self.index.pack_sizes.keys()
            listed = frozenset[bytes]().union(*self.listings.values())
            self.index = self.index.without((known - listed) | (known & packs.keys())).extended(packs.values())
            self.unlisted = frozenset()
        elif fresh:
            # One index object in memory at a time: this is how a large index is read first.
            self.index = self.index.extended(self._once(self._opened(fresh), set(self.index.pack_sizes)))
            self.unlisted -= frozenset[bytes]().union(*self.listings.values())
        if self._cache:
            self._cache.keep_only(keys)

    def _opened(self, keys: Iterable[str]) -> Iterator[IndexedPack]:
        """What these index objects list; notes it, and those that are damaged."""
        for key in keys:
            try:
                opened = self._open(key)
            except DamageFound as e:
                self.damaged[key] = e
                opened = []
            except ObjectNotFound:  # rewritten just now
                continue
            self.listings[key] = frozenset(pack.id for pack in opened)
            yield from opened

    @staticmethod
    def _once(packs: Iterable[IndexedPack], seen: set[bytes]) -> Iterator[IndexedPack]:
        for pack in packs:
            if pack.id not in seen:
                seen.add(pack.id)
                yield pack

    def _open(self, key: str) -> list[IndexedPack]:
        if self._cache and (kept := self._cache.get(key)) is not None:
            with suppress(DamageFound):
                return open_index(self._vault, key, kept)
        data = self._storage.get(key)
        packs = open_index(self._vault, key, data)
        if self._cache:
            self._cache.put(key, data)
        return packs

    def _ask_unlisted(self) -> None:
        known = self.index.pack_sizes.keys()
        found = []
        for info in self._storage.list(PACKS_PREFIX):
            pack = pack_of_key(info.key)
            if pack and pack not in known:
                with suppress(DamageFound, ObjectNotFound):
                    entries = read_trailer(self._storage, self._vault, pack, info.size_bytes)
                    found.append(IndexedPack(pack, info.size_bytes, entries))
        if found:
            self.index = self.index.extended(found)
            self.unlisted |= {pack.id for pack in found}
