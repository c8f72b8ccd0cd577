"""Keeps what a backup needs from being deleted by anybody for a while, where the storage can and the user wants it.

Retained are the packs with the backup's chunks and tree, its manifest, config and passphrase keys: all that is needed
to restore it. The index is not: it is written anew by every garbage collection, and what it says stands in the packs
too, out of which ``vmsnap repair`` makes it again. Each backup retains anew what it shares with older ones, so nothing
runs out as long as backups go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import numpy as np

from vmsnap.errors import DamageFound
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.format import CONFIG_KEY, KEYS_PREFIX, pack_key
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.seal import Vault
from vmsnap.repository.tree import ImageRecord
from vmsnap.repository.walk import LossWalk
from vmsnap.roles.storage import StorageBackend


def retained_until(storage: StorageBackend) -> datetime | None:
    """Until when what a backup of now needs is to be retained; None where the user does not want it."""
    seconds = storage.retention_seconds
    return None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)


def retain_data(storage: StorageBackend, vault: Vault, images: Iterable[ImageRecord], until: datetime) -> None:
    """Retain all but the manifest of a backup whose data is durable and listed. Reads the index and the trees. Blocks.

    :raises DamageFound: something of these images is not there
    :raises StorageError: the storage failed; some of it may be retained
    """
    index = IndexLoader(storage, vault).load()
    needed = np.zeros(len(index), np.bool_)

    def use(ids: bytes) -> None:
        rows = index.rows(ids)
        needed[rows[rows >= 0]] = True

    walk = LossWalk(BlobReader(storage, vault, index), index, use)
    for image in images:
        for loss in walk.losses(image):
            raise DamageFound(f"what was just stored is not there, from {loss.offset} on", cure="run: vmsnap check")
    keys = [CONFIG_KEY, *(info.key for info in storage.list(KEYS_PREFIX))]
    keys += [pack_key(pack) for pack in sorted(index.sealed_bytes_by_pack(needed))]
    storage.retain(keys, until)


def locked(storage: StorageBackend, keys: Iterable[str]) -> dict[str, datetime]:
    """Which of these objects nobody can delete now, and until when; nothing where retention is not wanted.

    :raises StorageError: the storage failed
    """
    return {} if storage.retention_seconds is None else storage.retained(keys)
