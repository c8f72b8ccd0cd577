"""Passphrase keys: each ``keys/<id>`` holds the root secret, wrapped by a key made from one passphrase with argon2id
(RFC 9106). Keys can come and go without any data being rewritten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmsnap.errors import DamageFound, RepositoryError, UsageError, WrongPassphrase
from vmsnap.repository.config import decode_text, encode_text
from vmsnap.repository.format import FORMAT_VERSION, KEYS_PREFIX

ROOT_BYTES = 32
# What a key object may ask of the reader, so that a forged one cannot take all memory or time.
_MAX_MEMORY_KIB = 4 << 20
_MAX_TIME_COST = 64
_MAX_LANES = 64


@dataclass(frozen=True)
class KeyCost:
    """What making a key from a passphrase costs: argon2id's parameters; the default is the second recommended choice
    of RFC 9106 section 4.
    """

    time_cost: int = 3
    memory_kib: int = 64 << 10
    lanes: int = 4


@dataclass(frozen=True)
class PassphraseKey:
    """One object below ``keys/``. `salt` and `wrapped` are hex."""

    version: int
    id: str
    created: str
    salt: str
    wrapped: str = field(repr=False)
    kdf: str = "argon2id"
    cost: KeyCost = field(default_factory=KeyCost)
    label: str = ""


def wrap_root(
    root: bytes, passphrase: str, bound: bytes, *, created: str, label: str = "", cost: KeyCost | None = None
) -> tuple[str, bytes]:
    """Make a key object for `passphrase`: its object key and content. Takes a tenth of a second and 64 MiB.

    :param bound: the config's digest
    :raises UsageError: the passphrase is empty
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if not passphrase:
        raise UsageError("the passphrase is empty", cure="give one, or --encryption none")
    cost = cost or KeyCost()
    key_id = os.urandom(8).hex()
    salt = os.urandom(16)
    # The wrapping key is new with its salt and used once, so the nonce may be fixed.
    wrapped = AESGCM(_from_passphrase(passphrase, salt, cost)).encrypt(bytes(12), root, _bound(key_id, bound))
    key = PassphraseKey(FORMAT_VERSION, key_id, created, salt.hex(), wrapped.hex(), cost=cost, label=label)
    return KEYS_PREFIX + key_id, encode_text(key)


def unwrap_root(objects: Mapping[str, bytes], passphrase: str, bound: bytes) -> tuple[str, bytes]:
    """The first key object that `passphrase` opens: its object key, and the root secret.

    :param objects: the key objects by object key
    :param bound: the config's digest
    :raises WrongPassphrase: it opens none of them
    :raises DamageFound: it opens none, and at least one is damaged
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    trouble: DamageFound | RepositoryError | None = None
    for name, data in objects.items():
        try:
            key, salt, wrapped = decode_key(name, data)
        except (DamageFound, RepositoryError) as e:
            trouble = trouble or e
            continue
        try:
            aes = AESGCM(_from_passphrase(passphrase, salt, key.cost))
            return name, aes.decrypt(bytes(12), wrapped, _bound(key.id, bound))
        except InvalidTag:
            continue
    if trouble:
        raise trouble
    raise WrongPassphrase("no key of the repository opens with this passphrase")


def decode_key(name: str, data: bytes) -> tuple[PassphraseKey, bytes, bytes]:
    """The key object stored under `name`, its salt and its wrapped root.

    :raises DamageFound: it is not what was written
    :raises RepositoryError: a newer vmsnap wrote it
    """
    key = decode_text(data, PassphraseKey, name)
    cost = key.cost
    if key.kdf != "argon2id":
        raise RepositoryError(f"{name} uses {key.kdf!r}, unknown here", cure="install a newer vmsnap")
    if not (
        1 <= cost.time_cost <= _MAX_TIME_COST
        and 1 <= cost.lanes <= _MAX_LANES
        and 8 * cost.lanes <= cost.memory_kib <= _MAX_MEMORY_KIB
    ):
        raise DamageFound(f"{name} asks for an impossible amount of work")
    try:
        salt, wrapped = bytes.fromhex(key.salt), bytes.fromhex(key.wrapped)
    except ValueError as e:
        raise DamageFound(f"{name} is damaged: {e}") from e
    if len(salt) != 16 or len(wrapped) != ROOT_BYTES + 16 or name != KEYS_PREFIX + key.id:
        raise DamageFound(f"{name} is damaged or not in its place")
    return key, salt, wrapped


def _bound(key_id: str, config_digest: bytes) -> bytes:
    return b"vmsnap key:" + config_digest + key_id.encode()


def _from_passphrase(passphrase: str, salt: bytes, cost: KeyCost) -> bytes:
    from argon2.exceptions import HashingError
    from argon2.low_level import Type, hash_secret_raw

    try:
        return hash_secret_raw(
            passphrase.encode(),
            salt,
            time_cost=cost.time_cost,
            memory_cost=cost.memory_kib,
            parallelism=cost.lanes,
            hash_len=32,
            type=Type.ID,
        )
    except HashingError as e:
        raise RepositoryError(f"the passphrase key could not be made: {e}") from e
