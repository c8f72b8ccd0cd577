"""Ids and seals: everything that is derived from the repository's root secret.

Sealing adds `TAG_BYTES` and binds the bytes to their place: to the repository, to the pack and offset or the object
key, and to what the blob is. In an encrypted repository the seal is AES-256-GCM (NIST SP 800-38D); in one without
encryption the same layout holds the plain bytes and a keyed BLAKE3 tag, so that damage and misplaced bytes are found
there too (forgery is not: its key stands in the config).

No nonce can repeat: each pack and each sealed object has a key of its own, derived from 32 random bytes; within a
pack the nonce is the blob's offset.
"""

from __future__ import annotations

import os
import struct
from typing import Protocol

from blake3 import blake3

from vmsnap.repository.format import TAG_BYTES, BlobKind

SALT_BYTES = 32
_OBJECT_MAGIC = b"VMSNAPO1"

# Contexts of BLAKE3's key derivation: hard-coded, unique in the world, never to be changed.
_ID_CONTEXTS = {
    BlobKind.DATA: "vmsnap 2026-11-23 repository v1 id of a data chunk",
    BlobKind.TREE: "vmsnap 2026-11-23 repository v1 id of a tree node",
}
_PACK_CONTEXT = "vmsnap 2026-11-23 repository v1 key of a pack"
_OBJECT_CONTEXT = "vmsnap 2026-11-23 repository v1 key of an object"


class BrokenSeal(Exception):
    """The bytes are not what was sealed in this place. Raised to this package only, which names what it touches."""


class Cipher(Protocol):
    """Seals and opens the bytes of one pack, or one object."""

    def seal(self, offset: int, plain: bytes | memoryview, bound: bytes) -> bytes:
        """Return the sealed bytes, `TAG_BYTES` longer. An offset is never used twice."""

    def seal_into(self, offset: int, plain: bytes | memoryview, bound: bytes, target: memoryview) -> None:
        """Write the sealed bytes to `target`, which is exactly so long. An offset is never used twice."""

    def open(self, offset: int, sealed: memoryview, bound: bytes) -> bytes | memoryview:
        """Return the plain bytes.

        :raises BrokenSeal: they are not what was sealed with this offset and `bound`
        """


class _AesGcm:
    def __init__(self, key: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aes = AESGCM(key)
        self._invalid = InvalidTag

    def seal(self, offset: int, plain: bytes | memoryview, bound: bytes) -> bytes:
        return self._aes.encrypt(offset.to_bytes(12, "big"), plain, bound)

    def seal_into(self, offset: int, plain: bytes | memoryview, bound: bytes, target: memoryview) -> None:
        self._aes.encrypt_into(offset.to_bytes(12, "big"), plain, bound, target)

    def open(self, offset: int, sealed: memoryview, bound: bytes) -> bytes | memoryview:
        try:
            return self._aes.decrypt(offset.to_bytes(12, "big"), sealed, bound)
        except (self._invalid, ValueError) as e:
            raise BrokenSeal from e


class _TaggedPlain:
    def __init__(self, key: bytes) -> None:
        self._key = key

    def _tag(self, offset: int, plain: bytes | memoryview, bound: bytes) -> bytes:
        hasher = blake3(struct.pack("<QI", offset, len(bound)) + bound, key=self._key)
        return hasher.update(plain).digest(length=TAG_BYTES)

    def seal(self, offset: int, plain: bytes | memoryview, bound: bytes) -> bytes:
        return b"".join((plain, self._tag(offset, plain, bound)))

    def seal_into(self, offset: int, plain: bytes | memoryview, bound: bytes, target: memoryview) -> None:
        target[:-TAG_BYTES] = memoryview(plain).cast("B")
        target[-TAG_BYTES:] = self._tag(offset, plain, bound)

    def open(self, offset: int, sealed: memoryview, bound: bytes) -> bytes | memoryview:
        if len(sealed) < TAG_BYTES:
            raise BrokenSeal
        plain = sealed[:-TAG_BYTES]
        if sealed[-TAG_BYTES:] != self._tag(offset, plain, bound):
            raise BrokenSeal
        return plain


class Vault:
    """The keys of one repository, all derived from `root` (32 secret bytes)."""

    def __init__(self, root: bytes, repository_id: bytes, *, encrypted: bool) -> None:
        self.encrypted = encrypted
        self._repository_id = repository_id
        self._secret = root + repository_id
        self._id_keys = {kind: self._derive(context, b"") for kind, context in _ID_CONTEXTS.items()}

    def __repr__(self) -> str:
        return f"Vault({self._repository_id.hex()})"

    def _derive(self, context: str, salt: bytes) -> bytes:
        return blake3(self._secret + salt, derive_key_context=context).digest()

    def _cipher(self, key: bytes) -> Cipher:
        return _AesGcm(key) if self.encrypted else _TaggedPlain(key)

    def chunk_id(self, kind: BlobKind, content: bytes | memoryview) -> bytes:
        """The id of a blob with that content: keyed, so that ids tell nothing to those without the key."""
        return blake3(content, key=self._id_keys[kind]).digest()

    def pack_cipher(self, pack: bytes) -> Cipher:
        """The cipher of one pack. Its id is random and is the salt of its key."""
        return self._cipher(self._derive(_PACK_CONTEXT, pack))

    def blob_bound(self, chunk_id: bytes, flags: int, raw_bytes: int) -> bytes:
        """What a blob is bound to besides its pack and offset."""
        return struct.pack("<5s16sBI", b"blob:", self._repository_id, flags, raw_bytes) + chunk_id

    def trailer_bound(self) -> bytes:
        """What a pack's trailer is bound to besides its pack and offset."""
        return b"trailer:" + self._repository_id

    def seal_object(self, key: str, content: bytes) -> bytes:
        """Seal a whole object that is going to be stored under `key` and is valid nowhere else."""
        salt = os.urandom(SALT_BYTES)
        sealed = self._cipher(self._derive(_OBJECT_CONTEXT, salt)).seal(0, content, self._object_bound(key))
        return _OBJECT_MAGIC + salt + sealed

    def open_object(self, key: str, data: bytes) -> bytes:
        """Open what `seal_object` made for `key`.

        :raises BrokenSeal: it is anything else
        """
        start = len(_OBJECT_MAGIC) + SALT_BYTES
        if len(data) < start + TAG_BYTES or not data.startswith(_OBJECT_MAGIC):
            raise BrokenSeal
        cipher = self._cipher(self._derive(_OBJECT_CONTEXT, data[len(_OBJECT_MAGIC) : start]))
        return bytes(cipher.open(0, memoryview(data)[start:], self._object_bound(key)))

    def _object_bound(self, key: str) -> bytes:
        return b"object:" + self._repository_id + key.encode()
