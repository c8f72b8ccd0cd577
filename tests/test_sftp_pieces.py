"""What stands in for a channel's buffer gives what came, in order, and says when nothing more comes."""

from __future__ import annotations

from threading import Event, Thread

import pytest
from paramiko.buffered_pipe import PipeTimeout

from vmsnap_storage_backends.sftp.pieces import Pieces


def test_pieces_are_given_as_they_came_or_in_part() -> None:
    pieces = Pieces()
    whole = bytes(100)
    pieces.feed(whole)
    pieces.feed(b"defg")
    assert len(pieces) == 104 and pieces.read_ready()
    assert pieces.read(1000) is whole
    assert (pieces.read(3), pieces.read(3), len(pieces)) == (b"def", b"g", 0)
    pieces.feed(b"ab")
    pieces.feed(b"cd")
    assert pieces.empty() == b"abcd" and not pieces.read_ready()


def test_a_reader_waits_for_what_comes_and_no_longer_than_it_may() -> None:
    pieces = Pieces()
    with pytest.raises(PipeTimeout):
        pieces.read(10, 0.01)
    feeder = Thread(target=pieces.feed, args=(b"late",))
    feeder.start()
    assert pieces.read(10, 30) == b"late"
    feeder.join()
    closer = Thread(target=pieces.close)
    closer.start()
    assert pieces.read(10, 30) == b""
    closer.join()


def test_what_came_before_the_end_is_given() -> None:
    pieces = Pieces()
    pieces.feed(b"last")
    pieces.close()
    assert (pieces.read(10), pieces.read(10)) == (b"last", b"")


def test_an_event_says_whether_reading_would_wait() -> None:
    pieces, event = Pieces(), Event()
    pieces.set_event(event)
    assert not event.is_set()
    pieces.feed(b"x")
    assert event.is_set()
    pieces.read(1)
    assert not event.is_set()
    pieces.close()
    assert event.is_set()


def test_who_gathers_wakes_when_all_is_there_or_nothing_comes_for_a_moment() -> None:
    pieces = Pieces()
    pieces.feed(b"ab")
    pieces.gather(3)
    assert pieces.read(10) == b"ab"
    feeder = Thread(target=lambda: [pieces.feed(bytes(1000)) for _ in range(1000)])
    feeder.start()
    came = 0
    while came < 1_000_000:
        pieces.gather(1_000_000 - came)
        came += len(pieces.read(1000, 30))
    feeder.join()
    assert came == 1_000_000 and not pieces.read_ready()
    closer = Thread(target=pieces.close)
    closer.start()
    pieces.gather(1)
    closer.join()
    assert pieces.read(10) == b""
