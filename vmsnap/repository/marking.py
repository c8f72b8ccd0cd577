"""Finds out what the backups need: the phase of garbage collection that only reads.

Memory: the index, a byte for each of its chunks, and an id for each tree node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from vmsnap.errors import DamageFound, RepositoryError
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.format import MANIFESTS_PREFIX, PACKS_PREFIX, pack_of_key
from vmsnap.repository.index import ChunkIndex
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.loss import is_within
from vmsnap.repository.manifest import LostRange, Manifest
from vmsnap.repository.walk import Loss, LossWalk

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository

PhaseProgress: TypeAlias = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes done so far, and the bytes in all."""

REPAIR = "run: vmsnap repair"
_CARRIED_AT_ONCE = 1 << 18


class Stock:
    """The repository at one moment: the packs that are there, what the index lists of them, and which copy of which
    blob the backups need. Never changed.
    """

    def __init__(self, backups: Set[str], sizes: dict[bytes, int], listed: dict[bytes, int], index: ChunkIndex) -> None:
        self.backups = backups
        """The object keys of the manifests."""
        self.sizes = sizes
        """The packs that are there, with their bytes."""
        self.listed = listed
        """The packs that the index lists, with the bytes that it says."""
        self.index = index
        """What can be read. Of several copies it names one in a pack that is condemned only where there is no other."""
        self.needed: npt.NDArray[np.bool_] = np.zeros(len(index), np.bool_)
        """For each row of the index whether a backup needs this copy."""

    def use(self, ids: bytes) -> None:
        """Note that these blobs are needed; what is not in the index is passed over."""
        rows = self.index.rows(ids)
        self.needed[rows[rows >= 0]] = True

    def carry_over(self, earlier: Stock) -> None:
        """Note that all is needed that was needed before.

        :raises DamageFound: some of it is gone
        """
        rows = np.flatnonzero(earlier.needed)
        for at in range(0, len(rows), _CARRIED_AT_ONCE):
            ids = earlier.index.ids_at(rows[at : at + _CARRIED_AT_ONCE])
            if (self.index.rows(ids) < 0).any():
                raise DamageFound("packs that backups need have vanished just now", cure="run: vmsnap check")
            self.use(ids)

    def needed_bytes_by_pack(self) -> dict[bytes, int]:
        """The bytes of the needed blobs in each pack that has any."""
        return self.index.sealed_bytes_by_pack(self.needed)


def take_stock(
    repository: Repository,
    loader: IndexLoader,
    condemned: Set[bytes],
    earlier: Stock | None = None,
    progress: PhaseProgress | None = None,
) -> Stock:
    """Look at the repository, and walk the trees of all backups. Blocks.

    :param loader: brought up to date
    :param condemned: packs that are going to be deleted
    :param earlier: what was looked at shortly before; only newer backups are walked. Those that were removed since
        count as needed still.
    :raises DamageFound: something is damaged, or a backup lacks what its manifest does not note as lost, so that what
        it needs cannot be known
    :raises RepositoryError: a newer vmsnap wrote something
    :raises StorageError: the storage failed
    """
    # In this order: what a manifest names was listed before it was there, and what is listed is there.
    keys = {info.key for info in repository.storage.list(MANIFESTS_PREFIX)}
    try:
        manifests = repository.manifests_at(sorted(keys - (earlier.backups if earlier else set())))
    except DamageFound as e:
        raise DamageFound(e.message, cure=REPAIR) from e
    index = loader.load()
    for damage in loader.damaged.values():
        raise DamageFound(damage.message, cure=REPAIR)
    sizes = {}
    for info in repository.storage.list(PACKS_PREFIX):
        if pack := pack_of_key(info.key):
            sizes[pack] = info.size_bytes
    stock = Stock(keys, sizes, index.pack_sizes, index.behind(set(condemned)).readable(sizes))
    if earlier:
        stock.carry_over(earlier)
    _walk(repository, stock, manifests, progress)
    return stock


def _walk(repository: Repository, stock: Stock, manifests: Sequence[Manifest], progress: PhaseProgress | None) -> None:
    walk = LossWalk(BlobReader(repository.storage, repository.vault, stock.index), stock.index, stock.use)
    total = sum(image.size_bytes for manifest in manifests for _, image in manifest.images)
    done = 0
    # The newest first: its tree lies side by side, and the older ones share most of it.
    for manifest in sorted(manifests, key=lambda manifest: (manifest.time, manifest.backup), reverse=True):
        for part, image in manifest.images:
            lost = manifest.lost_of(part)
            for loss in walk.losses(image):
                _accept(loss, lost, f"{part} of {manifest.backup}")
            done += image.size_bytes
            if progress:
                progress("marking", done, total)


def _accept(loss: Loss, lost: Sequence[LostRange], label: str) -> None:
    """Pass over what the manifest notes as lost."""
    if is_within(lost, loss.offset, loss.length):
        return
    if isinstance(loss.cause, RepositoryError):
        raise loss.cause
    why = loss.cause.message if loss.cause else f"chunk {loss.chunk.hex()[:16]} is missing"
    end = loss.offset + loss.length
    raise DamageFound(f"{label} is damaged from {loss.offset} to {end}: {why}", cure=REPAIR)
