"""The contract of `vmsnap.roles.StorageBackend` as tests: inherit `StorageContract` and give it two fixtures.

::

    class TestMyStorage(StorageContract):
        @pytest.fixture
        def storage(self, my_server):
            backend = MyStorage(my_server.url, {})
            backend.create()
            yield backend
            backend.close()

        @pytest.fixture
        def oracle(self, my_server):
            return MyOracle(my_server)  # a RawObjects that does not use MyStorage

Each scenario quotes the sentence of the contract that it tests. What no test can show is not claimed: that an object
survives a power cut after `put` has returned.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError, TransientStorageError, UsageError
from vmsnap.roles import ObjectInfo, StorageBackend, StorageProperties
from vmsnap.testing.rigs import same
from vmsnap.testing.sentences import Scenarios

T = TypeVar("T")
_TRIES = 20


def patiently(ask: Callable[[], T]) -> T:
    """Ask again where what failed may succeed then, as with a server that many ask at once."""
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except TransientStorageError:
            continue
    return ask()


BAD_KEYS = (
    "",
    "/etc/passwd",
    "../x",
    "packs/../../x",
    "packs/./x",
    "packs//x",
    "packs/",
    ".hidden",
    "packs/.hidden",
    "Upper",
    "space x",
    "null\0x",
    "line\n",
    "-option",
    "back\\slash",
    "ü",
    "x" * 201,
)
"""None of these is a key: each must be refused before it is used."""


class RawObjects(ABC):
    """The oracle: looks at the storage behind the backend's back (files, another client, the server's own memory)."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The object of that key; None where there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object."""

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """The keys of all objects, in any order, and whatever else is there that a backend could show by mistake,
        temporary files of finished calls included.
        """


class StorageContract(Scenarios):
    """Inherit this, and override the fixtures `storage` and `oracle`; `kill_a_put` where writers are processes."""

    role = "StorageBackend"

    big_object_bytes = 9 << 20
    many_objects = 1100
    """More than one page of any listing."""
    state_machine_examples = 50
    state_machine_phases: tuple[Phase, ...] = (Phase.generate, Phase.shrink)

    @pytest.fixture
    def storage(self) -> StorageBackend:
        """A backend at a fresh, empty place that `create` has made."""
        raise TypeError("a storage contract needs a fixture 'storage'")

    @pytest.fixture
    def oracle(self) -> RawObjects:
        """Looks at the same place without the backend."""
        raise TypeError("a storage contract needs a fixture 'oracle'")

    @pytest.fixture
    def kill_a_put(self) -> Callable[[str], None] | None:
        """Begins a put of that key in another process and kills that process in the middle of it; None: the storage
        has no such thing.
        """
        return None

    # -- put and get

    def test_01_round_trip(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """After `put` returns the object is durable and whole."""
        data = bytes(range(256)) * 5
        for key in ("config", "packs/ab/ab-cd.ef_01", "0", "x" * 200):
            for kind in (bytes, bytearray, memoryview):
                storage.put(key, kind(data))
                assert same(oracle.read(key), data)
                assert same(storage.get(key), data)
            assert storage.stat(key) == ObjectInfo(key, len(data))

    def test_02_empty_object(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """An empty object is an object."""
        storage.put("empty", b"")
        assert oracle.read("empty") == b""
        assert storage.get("empty") == b""
        assert storage.stat("empty").size_bytes == 0
        assert list(storage.list()) == [ObjectInfo("empty", 0)]

    def test_03_big_object(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """Objects may have tens of MiB; any part of any buffer can be given."""
        data = os.urandom(self.big_object_bytes)
        storage.put("packs/big", memoryview(data)[1:])
        assert same(oracle.read("packs/big"), data[1:])
        assert same(storage.get("packs/big"), data[1:])

    def test_04_reads_what_is_there(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """`get` returns the object, or exactly the range of `length` bytes from `offset` (to its end where None)."""
        data = os.urandom(300_000)
        oracle.write("packs/data", data)
        assert same(storage.get("packs/data"), data)
        for offset, length in ((0, 1), (1, 131_072), (299_999, 1), (0, 300_000), (70_000, 0), (300_000, 0)):
            assert same(storage.get("packs/data", offset, length), data[offset : offset + length])
        for offset in (0, 123_456, 300_000):
            assert same(storage.get("packs/data", offset), data[offset:])

    def test_05_ranges_past_the_end(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """`StorageError` is raised when the range reaches past the end, or the read came short."""
        oracle.write("data", b"0123456789")
        for offset, length in ((0, 11), (5, 6), (10, 1), (11, 0), (1000, 5), (11, None)):
            with pytest.raises(StorageError):
                storage.get("data", offset, length)
        assert storage.get("data") == b"0123456789"

    def test_06_overwrite(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """An object of that key is replaced, unless `if_absent`; a `get` after a `put` sees it."""
        for data in (b"first, and longer", b"second", b"", b"the third"):
            storage.put("manifests/x", data)
            assert same(oracle.read("manifests/x"), data)
            assert same(storage.get("manifests/x"), data)
            assert storage.stat("manifests/x").size_bytes == len(data)
        assert [info.key for info in storage.list()] == ["manifests/x"]

    def test_07_if_absent(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """`ObjectExists` is raised when `if_absent` and an object is there (it is untouched)."""
        storage.put("keys/new", b"one", if_absent=True)
        oracle.write("keys/old", b"old")
        for key, data in (("keys/new", b"one"), ("keys/old", b"old")):
            with pytest.raises(ObjectExists):
                storage.put(key, b"another", if_absent=True)
            assert same(oracle.read(key), data)

    def test_08_if_absent_against_other_writers(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """With `conditional_put`, ``put(if_absent=True)`` is atomic against other writers."""
        if not storage.properties().conditional_put:
            return
        writers = 8
        for attempt in range(10):
            key = f"race-{attempt}"
            start = threading.Barrier(writers)

            def write(number: int, key: str = key, start: threading.Barrier = start) -> int | None:
                start.wait()
                try:
                    storage.put(key, bytes([number]) * 50_000, if_absent=True)
                except ObjectExists:
                    return None
                return number

            with ThreadPoolExecutor(writers) as threads:
                winners = [number for number in threads.map(write, range(writers)) if number is not None]
            assert len(winners) == 1
            assert same(oracle.read(key), bytes(winners) * 50_000)

    def test_09_nothing_but_the_objects_is_left(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """Finished calls leave nothing behind, refused ones neither."""
        storage.put("a/b", b"1")
        storage.put("a/b", b"2")
        with pytest.raises(ObjectExists):
            storage.put("a/b", b"3", if_absent=True)
        storage.put("c", b"4")
        storage.delete("c")
        assert sorted(oracle.keys()) == ["a/b"]

    # -- list

    def test_10_list_order_and_sizes(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """`list` yields every object … in ascending order of keys."""
        keys = ["a/b", "a-b/c", "a.b", "a0", "a/b-c", "a/b0", "b", "a_/x", "0", "a-b.c", "zz/y/x/w", "a/c/d"]
        for number, key in enumerate(keys):
            oracle.write(key, bytes(number))
        expected = [ObjectInfo(key, keys.index(key)) for key in sorted(keys)]
        assert list(storage.list()) == expected

    def test_11_list_prefix(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """… whose key begins with `prefix` (a plain string prefix)."""
        keys = [
            "index/1",
            "indexes/1",
            "manifests/vm1-1",
            "manifests/vm1-2",
            "manifests/vm10-1",
            "manifest",
            "packs/a/b",
        ]
        for key in keys:
            oracle.write(key, b"x")
        prefixes = [
            "",
            "i",
            "index",
            "index/",
            "manifests/vm1",
            "manifests/vm1-",
            "packs/a/b",
            "packs/a/b/",
            "q",
            "/",
            "..",
        ]
        prefixes += ["../", "manifests/vm10-1x", "packs/a", "packs//"]
        for prefix in prefixes:
            found = [info.key for info in storage.list(prefix)]
            assert found == sorted(key for key in keys if key.startswith(prefix)), prefix

    def test_12_list_many(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """`list` yields *every* object, however many pages the storage needs for it."""
        keys = [f"packs/{number % 7}/{number:05d}" for number in range(self.many_objects)]
        for key in keys:
            oracle.write(key, b"x")
        assert [info.key for info in storage.list("packs/")] == sorted(keys)
        assert [info.key for info in storage.list()] == sorted(keys)

    def test_13_list_is_fresh(self, storage: StorageBackend) -> None:
        """A `list` or `get` that begins after a `put` or `delete` has returned sees it."""
        assert list(storage.list()) == []
        for number in range(20):
            key = f"index/{number:02d}"
            storage.put(key, b"x" * number)
            assert storage.get(key) == b"x" * number
            assert ObjectInfo(key, number) in list(storage.list("index/"))
        for number in range(20):
            key = f"index/{number:02d}"
            storage.delete(key)
            assert key not in [info.key for info in storage.list("index/")]
            with pytest.raises(ObjectNotFound):
                storage.get(key)

    # -- delete, and what is not there

    def test_14_delete_is_idempotent(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """Deleting what is not there succeeds."""
        storage.delete("never/was")
        oracle.write("packs/x", b"x")
        oracle.write("packs/xy", b"y")
        storage.delete("packs/x")
        storage.delete("packs/x")
        storage.delete("packs")
        assert oracle.read("packs/x") is None
        assert oracle.read("packs/xy") == b"y"
        storage.put("packs/x", b"again", if_absent=True)
        assert oracle.read("packs/x") == b"again"

    def test_15_not_found(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """`ObjectNotFound` is raised where there is no such object; the beginning of a key is no object."""
        oracle.write("packs/ab/cd", b"x")
        for key in ("nothing", "packs", "packs/ab", "packs/ab/c", "packs/ab/cd/e", "pack"):
            with pytest.raises(ObjectNotFound):
                storage.get(key)
            with pytest.raises(ObjectNotFound):
                storage.get(key, 0, 1)
            with pytest.raises(ObjectNotFound):
                storage.stat(key)

    def test_16_bad_keys(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """Keys are checked by `check_key` before they are used."""
        for key in BAD_KEYS:
            for call in (storage.get, storage.stat, storage.delete, lambda bad: storage.put(bad, b"evil")):
                with pytest.raises(UsageError):
                    call(key)
        assert list(oracle.keys()) == []

    # -- the whole

    def test_17_errors_leave_it_usable(self, storage: StorageBackend) -> None:
        """Methods raise and leave the backend usable."""
        storage.put("x", b"1")
        for _ in range(50):
            with pytest.raises(ObjectNotFound):
                storage.get("y")
            with pytest.raises(StorageError):
                storage.get("x", 0, 100)
            with pytest.raises(ObjectExists):
                storage.put("x", b"2", if_absent=True)
        assert storage.get("x") == b"1"

    def test_18_several_threads(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """A storage backend may be used by several threads at once."""

        def work(number: int) -> None:
            for turn in range(15):
                key, data = f"t{number}/{turn}", bytes([number, turn]) * (10_000 + number)
                patiently(partial(storage.put, key, data))
                assert same(patiently(partial(storage.get, key, 2)), data[2:])
                assert patiently(partial(storage.stat, key)).size_bytes == len(data)
                assert key in [info.key for info in patiently(lambda: list(storage.list(f"t{number}/")))]
                if turn % 3 == 0:
                    patiently(partial(storage.delete, key))

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(work, range(6)))
        expected = sorted(f"t{number}/{turn}" for number in range(6) for turn in range(15) if turn % 3)
        assert sorted(oracle.keys()) == expected

    def test_19_whole_or_not_at_all(self, storage: StorageBackend) -> None:
        """`get`, `stat` and `list` show either the whole object or none, and an object that was there before … is
        either the old or the new one, whole. What may succeed when it is tried again may fail, as often as it likes.
        """
        size = 1 << 20
        versions = [bytes([number]) * (size + number) for number in range(6)]
        storage.put("x", versions[0])
        stop, looked = threading.Event(), list[int]()

        def look() -> None:
            while not stop.is_set():
                try:
                    seen, infos = storage.get("x"), list(storage.list())
                except TransientStorageError:
                    continue
                looked.append(seen[0])
                assert seen == versions[seen[0]]
                assert [info.key for info in infos] == ["x"]
                assert size <= infos[0].size_bytes < size + len(versions)

        with ThreadPoolExecutor(2) as threads:
            looks = [threads.submit(look) for _ in range(2)]
            try:
                for _ in range(4):
                    for version in versions:
                        patiently(partial(storage.put, "x", version))
            finally:
                stop.set()
            for result in looks:
                result.result()
        assert looked

    def test_20_killed_writer(
        self, storage: StorageBackend, oracle: RawObjects, kill_a_put: Callable[[str], None] | None
    ) -> None:
        """Whatever happens before that (an exception, a kill, a power cut) … Temporary files of unfinished puts are
        never shown.
        """
        if kill_a_put is None:
            return
        oracle.write("packs/old", b"old")
        for key in ("packs/new", "packs/old"):
            kill_a_put(key)
            assert [info.key for info in storage.list()] == ["packs/old"]
        assert storage.get("packs/old") == b"old"
        with pytest.raises(ObjectNotFound):
            storage.stat("packs/new")
        storage.put("packs/new", b"new", if_absent=True)
        assert oracle.read("packs/new") == b"new"

    def test_21_create_and_properties(self, storage: StorageBackend, oracle: RawObjects) -> None:
        """`create` is idempotent; `properties` says what this backend promises; `doctor` changes nothing."""
        storage.put("x", b"1")
        storage.create()
        assert oracle.read("x") == b"1"
        properties = storage.properties()
        assert isinstance(properties, StorageProperties)
        assert properties.free_bytes is None or properties.free_bytes >= 0
        findings = storage.doctor()
        assert findings
        assert {finding.severity for finding in findings} <= {"ok", "note", "missing"}
        assert list(oracle.keys()) == ["x"]

    def test_22_any_sequence_of_calls(self, storage: StorageBackend) -> None:
        """Any sequence of calls gives what a dictionary would."""

        class Machine(_AgainstDictionary):
            backend = storage

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=self.state_machine_examples,
                stateful_step_count=30,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
                phases=self.state_machine_phases,
                suppress_health_check=list(HealthCheck),
            ),
        )


_KEYS = st.sampled_from(["a", "b/c", "b/d", "b-c", "b/c-d/e", "bb/c"])
_DATA = st.one_of(st.binary(max_size=40), st.integers(1, 200_000).map(bytes))


class _AgainstDictionary(RuleBasedStateMachine):
    backend: StorageBackend

    def __init__(self) -> None:
        super().__init__()
        for info in list(self.backend.list()):
            self.backend.delete(info.key)
        self.model: dict[str, bytes] = {}

    @rule(key=_KEYS, data=_DATA)
    def put(self, key: str, data: bytes) -> None:
        self.backend.put(key, data)
        self.model[key] = data

    @rule(key=_KEYS, data=_DATA)
    def put_if_absent(self, key: str, data: bytes) -> None:
        if key in self.model:
            with pytest.raises(ObjectExists):
                self.backend.put(key, data, if_absent=True)
        else:
            self.backend.put(key, data, if_absent=True)
            self.model[key] = data

    @rule(key=_KEYS)
    def delete(self, key: str) -> None:
        self.backend.delete(key)
        self.model.pop(key, None)

    @rule(key=_KEYS, offset=st.integers(0, 60), length=st.one_of(st.none(), st.integers(0, 60)))
    def get(self, key: str, offset: int, length: int | None) -> None:
        data = self.model.get(key)
        if data is None:
            with pytest.raises(ObjectNotFound):
                self.backend.get(key, offset, length)
        elif offset + (length or 0) > len(data):
            with pytest.raises(StorageError):
                self.backend.get(key, offset, length)
        else:
            end = len(data) if length is None else offset + length
            assert same(self.backend.get(key, offset, length), data[offset:end])

    @rule(prefix=st.sampled_from(["", "b", "b/", "b/c", "bb", "a", "c"]))
    def list(self, prefix: str) -> None:
        expected = [ObjectInfo(k, len(data)) for k, data in sorted(self.model.items()) if k.startswith(prefix)]
        assert [*self.backend.list(prefix)] == expected

    @rule(key=_KEYS)
    def stat(self, key: str) -> None:
        if key in self.model:
            assert self.backend.stat(key).size_bytes == len(self.model[key])
        else:
            with pytest.raises(ObjectNotFound):
                self.backend.stat(key)


def scenarios() -> Sequence[str]:
    """The names of all scenarios of `StorageContract`, in order."""
    return [name for name in sorted(vars(StorageContract)) if name.startswith("test_")]
