"""Packs: objects of tens of MiB that hold blobs one after the other and end with a list of them.

Layout: the magic, the sealed blobs without gaps, the sealed trailer (an entry per blob, in order), the trailer's
length (4 bytes, little-endian), the end magic. Whoever has lost the index rebuilds it from the trailers.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vmsnap.errors import DamageFound
from vmsnap.repository.format import MAX_CHUNK_BYTES, TAG_BYTES, BlobKind, Codec, pack_key
from vmsnap.repository.seal import BrokenSeal, Vault
from vmsnap.roles.storage import StorageBackend

PACK_BYTES = 32 << 20
"""Packs are closed before they grow beyond this."""
MAGIC = b"VMSNAPP1"
END_MAGIC = b"1PVM"
ENTRY = struct.Struct("<32sIIIB")
"""An entry of trailer and index: id, offset in the pack, sealed length, length of the content, flags."""
FOOTER = struct.Struct("<I4s")
_TRAILER_ROOM = TAG_BYTES + FOOTER.size


class Entry(NamedTuple):
    """Where a blob lies in its pack, and what it is. `flags`: the kind in the lower four bits, the codec above."""

    id: bytes
    offset: int
    sealed_bytes: int
    raw_bytes: int
    flags: int


def flags_of(kind: BlobKind, codec: Codec) -> int:
    """Kind and codec in one byte."""
    return kind | codec << 4


class Slot(NamedTuple):
    """A place in a pack that is kept for one blob."""

    entry: Entry
    target: memoryview


class PackBuilder:
    """A pack that is being filled, in memory. Places in it are reserved by one thread at a time, and filled by several
    at once.
    """

    def __init__(self, vault: Vault, buffer: bytearray | memoryview) -> None:
        """:param buffer: where the pack is built; as long as the pack may become"""
        self.id = os.urandom(32)
        self._cipher = vault.pack_cipher(self.id)
        self._vault = vault
        self._buffer = buffer
        self._entries: list[bytes] = []
        self._used = len(MAGIC)
        buffer[: self._used] = MAGIC

    def has_room(self, plain_bytes: int) -> bool:
        """Say whether a blob of that length still fits."""
        trailer = (len(self._entries) + 1) * ENTRY.size + _TRAILER_ROOM
        return self._used + plain_bytes + TAG_BYTES + trailer <= len(self._buffer)

    def reserve(self, chunk_id: bytes, kind: BlobKind, codec: Codec, raw_bytes: int, plain_bytes: int) -> Slot:
        """Keep a place for a blob of `plain_bytes` as they are going to be sealed; there must be room."""
        entry = Entry(chunk_id, self._used, plain_bytes + TAG_BYTES, raw_bytes, flags_of(kind, codec))
        self._used += entry.sealed_bytes
        self._entries.append(ENTRY.pack(*entry))
        return Slot(entry, memoryview(self._buffer)[entry.offset : self._used])

    def fill(self, slot: Slot, data: bytes | memoryview) -> None:
        """Seal a blob into its place; once."""
        entry = slot.entry
        bound = self._vault.blob_bound(entry.id, entry.flags, entry.raw_bytes)
        self._cipher.seal_into(entry.offset, data, bound, slot.target)
        slot.target.release()

    def append(self, chunk_id: bytes, kind: BlobKind, codec: Codec, raw_bytes: int, data: bytes | memoryview) -> None:
        """Seal and add a blob; there must be room."""
        self.fill(self.reserve(chunk_id, kind, codec, raw_bytes, len(data)), data)

    def finish(self) -> tuple[memoryview, bytes]:
        """Close the pack, all of whose places are filled: its bytes (a view of the buffer) and its entries, packed."""
        entries = b"".join(self._entries)
        sealed = self._cipher.seal(self._used, entries, self._vault.trailer_bound())
        tail = sealed + FOOTER.pack(len(sealed), END_MAGIC)
        end = self._used + len(tail)
        self._buffer[self._used : end] = tail
        return memoryview(self._buffer)[:end], entries


def read_trailer(storage: StorageBackend, vault: Vault, pack: bytes, pack_bytes: int) -> bytes:
    """The entries of a stored pack, packed, without reading its blobs.

    :raises DamageFound: the pack is damaged there
    :raises ObjectNotFound: there is no such pack
    """
    key = pack_key(pack)
    if pack_bytes < len(MAGIC) + _TRAILER_ROOM:
        raise DamageFound(f"{key} is damaged: too short")
    length = _trailer_bytes(key, storage.get(key, pack_bytes - FOOTER.size, FOOTER.size), pack_bytes)
    offset = pack_bytes - FOOTER.size - length
    return _open_trailer(vault, pack, offset, memoryview(storage.get(key, offset, length)))


def open_pack(vault: Vault, pack: bytes, data: bytes) -> bytes:
    """Check the frame of a whole pack, that is, all but its blobs, and return its entries, packed.

    :raises DamageFound: the pack's frame or trailer is damaged
    """
    key = pack_key(pack)
    if len(data) < len(MAGIC) + _TRAILER_ROOM or not data.startswith(MAGIC):
        raise DamageFound(f"{key} is damaged: it does not begin as a pack does")
    length = _trailer_bytes(key, data[-FOOTER.size :], len(data))
    offset = len(data) - FOOTER.size - length
    return _open_trailer(vault, pack, offset, memoryview(data)[offset : offset + length])


def check_blobs(vault: Vault, pack: bytes, data: bytes, entries: bytes) -> Iterator[tuple[Entry, bool]]:
    """Yield for each of `entries` whether its blob is intact in the whole pack `data`."""
    view = memoryview(data)
    cipher = vault.pack_cipher(pack)
    for fields in ENTRY.iter_unpack(entries):
        entry = Entry(*fields)
        bound = vault.blob_bound(entry.id, entry.flags, entry.raw_bytes)
        try:
            cipher.open(entry.offset, view[entry.offset : entry.offset + entry.sealed_bytes], bound)
        except BrokenSeal:
            yield entry, False
        else:
            yield entry, True


def _trailer_bytes(key: str, footer: bytes, pack_bytes: int) -> int:
    length, magic = FOOTER.unpack(footer)
    if magic != END_MAGIC or not TAG_BYTES <= length <= pack_bytes - len(MAGIC) - FOOTER.size:
        raise DamageFound(f"{key} is damaged: it does not end as a pack does")
    return int(length)


def _open_trailer(vault: Vault, pack: bytes, offset: int, sealed: memoryview) -> bytes:
    try:
        entries = bytes(vault.pack_cipher(pack).open(offset, sealed, vault.trailer_bound()))
    except BrokenSeal as e:
        raise DamageFound(f"{pack_key(pack)} is damaged: its list of blobs is not what was written") from e
    expected = len(MAGIC)
    whole = len(entries) % ENTRY.size == 0
    for _, start, sealed_bytes, raw_bytes, _flags in ENTRY.iter_unpack(entries) if whole else ():
        whole = whole and start == expected and sealed_bytes >= TAG_BYTES and raw_bytes <= MAX_CHUNK_BYTES
        expected += sealed_bytes
    if not whole or expected != offset:
        raise DamageFound(f"{pack_key(pack)} is damaged: its list of blobs does not fit its size")
    return entries
