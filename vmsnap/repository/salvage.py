"""Reads every pack of a repository and says what can be saved: which packs are whole, what is intact in the others, and
what an index of all that lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from vmsnap.errors import DamageFound, ObjectNotFound
from vmsnap.repository.findings import DAMAGE, NOTE, Findings
from vmsnap.repository.format import INDEX_PREFIX, PACKS_PREFIX, is_index_key, pack_key, pack_of_key
from vmsnap.repository.index import ChunkIndex, IndexedPack, open_index
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.packs import ENTRY
from vmsnap.repository.packstate import PackState, examine_packs

if TYPE_CHECKING:
    from vmsnap.repository.check import Progress
    from vmsnap.repository.repository import Repository


class Salvage:
    """What is left of the packs and of the index. Memory: 49 bytes for each chunk, and twice as much for those that no
    readable index lists, or that lie in damaged packs.

    `whole` lists the blobs of packs that an index lists and that are intact, frame and all. `unlisted` are the other
    intact packs. `damaged` are packs with anything wrong in them, and what of them is intact. `wrongly_listed` are
    intact packs of which an index says something else than they do.
    """

    def __init__(self, repository: Repository, findings: Findings, progress: Progress | None) -> None:
        """Read everything. Blocks.

        :raises StorageError: the storage failed
        """
        self._storage = repository.storage
        self._vault = repository.vault
        self._findings = findings
        loader = IndexLoader(self._storage, self._vault)
        index = loader.load()
        self.damaged_indexes = sorted(key for key in loader.damaged if is_index_key(key))
        for key, damage in loader.damaged.items():
            findings.add(key, damage.message, severity=DAMAGE if is_index_key(key) else NOTE)
        self._listed = index.pack_sizes.keys() - loader.unlisted
        self.sizes = {
            pack: info.size_bytes for info in self._storage.list(PACKS_PREFIX) if (pack := pack_of_key(info.key))
        }
        self.unlisted: dict[bytes, IndexedPack] = {}
        self.damaged: dict[bytes, PackState] = {}
        self.wrongly_listed: dict[bytes, IndexedPack] = {}
        self.missing = self._listed - self.sizes.keys()
        for pack in sorted(self.missing):
            findings.add(pack_key(pack), f"{pack_key(pack)} is missing")
        self.read_bytes = 0
        total = sum(self.sizes.values())
        for state in examine_packs(self._storage, self._vault, self._to_read()):
            self.read_bytes += state.size_bytes or 0
            self._sort(state, index.pack_sizes)
            if progress:
                progress(min(self.read_bytes, total), total)
        odd = {*self.missing, *self.damaged, *self.wrongly_listed, *loader.unlisted}
        self.whole = index.without(odd).extended(self.wrongly_listed.values())

    @property
    def rescued(self) -> ChunkIndex:
        """The index of everything that is intact, what lies in whole and listed packs first. To be read from."""
        halves = [
            IndexedPack(state.id, state.size_bytes or 0, state.intact)
            for state in self.damaged.values()
            if state.size_bytes is not None
        ]
        return self.whole.extended([*self.unlisted.values(), *halves])

    def is_listed(self, pack: bytes) -> bool:
        """Whether an index that can be read lists the pack."""
        return pack in self._listed

    def kept(self, packs: list[IndexedPack]) -> list[IndexedPack]:
        """Those of the packs of an index object that it may go on listing so. Packs that have been stored meanwhile are
        not judged.
        """
        return [
            pack
            for pack in packs
            if pack.id not in self.missing
            and pack.id not in self.damaged
            and self.wrongly_listed.get(pack.id, pack) == pack
        ]

    def index_objects(self) -> Iterator[tuple[str, list[IndexedPack]]]:
        """Each index object that can be read, by its key, with the packs that it lists.

        :raises StorageError: the storage failed
        """
        for info in self._storage.list(INDEX_PREFIX):
            try:
                packs = open_index(self._vault, info.key, self._storage.get(info.key))
            except (DamageFound, ObjectNotFound):  # told of already
                continue
            yield info.key, packs

    def _to_read(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Each pack that is there with what the index says of it; more than once where two index objects disagree."""
        seen: dict[bytes, set[int]] = {}
        for _, packs in self.index_objects():
            for pack in packs:
                known = seen.setdefault(pack.id, set())
                self._listed.add(pack.id)
                if pack.id in self.sizes and hash(pack.entries) not in known:
                    yield pack.id, pack.entries
                known.add(hash(pack.entries))
        for unlisted in sorted(self.sizes.keys() - seen.keys()):
            yield unlisted, None

    def _sort(self, state: PackState, listed_sizes: dict[bytes, int]) -> None:
        listed = self.is_listed(state.id)
        for fault in state.faults:
            self._findings.add(state.key, fault, severity=DAMAGE if listed else NOTE)
        if not state.healthy:
            if state.size_bytes is None:
                self.missing.add(state.id)
                return
            for entry in state.damaged:
                message = f"{state.key}, the blob at {entry.offset}, is not what was written"
                self._findings.add(state.key, message, severity=DAMAGE if listed else NOTE)
            before = self.damaged.get(state.id)
            if before:
                entries = {*ENTRY.iter_unpack(before.intact), *ENTRY.iter_unpack(state.intact)}
                intact = b"".join(ENTRY.pack(*entry) for entry in sorted(entries, key=lambda entry: entry[1]))
                state = replace(state, intact=intact)
            self.damaged[state.id] = state
            return
        pack = IndexedPack(state.id, state.size_bytes or 0, state.own or b"")
        if not listed:
            self.unlisted[state.id] = pack
            message = f"{state.key} is listed by no index"
            self._findings.add(state.key, message, severity=NOTE)
        elif state.misindexed or listed_sizes.get(state.id, state.size_bytes) != state.size_bytes:
            self.wrongly_listed[state.id] = pack
