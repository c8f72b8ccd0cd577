"""Reading an image piece by piece fetches it in large parts, and no more than is near."""

from __future__ import annotations

import os
import random

import pytest

from tests.test_repository_roundtrip import back_up
from tests.test_restore_in_place import Counting
from vmsnap.repository import BytesReader, ChunkSizes, ImageReader, Repository
from vmsnap.testing.rigs import same

CHUNK = 16 << 10
COUNT = 3000


@pytest.fixture
def storage() -> Counting:
    return Counting()


@pytest.fixture
def content() -> bytes:
    data = bytearray(os.urandom(COUNT * CHUNK + 77))
    data[100 * CHUNK : 900 * CHUNK] = bytes(800 * CHUNK)
    return bytes(data)


@pytest.fixture
def reader(storage: Counting, content: bytes) -> ImageReader:
    repository = Repository.create(storage, chunks=ChunkSizes(disk=CHUNK, fanout=64))
    found = repository.reader(back_up(repository, BytesReader(content)).disks[0].image)
    list(found.extents())  # the tree is read by now
    return found


@pytest.mark.parametrize("step", [4096, 100_000, 10 << 20])
def test_a_reader_who_goes_on_is_read_ahead_for(
    storage: Counting, reader: ImageReader, content: bytes, step: int
) -> None:
    before = storage.reads
    found = bytearray(len(content))
    with memoryview(found) as view:
        for at in range(0, len(content), step):
            reader.read_into(at, view[at : at + step])
    assert same(found, content)
    # A part is what one node lists, 64 chunks; chunk by chunk it would be 2200 reads.
    assert storage.reads - before < 2 * COUNT // 64 + 10


def test_a_reader_who_jumps_gets_what_he_asked_for_and_no_more(
    storage: Counting, reader: ImageReader, content: bytes
) -> None:
    dice = random.Random(1)
    for _ in range(200):
        at = dice.randrange(len(content))
        length = min(dice.choice([1, 5000, 3 * CHUNK]), len(content) - at)
        buffer = bytearray(length)
        before = storage.reads
        reader.read_into(at, memoryview(buffer))
        assert same(buffer, content[at : at + length])
        assert storage.reads - before <= 8  # four chunks, wherever they lie, and nodes
