"""Reads manifests from the storage, many at once: listing a repository must not wait for each in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from vmsnap.errors import DamageFound, NewerFormat, ObjectNotFound, RepositoryError, UsageError
from vmsnap.repository.manifest import Manifest, open_manifest
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

_THREADS = 8


def load_manifests(
    storage: StorageBackend, vault: Vault, keys: Sequence[str], on_damage: Callable[[DamageFound], None] | None
) -> Sequence[Manifest]:
    """The manifests under `keys`; those that are deleted meanwhile are passed over. Blocks.

    :param on_damage: told of each that cannot be read, `NewerFormat` where a newer vmsnap wrote it; None: the first
        one raises
    :raises DamageFound: one is damaged
    :raises RepositoryError: a newer vmsnap wrote one
    :raises StorageError: the storage failed
    """
    load = partial(load_manifest, storage, vault)
    if len(keys) <= _THREADS:
        results = [load(key) for key in keys]
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_THREADS, "vmsnap-list") as threads:
            results = list(threads.map(load, keys))
    manifests = []
    for result in results:
        if isinstance(result, Manifest):
            manifests.append(result)
        elif result is not None:
            if on_damage is None:
                raise result
            on_damage(_as_damage(result))
    return manifests


def load_manifest(storage: StorageBackend, vault: Vault, key: str) -> Manifest | DamageFound | RepositoryError | None:
    """The manifest under `key`, or what is wrong with it; None where there is none.

    :raises StorageError: the storage failed
    """
    try:
        return open_manifest(vault, key, storage.get(key))
    except ObjectNotFound:
        return None
    except UsageError:
        return DamageFound(f"{key!r} is no manifest: something else lies among them")
    except (DamageFound, RepositoryError) as e:
        return e


def _as_damage(error: DamageFound | RepositoryError) -> DamageFound:
    return error if isinstance(error, DamageFound) else NewerFormat(error.message, cure=error.cure)
