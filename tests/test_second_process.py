"""A restore whose second process writes a share of it: the same bytes, the same errors, and nothing left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up
from vmsnap.errors import DamageFound
from vmsnap.ratelimit import LimitedStorage, RateLimit
from vmsnap.repository import BytesReader, ImageReader, Repository
from vmsnap.repository.second_process import Piece, SecondProcess
from vmsnap_storage_backends.local import LocalStorage

CONTENT = b"".join(os.urandom(12_288) + b"text\n" * 1600 + bytes(4096 * (number % 3)) for number in range(200))

Pieces = Callable[[], Sequence[Piece]]


def children() -> set[int]:
    """The processes that this one has started and not yet buried."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.fixture(params=[None, "correct horse"], ids=["plain", "encrypted"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Repository:
    storage = LocalStorage(str(tmp_path / "repository"))
    return Repository.create(storage, request.param, chunks=SMALL, key_cost=CHEAP)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the second process did of what it was asked for, and what it did not."""
    found: list[bool] = []
    write = SecondProcess.write

    def noted(self: SecondProcess, pieces: Pieces) -> bool:
        found.append(write(self, pieces))
        return found[-1]

    monkeypatch.setattr(SecondProcess, "write", noted)
    return found


def reader_of(repository: Repository) -> ImageReader:
    manifest = back_up(repository, BytesReader(CONTENT))
    return repository.reader(manifest.disks[0].image, "disk0")


def test_it_writes_a_share_and_ends(repository: Repository, answers: list[bool], tmp_path: Path) -> None:
    before = children()
    reader_of(repository).restore_to_file(tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == CONTENT
    assert answers.count(True) >= 3
    assert children() <= before


def test_the_restore_goes_on_without_it_when_it_is_killed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, write = children(), SecondProcess.write
    killed: list[int] = []

    def write_and_kill(self: SecondProcess, pieces: Pieces) -> bool:
        done = write(self, pieces)
        if done and not killed:
            killed.extend(children() - before)
            os.kill(killed[0], signal.SIGKILL)
        return done

    monkeypatch.setattr(SecondProcess, "write", write_and_kill)
    reader_of(repository).restore_to_file(tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == CONTENT
    assert len(set(killed)) == 1
    assert children() <= before


def test_what_is_damaged_is_named_as_without_it(repository: Repository, answers: list[bool], tmp_path: Path) -> None:
    before = children()
    reader = reader_of(repository)
    pack = max((tmp_path / "repository" / "packs").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    with pytest.raises(DamageFound, match=r"disk0 is damaged from .* is not what was written"):
        reader.restore_to_file(tmp_path / "disk")
    assert not (tmp_path / "disk").exists()
    assert True in answers
    assert children() <= before


def test_a_place_in_the_target_that_cannot_be_written_fails_the_restore(
    repository: Repository, answers: list[bool], tmp_path: Path
) -> None:
    reader = reader_of(repository)
    (tmp_path / "disk").write_bytes(b"")
    fd = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            reader.write_data(fd)
    finally:
        os.close(fd)
    assert True not in answers


def test_none_is_started_for_storage_that_it_could_not_open_alike(
    repository: Repository, answers: list[bool], tmp_path: Path
) -> None:
    reader = reader_of(repository)
    limited = LimitedStorage(repository.storage, RateLimit(1 << 30), RateLimit(1 << 30))
    slow = Repository.open(limited, lambda: "correct horse")
    slow.reader(reader.image).restore_to_file(tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == CONTENT
    assert answers and True not in answers
