"""The local cache of a remote repository's chunks: what is read again is not fetched again, and no more."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_index_cache import Remote
from tests.test_repository_roundtrip import CHEAP, SMALL, back_up
from vmsnap.repository import BytesReader, Manifest, Repository
from vmsnap.repository.chunkcache import ChunkCache
from vmsnap.repository.index import Location
from vmsnap_storage_backends.local import LocalStorage

MIB = 1 << 20
CONTENT = os.urandom(MIB)


class Far(Remote):
    """Counts the bytes that are got of packs."""

    got_bytes = 0

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, offset, length)
        self.got_bytes += len(data) if key.startswith("packs/") else 0
        return data


class Place:
    """A repository with one backup, and a cache."""

    def __init__(self, folder: Path, passphrase: str | None, limit_bytes: int = 64 * MIB) -> None:
        self.folder, self.cache, self.passphrase, self.limit_bytes = folder / "r", folder / "c", passphrase, limit_bytes
        made = Repository.create(Far(self.folder), passphrase, chunks=SMALL, key_cost=CHEAP)
        self.manifest: Manifest = back_up(made, BytesReader(CONTENT))
        self.file = self.cache / made.id / "chunks.sqlite"

    def open(self) -> Repository:
        repository = Repository.open(Far(self.folder), self.passphrase, cache_dir=self.cache)
        repository.chunk_cache_bytes = self.limit_bytes
        return repository

    def fetched(self) -> int:
        """How much is fetched of packs to read the backup, which must be whole."""
        repository = self.open()
        with repository.reader(self.manifest.disks[0].image) as reader:
            buffer = bytearray(reader.size_bytes)
            reader.read_into(0, memoryview(buffer))
        assert bytes(buffer) == CONTENT
        assert isinstance(repository.storage, Far)
        return repository.storage.got_bytes


@pytest.fixture(params=[None, "x"], ids=["plain", "encrypted"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path, request.param)


def test_what_was_read_is_not_fetched_again(place: Place) -> None:
    assert place.fetched() >= len(CONTENT)
    assert place.fetched() == 0
    assert place.file.stat().st_mode & 0o077 == 0
    assert place.file.parent.stat().st_mode & 0o077 == 0


def test_what_lies_there_is_sealed(tmp_path: Path) -> None:
    place = Place(tmp_path, "x")
    place.fetched()
    assert len(place.file.read_bytes()) > len(CONTENT)
    assert CONTENT[:64] not in place.file.read_bytes()


def test_verifying_reads_the_repository_and_not_the_cache(place: Place) -> None:
    place.fetched()
    (pack,) = (
        path for path in (place.folder / "packs").rglob("*") if path.is_file() and path.stat().st_size > MIB // 2
    )
    data = bytearray(pack.read_bytes())
    data[MIB // 2] ^= 1
    pack.write_bytes(data)
    assert place.open().verify(place.manifest.backup).findings
    assert place.fetched() == 0  # and what was whole when it was read is whole


def changed(place: Place, change: Callable[[bytes], bytes]) -> None:
    with sqlite3.connect(place.file) as database:
        rows = database.execute("SELECT place, sealed FROM chunk").fetchall()
        database.executemany("UPDATE chunk SET sealed = ? WHERE place = ?", [(change(b), a) for a, b in rows])
    database.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: os.urandom(len(data)),
    ],
    ids=["flipped", "empty", "longer", "another"],
)
def test_what_is_not_the_true_one_is_fetched_and_kept_anew(place: Place, change: Callable[[bytes], bytes]) -> None:
    first = place.fetched()
    changed(place, change)
    assert place.fetched() >= len(CONTENT)
    assert place.fetched() == 0
    assert first >= len(CONTENT)


def test_chunks_that_changed_places_are_not_taken_for_each_other(place: Place) -> None:
    place.fetched()
    with sqlite3.connect(place.file) as database:
        rows = database.execute("SELECT place, sealed FROM chunk ORDER BY place").fetchall()
        turned = [(sealed, key) for (key, _), (_, sealed) in zip(rows, rows[1:] + rows[:1], strict=True)]
        database.executemany("UPDATE chunk SET sealed = ? WHERE place = ?", turned)
    database.close()
    assert place.fetched() >= len(CONTENT)


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 1000, None])
def test_a_damaged_file_is_made_anew(place: Place, damage: bytes | None) -> None:
    place.fetched()
    for suffix in ("-wal", "-shm"):
        place.file.with_name(place.file.name + suffix).unlink(missing_ok=True)
    if damage is None:
        data = bytearray(place.file.read_bytes())
        data[4096 : len(data) // 2] = os.urandom(len(data) // 2 - 4096)
        damage = bytes(data)
    place.file.write_bytes(damage)
    for _ in range(4):
        left = place.fetched()
    assert left == 0


@pytest.mark.parametrize("how", ["file", "mode", "link"])
def test_a_folder_that_is_not_ours_alone_is_not_used(place: Place, tmp_path: Path, how: str) -> None:
    folder = place.file.parent
    folder.parent.mkdir()
    if how == "file":
        folder.write_bytes(b"")
    elif how == "mode":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert place.fetched() >= len(CONTENT)


def test_it_keeps_to_its_size_and_what_was_not_used_goes_first(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path / "x" / "chunks.sqlite", 4 * MIB)
    places = [Location(bytes([number]) * 32, number, 32_768, 0, 0) for number in range(255)]
    for number, each in enumerate(places):
        cache.put([(each, bytes([number]) * 32_768)])
        if number == 60:
            # What is used is young: let the clock of the first ten say so.
            with sqlite3.connect(cache._file) as database:
                database.execute("UPDATE chunk SET used = used - 1000")
            database.close()
            assert len(cache.get(places[:10])) == 10
    cache.close()
    assert (tmp_path / "x" / "chunks.sqlite").stat().st_size <= 4 * MIB
    found = cache.get(places)
    assert 60 < len(found) < 128
    assert all(found[each] == bytes([each.offset]) * 32_768 for each in found)
    assert not set(places[10:30]) & set(found)
    cache.close()


def test_no_cache_where_it_is_not_worth_while(tmp_path: Path) -> None:
    far, near = Far(tmp_path / "r"), LocalStorage(str(tmp_path / "r"))
    assert ChunkCache.beside(near, tmp_path, "x", 64 * MIB) is None
    assert ChunkCache.beside(far, None, "x", 64 * MIB) is None
    assert ChunkCache.beside(far, tmp_path, "x", 0) is None
    assert ChunkCache.beside(far, tmp_path, "x", 64 * MIB)


_READER = """
import sys
from pathlib import Path
from tests.test_chunk_cache import Far, MIB
from tests.test_repository_roundtrip import content_of
from vmsnap.repository import Repository
import hashlib
repository = Repository.open(Far(Path(sys.argv[1])), "x", cache_dir=Path(sys.argv[2]))
repository.chunk_cache_bytes = 8 * MIB
for _ in range(5):
    (manifest,) = repository.list()
    content = content_of(repository, manifest.disks[0].image)
print(hashlib.sha256(content).hexdigest())
"""


def test_several_processes_use_it_at_once(tmp_path: Path) -> None:
    import hashlib

    place = Place(tmp_path, "x")
    command = [sys.executable, "-c", _READER, place.folder, place.cache]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    readers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for reader in readers:
        said, _ = reader.communicate(timeout=120)
        assert said.strip() == hashlib.sha256(CONTENT).hexdigest()
    assert place.fetched() < len(CONTENT)
