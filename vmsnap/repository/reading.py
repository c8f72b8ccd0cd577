"""The reading of one backup that somebody else may remove meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmsnap.errors import DamageFound, RepositoryError
from vmsnap.repository.format import manifest_key

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository


@contextmanager
def reading(repository: Repository, backup: str, purpose: str) -> Iterator[None]:
    """A session (`Repository.session`) around the reading of a backup, to be entered before its manifest is read. What
    looks like damage is one only where the backup is still there: somebody may forget it, or its writer take it back.

    :param backup: its id, or the beginning of it
    :param purpose: for people who wait for it
    :raises RepositoryError: the backup was removed meanwhile
    """
    with repository.session("read", purpose):
        try:
            yield
        except DamageFound as e:
            if any(True for _ in repository.storage.list(manifest_key(backup))):
                raise
            raise RepositoryError(
                f"backup {backup} was removed from the repository while it was read",
                cure="vmsnap list shows those that are there",
            ) from e
