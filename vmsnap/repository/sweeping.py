"""The phase of garbage collection that deletes: condemned packs that no backup needs, when nobody relies on them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vmsnap.errors import ObjectRetained
from vmsnap.repository.format import pack_key
from vmsnap.repository.garbage import Garbage
from vmsnap.repository.index import open_index
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.marking import Stock
from vmsnap.repository.repack import IndexWriter
from vmsnap.repository.seal import Vault
from vmsnap.repository.sessions import Session
from vmsnap.roles.storage import StorageBackend

_THREADS = 4
# Index objects of so few packs are put together when there are so many of them.
_SMALL_INDEX_PACKS = 32
_SMALL_INDEX_OBJECTS = 16


@dataclass(frozen=True)
class Sweep:
    """What is to be done about garbage objects for which nobody has to wait any more.

    `doomed` are condemned packs that no backup needs, whether they are there or not; `deleted_bytes` the size of those
    that are. `spared` are condemned packs that a backup needs: somebody relied on them while they were waited for.
    `overdue` are leftovers that nobody has listed, to be condemned next.
    """

    garbage: Sequence[Garbage]
    doomed: frozenset[bytes]
    deleted_bytes: int
    spared: frozenset[bytes]
    overdue: frozenset[bytes]


def plan_sweep(stock: Stock, garbage: Sequence[Garbage]) -> Sweep:
    """Decide by what the backups need now.

    :param stock: taken after nobody was alive any more for whom the garbage waits
    """
    condemned = frozenset[bytes]().union(*(each.packs for each in garbage))
    leftovers = frozenset[bytes]().union(*(each.leftovers for each in garbage))
    spared = condemned & stock.needed_bytes_by_pack().keys()
    doomed = condemned - spared
    deleted_bytes = sum(stock.sizes.get(pack, 0) for pack in doomed)
    overdue = (leftovers & stock.sizes.keys()) - stock.listed.keys() - condemned
    return Sweep(garbage, doomed, deleted_bytes, spared, overdue)


def carry_out(
    storage: StorageBackend, vault: Vault, loader: IndexLoader, stock: Stock, sweep: Sweep, session: Session
) -> int:
    """Take the doomed packs out of the index, then delete them, then the garbage objects; returns how many index
    objects were written. Killed anywhere, it can be planned and carried out again. Blocks.

    :param loader: as up to date as `stock`
    :raises RepositoryError: the session was taken for dead; somebody else may be at it
    :raises StorageError: the storage failed
    """
    session.require()
    written = rewrite_index(storage, vault, loader, sweep.doomed)
    session.require()
    keys = [pack_key(pack) for pack in sorted(sweep.doomed & stock.sizes.keys())]

    def is_retained(key: str) -> bool:
        try:
            storage.delete(key)
        except ObjectRetained:
            return True  # a backup that failed has locked it; a later collection finds it unlocked
        return False

    with ThreadPoolExecutor(_THREADS, "vmsnap-sweep") as threads:
        retained = {key for key, is_kept in zip(keys, threads.map(is_retained, keys), strict=True) if is_kept}
    # Last: as long as they are there nobody relies on what they condemn.
    for each in sweep.garbage:
        if retained.isdisjoint(map(pack_key, each.packs)):
            storage.delete(each.key)
    return written


def rewrite_index(
    storage: StorageBackend, vault: Vault, loader: IndexLoader, doomed: frozenset[bytes] = frozenset()
) -> int:
    """Write what is kept of the index objects that list one of these packs anew, then delete those; returns how many
    were written. Where there are many small index objects, such as each backup leaves, they are put together. Killed
    anywhere, everything is listed still. Blocks.

    :param loader: up to date
    :raises StorageError: the storage failed
    """
    small = {key for key, packs in loader.listings.items() if len(packs) < _SMALL_INDEX_PACKS} - loader.damaged.keys()
    if len(small) < _SMALL_INDEX_OBJECTS:
        small = set()
    touched = {key: None for key, packs in loader.listings.items() if packs & doomed or key in small}
    untouched = (packs for key, packs in loader.listings.items() if key not in touched)
    # What was written by a collection that was killed here is not written twice.
    done = set(doomed).union(*untouched)
    writer = IndexWriter(storage, vault)
    for key in touched:
        for pack in open_index(vault, key, storage.get(key)):
            if pack.id not in done:
                done.add(pack.id)
                writer.add(pack)
    writer.flush()
    for key in touched:
        storage.delete(key)
    return writer.written
