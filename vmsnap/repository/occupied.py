"""What is at a place before a repository is made there."""

from __future__ import annotations

from vmsnap.errors import AlreadyExists, ObjectNotFound
from vmsnap.repository.format import CONFIG_KEY
from vmsnap.roles.storage import StorageBackend


def config_at(storage: StorageBackend) -> bytes | None:
    """The config of the repository there; None where there is none."""
    try:
        return storage.get(CONFIG_KEY)
    except ObjectNotFound:
        return None


def refuse_occupied(storage: StorageBackend) -> None:
    """Return where there is nothing at all.

    :raises AlreadyExists: there is a repository, or something else
    """
    try:
        storage.stat(CONFIG_KEY)
    except ObjectNotFound:
        pass
    else:
        raise AlreadyExists(f"there is a repository at {storage.url} already", cure="choose another place")
    for info in storage.list():
        raise AlreadyExists(f"{storage.url} is not empty: it has {info.key}", cure="choose an empty place")
