"""Small repositories in memory, to be damaged."""

from __future__ import annotations

import os

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up
from tests.test_storage_contract import Memory
from vmsnap.repository import (
    BackupStats,
    BytesReader,
    DiskImage,
    ImageRecord,
    Manifest,
    RepairReport,
    Repository,
)
from vmsnap.repository.format import BlobKind, pack_key


def make(passphrase: str | None) -> tuple[Memory, Repository, list[bytes], list[Manifest]]:
    storage = Memory()
    repository = Repository.create(storage, passphrase, chunks=SMALL, key_cost=CHEAP)
    shared = os.urandom(6000)
    contents = [shared + os.urandom(9000), shared + bytes(5000) + b"text" * 4000]
    manifests = [back_up(repository, BytesReader(content), vm=f"vm{n}") for n, content in enumerate(contents)]
    return storage, repository, contents, manifests


def flip(storage: Memory, key: str, position: int) -> None:
    broken = bytearray(storage.raw[key])
    broken[position] ^= 1
    storage.raw[key] = bytes(broken)


def pack_of(repository: Repository, chunk: bytes, kind: BlobKind = BlobKind.DATA) -> tuple[str, int]:
    """The object that holds a chunk, and where in it."""
    place = repository.index(refresh=True).find(repository.vault.chunk_id(kind, chunk))
    assert place
    return pack_key(place.pack), place.offset


def lost(report: RepairReport) -> list[tuple[str, str, tuple[tuple[int, int], ...]]]:
    return [(touch.backup, touch.part, touch.ranges) for touch in report.lost]


def only(storage: Memory, prefix: str) -> str:
    (key,) = [key for key in storage.raw if key.startswith(prefix)]
    return key


def manifest_with(**changes: object) -> Manifest:
    image = ImageRecord(5, 4096, 4, 1, "00" * 32)
    fields: dict[str, object] = {
        "vm": "vm1",
        "hypervisor": "qemu",
        "mode": "live",
        "backup": "vm1-20261123T021530Z-a1b2c3",
        "time": "2026-11-23T02:15:30Z",
        "stats": BackupStats(1, 2, 3.0),
        "vmsnap": "0",
        "disks": (DiskImage("disk0", 5, "raw", "/x", "file", image),),
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def image_with(**changes: object) -> ImageRecord:
    return ImageRecord(**({"size_bytes": 5, "chunk_bytes": 4096, "fanout": 4, "depth": 1, "root": "00" * 32} | changes))  # type: ignore[arg-type]


def seal_plain(manifest: Manifest) -> bytes:
    from vmsnap.model import to_json

    return to_json(manifest).encode()
