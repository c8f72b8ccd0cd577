"""The local cache of a remote repository's index: it spares getting it again, and is only ever a cache."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_local import small_file_system  # noqa: F401 (a fixture)
from vmsnap.repository import BytesReader, Manifest, Repository
from vmsnap.repository.cache import IndexCache
from vmsnap_storage_backends.local import LocalStorage

CONTENT = os.urandom(100_000)


class Remote(LocalStorage):
    """Counts what is got of the index."""

    remote: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.got: Counter[str] = Counter()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self.got[key] += key.startswith("index/")
        return super().get(key, offset, length)


class Place:
    """A repository with one backup, and a folder for caches."""

    def __init__(self, folder: Path, passphrase: str | None) -> None:
        self.folder = folder / "repository"
        self.cache = folder / "above" / "cache"
        self.passphrase = passphrase
        made = Repository.create(Remote(self.folder), passphrase, chunks=SMALL, key_cost=CHEAP)
        self.manifest: Manifest = back_up(made, BytesReader(CONTENT))
        self.objects = self.cache / made.id / "index"

    def open(self, kind: type[LocalStorage] = Remote) -> Repository:
        storage = Remote(self.folder) if kind is Remote else kind(str(self.folder))
        return Repository.open(storage, self.passphrase, cache_dir=self.cache)

    def fetched(self) -> int:
        """How many index objects a new process gets from the storage to read the backup, which must be whole."""
        repository = self.open()
        assert content_of(repository, self.manifest.disks[0].image) == CONTENT
        assert isinstance(repository.storage, Remote)
        return repository.storage.got.total()

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.objects.iterdir()} if self.objects.exists() else {}

    def stored(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / "index").iterdir()}


@pytest.fixture(params=[None, "pass"], ids=["plain", "encrypted"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(tmp_path, request.param)


def test_the_index_is_got_once_and_lies_here_as_it_lies_there(place: Place) -> None:
    assert [place.fetched(), place.fetched(), place.fetched()] == [1, 0, 0]
    assert place.files() == place.stored()
    back_up(place.open(), BytesReader(CONTENT + b"more"))
    assert [place.fetched(), place.fetched()] == [1, 0]
    assert place.files() == place.stored() and len(place.files()) == 2


def test_nobody_else_can_look_into_it(place: Place) -> None:
    place.fetched()
    assert {path.stat().st_mode & 0o777 for path in place.objects.iterdir()} == {0o600}
    for folder in (place.objects, place.objects.parent, place.cache, place.cache.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_local_storage_and_no_folder_mean_no_cache(place: Place) -> None:
    assert content_of(place.open(LocalStorage), place.manifest.disks[0].image) == CONTENT
    assert content_of(Repository.open(Remote(place.folder), place.passphrase), place.manifest.disks[0].image) == CONTENT
    assert not place.cache.exists()


def _one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _a_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


@pytest.mark.parametrize(
    "harm",
    [
        Path.unlink,
        _one_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
    ],
    ids=["missing", "flipped", "cut", "empty", "longer"],
)
def test_what_is_wrong_in_it_is_got_again_and_put_right(place: Place, harm: Callable[[Path], None]) -> None:
    place.fetched()
    harm(next(place.objects.iterdir()))
    assert [place.fetched(), place.fetched()] == [1, 0]
    assert place.files() == place.stored()


def test_the_object_of_another_repository_or_key_is_not_taken_for_this_ones(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other", place.passphrase)
    place.fetched()
    other.fetched()
    next(place.objects.iterdir()).write_bytes(next(other.objects.iterdir()).read_bytes())
    assert place.fetched() == 1
    back_up(place.open(), BytesReader(CONTENT + b"more"))
    place.fetched()
    first, second = place.objects.iterdir()
    first.write_bytes(second.read_bytes())
    assert place.fetched() == 1 and place.files() == place.stored()


def test_a_cache_that_cannot_be_used_is_no_error(place: Place) -> None:
    place.fetched()
    _a_folder(next(place.objects.iterdir()))
    assert [place.fetched(), place.fetched()] == [1, 1]
    place.cache = place.cache / "file"
    place.cache.write_bytes(b"")
    assert [place.fetched(), place.fetched()] == [1, 1]


def test_a_folder_that_others_can_write_to_is_not_used(place: Place) -> None:
    place.fetched()
    place.objects.chmod(0o777)
    assert [place.fetched(), place.fetched()] == [1, 1]
    place.objects.chmod(0o700)
    assert place.fetched() == 0


def test_a_full_disk_is_no_error_and_leaves_nothing(small_file_system: Path) -> None:  # noqa: F811
    cache = IndexCache(small_file_system / "cache")
    key = f"index/{'0' * 64}"
    cache.put(key, bytes(64 << 20))
    assert cache.get(key) is None
    assert not list((small_file_system / "cache").iterdir())
    cache.put(key, b"small")
    assert cache.get(key) == b"small"


def test_what_is_listed_no_longer_and_what_the_dead_left_goes(place: Place) -> None:
    place.fetched()
    gone, old, young = (place.objects / name for name in ("a" * 64, "unfinished-1-old", "unfinished-2-young"))
    for path in (gone, old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    assert place.fetched() == 0
    assert place.files().keys() == place.stored().keys() | {young.name}


@pytest.mark.parametrize("name", ["..", "../config", "\0", "x" * 300, "Holiday.JPG", "a/b", ""])
def test_names_that_are_not_ours_stay_outside(tmp_path: Path, name: str) -> None:
    cache = IndexCache(tmp_path / "cache")
    cache.put(f"index/{name}", b"x")
    assert cache.get(f"index/{name}") is None
    cache.keep_only([f"index/{name}"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_check_looks_at_the_storage_and_not_at_the_cache(place: Place) -> None:
    place.fetched()
    _one_bit(next((place.folder / "index").iterdir()))
    assert place.fetched() == 0
    assert place.open().check().damaged
