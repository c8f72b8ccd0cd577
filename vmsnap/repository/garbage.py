"""Condemned packs: ``garbage/<16 hex>`` says which packs garbage collection is going to delete, and for whom it waits.

Whoever writes lists these objects after it has put its session and before it reads the index, and relies on nothing
that lies in a condemned pack. So the only ones who can rely on it are the sessions that were there before.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from vmsnap.errors import DamageFound, ObjectNotFound
from vmsnap.model import from_json, to_json
from vmsnap.repository.format import GARBAGE_PREFIX, ID_BYTES
from vmsnap.repository.seal import BrokenSeal, Vault
from vmsnap.roles.storage import StorageBackend


@dataclass(frozen=True)
class Garbage:
    """What one garbage object holds.

    `packs` are condemned: deleted when all sessions in `awaits` have ended, unless a backup needs them then.
    `leftovers` are packs that no index listed while somebody was writing, who may list them yet: those that are still
    not listed when the sessions have ended are condemned next. `awaits` is None until the sessions have been listed,
    which happens after the object was put.
    """

    key: str
    packs: frozenset[bytes]
    leftovers: frozenset[bytes] = frozenset()
    awaits: frozenset[str] | None = None

    def ready(self, living: Iterable[str]) -> bool:
        """Whether nobody lives any more for whom it waits."""
        return self.awaits is not None and self.awaits.isdisjoint(living)


@dataclass(frozen=True)
class _Stored:
    packs: tuple[str, ...]
    leftovers: tuple[str, ...]
    awaits: tuple[str, ...] | None


def put_garbage(
    storage: StorageBackend, vault: Vault, packs: Iterable[bytes], leftovers: Iterable[bytes] = ()
) -> Garbage:
    """Condemn packs. What is returned does not know yet for whom it waits: see `put_awaited`.

    :raises StorageError: the storage failed
    """
    garbage = Garbage(GARBAGE_PREFIX + secrets.token_hex(8), frozenset(packs), frozenset(leftovers))
    _put(storage, vault, garbage)
    return garbage


def put_awaited(storage: StorageBackend, vault: Vault, garbage: Garbage, sessions: Iterable[str]) -> Garbage:
    """Note for whom a garbage object waits: the sessions that were listed after it had been put.

    :raises StorageError: the storage failed
    """
    garbage = replace(garbage, awaits=frozenset(sessions))
    _put(storage, vault, garbage)
    return garbage


def list_garbage(storage: StorageBackend, vault: Vault) -> dict[str, Garbage | DamageFound]:
    """All garbage objects by their keys; a `DamageFound` for each that is not what was written. Blocks.

    :raises StorageError: the storage failed
    """
    found = {}
    for key in [info.key for info in storage.list(GARBAGE_PREFIX)]:
        with suppress(ObjectNotFound):  # its packs are gone, and were gone from the index before
            found[key] = open_garbage(vault, key, storage.get(key))
    return found


def condemned_packs(storage: StorageBackend, vault: Vault) -> set[bytes]:
    """The packs that nobody may rely on who begins now; to be asked before the index is read. Blocks.

    :raises DamageFound: a garbage object is damaged, so that they cannot be known
    :raises StorageError: the storage failed
    """
    packs: set[bytes] = set()
    for garbage in list_garbage(storage, vault).values():
        if isinstance(garbage, DamageFound):
            raise garbage
        packs |= garbage.packs
    return packs


def open_garbage(vault: Vault, key: str, data: bytes) -> Garbage | DamageFound:
    """The garbage object that is stored under `key`, or what is wrong with it."""
    try:
        stored = from_json(vault.open_object(key, data), _Stored)
        packs, leftovers = (frozenset(map(_pack_id, names)) for names in (stored.packs, stored.leftovers))
    except (BrokenSeal, ValueError):
        return DamageFound(f"{key} is damaged: it is not what was written", cure="run: vmsnap gc")
    return Garbage(key, packs, leftovers, None if stored.awaits is None else frozenset(stored.awaits))


def _put(storage: StorageBackend, vault: Vault, garbage: Garbage) -> None:
    packs, leftovers = (tuple(sorted(pack.hex() for pack in packs)) for packs in (garbage.packs, garbage.leftovers))
    awaits = None if garbage.awaits is None else tuple(sorted(garbage.awaits))
    content = to_json(_Stored(packs, leftovers, awaits)).encode()
    storage.put(garbage.key, vault.seal_object(garbage.key, content))


def _pack_id(name: str) -> bytes:
    pack = bytes.fromhex(name)
    if len(pack) != ID_BYTES:
        raise ValueError(f"{name!r} is no pack")
    return pack
