"""Reads whole packs and says which of their bytes are what was written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter

from vmsnap.errors import DamageFound, ObjectNotFound
from vmsnap.repository.format import pack_key
from vmsnap.repository.packs import ENTRY, Entry, check_blobs, open_pack
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

# So many packs are in memory at once: one is read while another one is authenticated.
_THREADS = 2


@dataclass(frozen=True)
class PackState:
    """A pack as it was found. `listed` are its blobs as the index lists them (None where none does), `own` as the pack
    itself does (None where that is damaged). Of all these, `intact` are those that are what was written, as packed
    entries in order of their offsets, and `damaged` the others. `faults` says what else is wrong, a line each that
    begins with the object's key. `size_bytes` is None where the pack is missing.
    """

    id: bytes
    size_bytes: int | None
    listed: bytes | None
    own: bytes | None
    intact: bytes
    damaged: tuple[Entry, ...]
    faults: tuple[str, ...]

    @property
    def key(self) -> str:
        """The key of the object."""
        return pack_key(self.id)

    @property
    def healthy(self) -> bool:
        """Whether every byte of the pack is what was written, whatever the index says of it."""
        if self.own is None:
            return False
        own = set(ENTRY.iter_unpack(self.own))
        return not any(tuple(entry) in own for entry in self.damaged)

    @property
    def misindexed(self) -> bool:
        """Whether the index says something else of it than the pack itself."""
        return self.listed is not None and self.own is not None and self.own != self.listed


def examine_packs(
    storage: StorageBackend, vault: Vault, packs: Iterable[tuple[bytes, bytes | None]]
) -> Iterator[PackState]:
    """Read packs whole and authenticate every blob, a few packs ahead. Blocks.

    :param packs: ids, and the entries that the index has for each; None where none lists it
    :raises StorageError: the storage failed
    """
    running: deque[Future[PackState]] = deque()
    with ThreadPoolExecutor(_THREADS, "vmsnap-packs") as threads:
        try:
            for pack, listed in packs:
                running.append(threads.submit(examine_pack, storage, vault, pack, listed))
                if len(running) > _THREADS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def examine_pack(storage: StorageBackend, vault: Vault, pack: bytes, listed: bytes | None) -> PackState:
    """Read one pack whole and authenticate every blob. Blocks.

    :param listed: the entries that the index has for it; None where none lists it
    :raises StorageError: the storage failed
    """
    try:
        data = storage.get(pack_key(pack))
    except ObjectNotFound:
        return PackState(pack, None, listed, None, b"", (), (f"{pack_key(pack)} is missing",))
    faults: list[str] = []
    own: bytes | None = None
    try:
        own = open_pack(vault, pack, data)
    except DamageFound as e:
        faults.append(e.message)
    known = listed or own or b""
    if own is not None and listed is not None and own != listed:
        faults.append(f"{pack_key(pack)} and the index disagree about its blobs")
        both = {Entry(*entry) for entries in (own, listed) for entry in ENTRY.iter_unpack(entries)}
        known = b"".join(ENTRY.pack(*entry) for entry in sorted(both, key=attrgetter("offset")))
    intact: list[bytes] = []
    damaged: list[Entry] = []
    for entry, whole in check_blobs(vault, pack, data, known):
        if whole:
            intact.append(ENTRY.pack(*entry))
        else:
            damaged.append(entry)
    return PackState(pack, len(data), listed, own, b"".join(intact), tuple(damaged), tuple(faults))
