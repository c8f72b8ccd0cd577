"""Brings the repository's index into memory, and keeps it up to date."""

from __future__ import annotations

from contextlib import suppress

from vmsnap.errors import DamageFound, ObjectNotFound
from vmsnap.repository.format import INDEX_PREFIX, PACKS_PREFIX, pack_of_key
from vmsnap.repository.index import ChunkIndex, IndexedPack, open_index
from vmsnap.repository.packs import read_trailer
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend


class IndexLoader:
    """Reads index objects once each. Where some are damaged, the packs that no other one lists are asked for what
    they hold, so that nothing is lost with an index.
    """

    def __init__(self, storage: StorageBackend, vault: Vault) -> None:
        self.index = ChunkIndex()
        self.damaged: dict[str, DamageFound] = {}
        """The index objects that could not be read, by key."""
        self._storage = storage
        self._vault = vault
        self._loaded: set[str] = set()

    def load(self) -> ChunkIndex:
        """Read what is new, and return the index. Earlier results stay as they were. Blocks.

        :raises StorageError: the storage failed
        """
        keys = {info.key for info in self._storage.list(INDEX_PREFIX)}
        index = self.index
        if not self._loaded <= keys:  # garbage collection has rewritten it
            index, self._loaded, self.damaged = ChunkIndex(), set(), {}
        packs: list[IndexedPack] = []
        for key in sorted(keys - self._loaded):
            try:
                packs += open_index(self._vault, key, self._storage.get(key))
            except DamageFound as e:
                self.damaged[key] = e
            except ObjectNotFound:
                continue
            self._loaded.add(key)
        known = index.pack_sizes
        fresh = {pack.id: pack for pack in packs if pack.id not in known}
        if self.damaged:
            fresh |= {pack.id: pack for pack in self._unlisted(known.keys() | fresh.keys())}
        if fresh or index is not self.index:
            self.index = index.extended(fresh.values())
        return self.index

    def _unlisted(self, listed: set[bytes]) -> list[IndexedPack]:
        found = []
        for info in self._storage.list(PACKS_PREFIX):
            pack = pack_of_key(info.key)
            if pack and pack not in listed:
                with suppress(DamageFound, ObjectNotFound):
                    entries = read_trailer(self._storage, self._vault, pack, info.size_bytes)
                    found.append(IndexedPack(pack, info.size_bytes, entries))
        return found
