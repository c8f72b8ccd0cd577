"""The storage contract suite finds what is wrong with a backend: each bad one here fails the scenario that names it."""

from __future__ import annotations

import inspect
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import pytest
from hypothesis import Phase

from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError, UsageError
from vmsnap.model import Finding
from vmsnap.roles import ObjectInfo, StorageBackend, StorageProperties, check_key
from vmsnap.testing.storage import RawObjects, StorageContract, scenarios


class Memory(StorageBackend, RawObjects):
    """A good backend in memory, and its own oracle (`raw`, `read`, `write`, `keys` go past the methods under test)."""

    name: ClassVar[str] = "memory"

    def __init__(self, url: str = "memory:", options: Mapping[str, str] | None = None) -> None:
        super().__init__(url, options or {})
        self.raw: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def read(self, key: str) -> bytes | None:
        return self.raw.get(key)

    def write(self, key: str, data: bytes) -> None:
        self.raw[key] = data

    def keys(self) -> Sequence[str]:
        return list(self.raw)

    def create(self) -> None:
        pass

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        check_key(key)
        with self.lock:
            if if_absent and key in self.raw:
                raise ObjectExists(key)
            self.raw[key] = bytes(data)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self.raw.get(check_key(key))
        if data is None:
            raise ObjectNotFound(key)
        end = len(data) if length is None else offset + length
        if offset > len(data) or end > len(data):
            raise StorageError("past the end")
        return data[offset:end]

    def stat(self, key: str) -> ObjectInfo:
        if check_key(key) not in self.raw:
            raise ObjectNotFound(key)
        return ObjectInfo(key, len(self.raw[key]))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self.lock:
            infos = [ObjectInfo(key, len(data)) for key, data in sorted(self.raw.items()) if key.startswith(prefix)]
        yield from infos

    def delete(self, key: str) -> None:
        self.raw.pop(check_key(key), None)

    def properties(self) -> StorageProperties:
        return StorageProperties(conditional_put=True)

    def doctor(self) -> Sequence[Finding]:
        return [Finding("memory", "ok", "is there")]


class ShortReads(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return super().get(key, offset, length)[: 1 << 16]


class ClampsRanges(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(key)
        return data[offset:] if length is None else data[offset : offset + length]


class IgnoresOffset(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        super().get(key, offset, length)
        return super().get(key, 0, length)


class ListsUnsorted(Memory):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(list(super().list(prefix))[::-1])


class ListsAsFoldersSort(Memory):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(sorted(super().list(prefix), key=lambda info: info.key.split("/")))


class ListsOnePage(Memory):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return itertools.islice(super().list(prefix), 1000)


class ListsFoldersOnly(Memory):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            if not prefix or prefix.endswith("/") or info.key == prefix:
                yield info


class ListsWrongSizes(Memory):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return (ObjectInfo(info.key, info.size_bytes + 1) for info in super().list(prefix))


class ListsTemporaryFiles(Memory):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(super().list(prefix))
        if found:
            found.append(ObjectInfo("zzz.partial", 3))
        return iter(found)


class LeavesTemporaryFiles(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        super().put(key, data, if_absent=if_absent)
        self.raw["zzz.partial"] = b""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return (info for info in super().list(prefix) if not info.key.endswith(".partial"))


class IgnoresIfAbsent(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        super().put(key, data)


class OverwritesAndThenComplains(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        there = key in self.raw
        super().put(key, data)
        if if_absent and there:
            raise ObjectExists(key)


class LooksAndThenWrites(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        if if_absent and check_key(key) in self.raw:
            raise ObjectExists(key)
        time.sleep(0.001)  # the moment between the look and the write, as a network has it
        super().put(key, data)


class NeverReplaces(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        check_key(key)
        if if_absent or key not in self.raw:
            super().put(key, data, if_absent=if_absent)


class DeleteRaises(Memory):
    def delete(self, key: str) -> None:
        self.stat(key)
        super().delete(key)


class DeletesPrefixes(Memory):
    def delete(self, key: str) -> None:
        check_key(key)
        self.raw = {other: data for other, data in self.raw.items() if not other.startswith(key)}


class DeleteDoesNothing(Memory):
    def delete(self, key: str) -> None:
        check_key(key)


class StaleList(Memory):
    seen: tuple[ObjectInfo, ...] = ()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        seen, self.seen = self.seen, tuple(super().list())
        return (info for info in seen if info.key.startswith(prefix))


class StaleReads(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, bytes] = {}

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if check_key(key) not in self.cache:
            self.cache[key] = super().get(key)
        return self.cache[key][offset : None if length is None else offset + length]


class AcceptsAnyKey(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        self.raw[os.path.normpath(key)] = bytes(data)


class ReadsAnyKey(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if key not in self.raw:
            raise ObjectNotFound(key)
        return super().get(key, offset, length)


class TruncatesBigObjects(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        super().put(key, bytes(data)[: 8 << 20], if_absent=if_absent)


class DropsEmptyObjects(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        super().put(key, data, if_absent=if_absent)
        if not len(data):
            del self.raw[key]


class NotFoundIsEmpty(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        return super().get(key, offset, length) if key in self.raw else b""


class ForeignErrors(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return super().get(key, offset, length)
        except ObjectNotFound as e:
            raise FileNotFoundError(key) from e


class BreaksAfterAnError(Memory):
    broken = False

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if self.broken:
            raise StorageError("connection is closed")
        try:
            return super().get(key, offset, length)
        except StorageError:
            self.broken = True
            raise


class SharesABuffer(Memory):
    """Not made for several threads: each put goes through the same buffer."""

    buffer = b""

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        self.buffer = bytes(data)
        time.sleep(0.0005)
        super().put(key, self.buffer, if_absent=if_absent)


class WritesInPlace(Memory):
    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        check_key(key)
        if if_absent and key in self.raw:
            raise ObjectExists(key)
        half = len(data) // 2
        self.raw[key] = bytes(data[:half])
        time.sleep(0.002)
        self.raw[key] += bytes(data[half:])


class CreateWipes(Memory):
    def create(self) -> None:
        self.raw.clear()


class DoctorChanges(Memory):
    def doctor(self) -> Sequence[Finding]:
        self.raw["probe"] = b""
        return super().doctor()


class ForgetsAnother(Memory):
    """Wrong only in a sequence that no numbered scenario makes."""

    def delete(self, key: str) -> None:
        super().delete(key)
        self.raw.pop("b-c", None)


BAD: dict[type[Memory], str] = {
    ShortReads: "test_03_big_object",
    ClampsRanges: "test_05_ranges_past_the_end",
    IgnoresOffset: "test_04_reads_what_is_there",
    ListsUnsorted: "test_10_list_order_and_sizes",
    ListsAsFoldersSort: "test_10_list_order_and_sizes",
    ListsOnePage: "test_12_list_many",
    ListsFoldersOnly: "test_11_list_prefix",
    ListsWrongSizes: "test_10_list_order_and_sizes",
    ListsTemporaryFiles: "test_06_overwrite",
    LeavesTemporaryFiles: "test_09_nothing_but_the_objects_is_left",
    IgnoresIfAbsent: "test_07_if_absent",
    OverwritesAndThenComplains: "test_07_if_absent",
    LooksAndThenWrites: "test_08_if_absent_against_other_writers",
    NeverReplaces: "test_06_overwrite",
    DeleteRaises: "test_14_delete_is_idempotent",
    DeletesPrefixes: "test_14_delete_is_idempotent",
    DeleteDoesNothing: "test_13_list_is_fresh",
    StaleList: "test_13_list_is_fresh",
    StaleReads: "test_06_overwrite",
    AcceptsAnyKey: "test_16_bad_keys",
    ReadsAnyKey: "test_16_bad_keys",
    TruncatesBigObjects: "test_03_big_object",
    DropsEmptyObjects: "test_02_empty_object",
    NotFoundIsEmpty: "test_15_not_found",
    ForeignErrors: "test_15_not_found",
    BreaksAfterAnError: "test_17_errors_leave_it_usable",
    SharesABuffer: "test_18_several_threads",
    WritesInPlace: "test_19_whole_or_not_at_all",
    CreateWipes: "test_21_create_and_properties",
    DoctorChanges: "test_21_create_and_properties",
    ForgetsAnother: "test_22_any_sequence_of_calls",
}


def leaves_half(storage: Memory) -> Callable[[str], None]:
    """A killed put of a backend that writes in place."""

    def kill(key: str) -> None:
        storage.raw[key] = b"hal"

    return kill


def run(scenario: str, storage: Memory, kill_a_put: Callable[[str], None] | None = None) -> None:
    suite = StorageContract()
    suite.state_machine_phases = (Phase.generate,)  # that it fails is enough, the shortest way to it is not needed
    suite.state_machine_examples = 1000 if type(storage) is not Memory else 50  # it ends with the first failure
    method = getattr(suite, scenario)
    fixtures = {"storage": storage, "oracle": storage, "kill_a_put": kill_a_put}
    method(**{name: fixtures[name] for name in inspect.signature(method).parameters})


@pytest.mark.parametrize("scenario", scenarios())
def test_a_good_backend_passes(scenario: str) -> None:
    run(scenario, Memory(), lambda key: None)


@pytest.mark.parametrize(("bad", "scenario"), BAD.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_bad_backend_is_caught_by_the_scenario_that_names_it(bad: type[Memory], scenario: str) -> None:
    failures = (AssertionError, StorageError, ObjectNotFound, UsageError, FileNotFoundError, pytest.fail.Exception)
    with pytest.raises(failures):
        run(scenario, bad())


def test_a_killed_put_that_shows_is_caught() -> None:
    storage = Memory()
    with pytest.raises(AssertionError):
        run("test_20_killed_writer", storage, leaves_half(storage))


def test_every_scenario_catches_somebody() -> None:
    caught = set(BAD.values()) | {"test_20_killed_writer"}
    assert set(scenarios()) - caught == {"test_01_round_trip"}
    with pytest.raises(AssertionError):
        run("test_01_round_trip", ListsNothingRight())


class ListsNothingRight(Memory):
    def stat(self, key: str) -> ObjectInfo:
        return ObjectInfo("x", super().stat(key).size_bytes)
