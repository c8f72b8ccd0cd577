"""A rate limit is kept to the byte, by a clock that the test moves; its threads share it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_cli import Scripts
from tests.test_storage_contract import Memory
from vmsnap.errors import StorageError
from vmsnap.places import storage_for
from vmsnap.ratelimit import LimitedStorage, RateLimit


class Clock:
    """Stands still but for those who wait."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return event.is_set()


def limited(rate: float) -> tuple[LimitedStorage, Clock, Clock]:
    up, down = Clock(), Clock()
    storage = LimitedStorage(
        Memory(), RateLimit(rate, clock=up, wait=up.wait), RateLimit(rate, clock=down, wait=down.wait)
    )
    return storage, up, down


def test_so_many_bytes_take_so_many_seconds() -> None:
    storage, up, down = limited(100)
    for number in range(5):
        storage.put(f"x{number}", bytes(250))
    # The last one begins when the four before it have had their time.
    assert up.now == 1000 + 4 * 2.5
    assert up.waits == [2.5] * 4
    assert down.waits == []


def test_both_directions_count_for_themselves_and_ranges_count_what_they_have() -> None:
    storage, up, down = limited(10)
    storage.put("x", bytes(1000))
    assert len(storage.get("x", 100, 50)) == 50
    assert len(storage.get("x")) == 1000  # its length is known behind it
    assert down.now == 1000 + 5
    assert len(storage.get("x", 0, 10)) == 10
    assert down.now == 1000 + 5 + 100
    assert storage.get("x", 0, 0) == b""
    assert up.now == 1000


def test_time_in_which_nothing_moved_is_not_saved_up() -> None:
    storage, up, _ = limited(10)
    storage.put("a", bytes(100))
    up.now += 3600
    storage.put("b", bytes(100))
    storage.put("c", bytes(100))
    assert up.waits == [10]


def test_threads_share_it_and_nobody_goes_before_his_turn() -> None:
    lock, now, begun = threading.Lock(), [0.0], []

    def wait(event: threading.Event, seconds: float) -> None:
        with lock:
            now[0] += seconds

    limit = RateLimit(1000, clock=lambda: now[0], wait=wait)

    def move(_: int) -> None:
        limit.take(100)
        with lock:
            begun.append(now[0])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(move, range(80)))
    assert len(begun) == 80
    # The last of them began when the other 79 had had their tenth of a second, by a clock that only waiting moves.
    assert max(begun) >= 7.9 - 1e-6


def test_who_gives_up_does_not_wait() -> None:
    limit = RateLimit(1)
    limit.take(10**9)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(limit.take, 1)
        while not waiting.done():
            limit.hurry()
        with pytest.raises(StorageError, match="given up"):
            waiting.result()
    limit.take(1)


def test_the_limit_lies_below_the_retries_and_changes_nothing_else(tmp_path: Path) -> None:
    limits = (RateLimit(10**9), RateLimit(10**9))
    storage = storage_for(str(tmp_path / "place"), limits=limits)
    assert (storage.name, storage.remote) == ("file", False)
    storage.create()
    storage.put("x", memoryview(bytes(1000)))
    assert storage.get("x", 990, 10) == bytes(10)
    assert [info.key for info in storage.list()] == ["x"]


def test_on_the_command_line(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path)
    repository = str(tmp_path / "repository")
    scripts.text("init", "-r", repository, "--encryption", "none")
    assert scripts.json("check", "-r", repository, "--read-data", "--limit-rate", "10M/s")["findings"] == []
    for wrong in ("0", "fast", "-1"):
        assert wrong in scripts.error(2, "check", "-r", repository, "--limit-rate", wrong)
