"""Checks the small objects beside backups, index and packs, and finds what does not belong to a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsnap.errors import DamageFound, ObjectNotFound, RepositoryError
from vmsnap.repository.config import decode_config
from vmsnap.repository.findings import DAMAGE, NOTE, Findings
from vmsnap.repository.format import (
    CONFIG_KEY,
    GARBAGE_PREFIX,
    INDEX_PREFIX,
    KEYS_PREFIX,
    MANIFESTS_PREFIX,
    PACKS_PREFIX,
    SESSIONS_PREFIX,
)
from vmsnap.repository.keys import decode_key
from vmsnap.repository.seal import BrokenSeal

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository

_KNOWN = (CONFIG_KEY, GARBAGE_PREFIX, INDEX_PREFIX, KEYS_PREFIX, MANIFESTS_PREFIX, PACKS_PREFIX, SESSIONS_PREFIX)


def check_small_objects(repository: Repository, findings: Findings) -> None:
    """Open config, keys, sessions and condemnations, and look for objects that are not ours. None of them holds
    anything of a backup. Blocks.

    :raises StorageError: the storage failed
    """
    for info in repository.storage.list():
        key = info.key
        if key.startswith((PACKS_PREFIX, INDEX_PREFIX, MANIFESTS_PREFIX)):
            continue  # looked at elsewhere
        if not key.startswith(_KNOWN):
            findings.add(key, f"{key} is not ours", severity=NOTE)
            continue
        try:
            data = repository.storage.get(key)
        except ObjectNotFound:  # a session that ended meanwhile
            continue
        try:
            _open(repository, key, data)
        except DamageFound as e:
            findings.add(key, f"{e.message}{_cure(key)}", severity=DAMAGE)
        except RepositoryError as e:
            findings.add(key, str(e), severity=NOTE)


def _open(repository: Repository, key: str, data: bytes) -> None:
    if key == CONFIG_KEY:
        if decode_config(data) != repository.config:
            raise DamageFound(f"{key} is another one than when the repository was opened")
    elif key.startswith(KEYS_PREFIX):
        decode_key(key, data)
    else:
        try:
            repository.vault.open_object(key, data)
        except BrokenSeal as e:
            raise DamageFound(f"{key} is damaged: it is not what was written") from e


def _cure(key: str) -> str:
    if key.startswith(SESSIONS_PREFIX):
        return "; delete it when no vmsnap uses the repository, or garbage collection waits for it"
    if key.startswith(KEYS_PREFIX):
        return "; its passphrase opens nothing: vmsnap key remove takes it away"
    return ""
