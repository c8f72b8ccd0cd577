"""Calls that fail for the moment are tried again, others are not, and none that succeeded is said to have failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.test_storage_contract import Memory
from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError, TransientStorageError
from vmsnap.retrying import RetryingStorage, RetryPolicy
from vmsnap.roles import ObjectInfo, StorageBackend
from vmsnap.testing.faults import Effect, Fault, FaultPlan, FaultyStorage
from vmsnap.testing.storage import StorageContract

QUICK = RetryPolicy(attempts=4, first_wait_seconds=0.001, longest_wait_seconds=0.002, patience_seconds=30)
AWAY = TransientStorageError("the storage is away")


def storage_with(*faults: Fault, policy: RetryPolicy = QUICK) -> tuple[RetryingStorage, Memory, FaultPlan]:
    memory, plan = Memory(), FaultPlan(*faults)
    return RetryingStorage(FaultyStorage(memory, plan), policy), memory, plan


class TestRetryingStorageIsStorage(StorageContract):
    @pytest.fixture
    def storage(self, oracle: Memory) -> StorageBackend:
        return RetryingStorage(oracle, QUICK)

    @pytest.fixture
    def oracle(self) -> Memory:
        return Memory()


@pytest.mark.parametrize("effect", [Effect.BEFORE, Effect.AFTER])
def test_every_call_survives_failures_of_the_moment(effect: Effect) -> None:
    methods = ["create", "put", "get", "stat", "list", "delete", "properties"]
    storage, memory, plan = storage_with(*(Fault(name, n, effect, AWAY) for name in methods for n in (1, 2, 3)))
    storage.create()
    storage.put("a", b"1")
    assert storage.get("a") == b"1"
    assert storage.stat("a") == ObjectInfo("a", 1)
    assert list(storage.list()) == [ObjectInfo("a", 1)]
    assert storage.properties().conditional_put
    storage.delete("a")
    assert memory.raw == {}
    assert len(plan.struck) == 3 * len(methods)


def test_the_last_error_is_raised_and_says_how_often_it_was_tried() -> None:
    storage, memory, plan = storage_with(*(Fault("put", n, Effect.BEFORE, AWAY) for n in range(1, 9)))
    with pytest.raises(TransientStorageError, match="is away") as caught:
        storage.put("a", b"1")
    assert plan.counts["put"] == 4
    assert any("tried 4 times" in note for note in caught.value.__notes__)
    assert memory.raw == {}


def test_what_is_final_is_not_tried_again() -> None:
    storage, _, plan = storage_with(Fault("get", 1, Effect.BEFORE, StorageError("forbidden")))
    with pytest.raises(StorageError, match="forbidden"):
        storage.get("a")
    with pytest.raises(ObjectNotFound):
        storage.get("a")
    assert plan.counts["get"] == 2


def test_a_conditional_put_whose_answer_was_lost_has_succeeded() -> None:
    storage, memory, plan = storage_with(Fault("put", 1, Effect.AFTER, AWAY))
    storage.put("a", b"mine", if_absent=True)
    assert memory.raw == {"a": b"mine"}
    assert plan.counts["put"] == 2


def test_a_conditional_put_that_somebody_else_won_has_failed() -> None:
    storage, memory, _ = storage_with(Fault("put", 1, Effect.BEFORE, AWAY))
    memory.write("a", b"hers")
    with pytest.raises(ObjectExists):
        storage.put("a", b"mine", if_absent=True)
    # Without a lost answer an equal object is somebody else's too.
    with pytest.raises(ObjectExists):
        storage.put("a", b"hers", if_absent=True)
    assert memory.raw == {"a": b"hers"}


class BreaksOff(Memory):
    """Each listing breaks off after so many objects."""

    listings = 0

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.listings += 1
        for number, found in enumerate(super().list(prefix)):
            if number == 2 * self.listings:
                raise AWAY
            yield found


def test_a_listing_that_breaks_off_goes_on_where_it_was() -> None:
    memory = BreaksOff()
    for number in range(9):
        memory.write(f"k{number}", bytes(number))
    found = list(RetryingStorage(memory, QUICK).list("k"))
    assert found == [ObjectInfo(f"k{number}", number) for number in range(9)]
    assert memory.listings == 5


def test_a_listing_that_gets_no_further_fails() -> None:
    class Stuck(BreaksOff):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            self.listings = 0
            return super().list(prefix)

    memory = Stuck()
    for number in range(9):
        memory.write(f"k{number}", b"")
    with pytest.raises(TransientStorageError):
        list(RetryingStorage(memory, QUICK).list())


def test_an_overloaded_storage_is_given_more_time() -> None:
    busy = TransientStorageError("slow down", overloaded=True)
    policy = RetryPolicy(attempts=3, first_wait_seconds=0.2, longest_wait_seconds=0.2)
    storage, _, _ = storage_with(*(Fault("put", n, Effect.BEFORE, busy) for n in (1, 2)), policy=policy)
    begun = time.monotonic()
    storage.put("a", b"1")
    assert time.monotonic() - begun >= 0.2


def test_whoever_gives_up_does_not_wait_for_better_times() -> None:
    patient = RetryPolicy(attempts=5, first_wait_seconds=600, longest_wait_seconds=600, patience_seconds=6000)
    busy = TransientStorageError("slow down", overloaded=True)
    storage, memory, plan = storage_with(Fault("put", 1, Effect.BEFORE, busy), policy=patient)
    caught: list[BaseException] = []

    def put() -> None:
        try:
            storage.put("a", b"1")
        except TransientStorageError as e:
            caught.append(e)

    thread = threading.Thread(target=put)
    thread.start()
    deadline = time.monotonic() + 60
    while not plan.struck:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    while thread.is_alive():
        storage.hurry()
        thread.join(0.01)
        assert time.monotonic() < deadline
    assert caught == [busy]
    assert plan.counts["put"] == 1
    storage.put("a", b"2")
    assert memory.raw == {"a": b"2"}
