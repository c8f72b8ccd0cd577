"""Passphrase keys: they come and go without data being rewritten, and whatever fails, one is left that opens."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import Busy, DamageFound, NotFound, StorageError, UsageError, VmsnapError, WrongPassphrase
from vmsnap.repository import BytesReader, Repository
from vmsnap.repository.config import decode_text, encode_text
from vmsnap.repository.keyring import KeyInfo
from vmsnap.repository.keys import PassphraseKey
from vmsnap.roles import ObjectInfo


class Dead(BaseException):
    """The process was killed here."""


class Counting(Memory):
    """Calls a function before and after each change or look, with the number of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.strike: Callable[[int, str], None] | None = None

    def _count(self, when: str) -> None:
        if self.strike:
            self.calls += when == "before"
            self.strike(self.calls, when)

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        self._count("before")
        super().put(key, data, if_absent=if_absent)
        self._count("after")

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self._count("before")
        found = super().get(key, offset, length)
        self._count("after")
        return found

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._count("before")
        yield from super().list(prefix)
        self._count("after")

    def delete(self, key: str) -> None:
        self._count("before")
        super().delete(key)
        self._count("after")


def made(storage: Memory | None = None) -> tuple[Memory, Repository]:
    storage = storage or Memory()
    return storage, Repository.create(storage, "old", chunks=SMALL, key_cost=CHEAP)


def opens(storage: Memory, passphrase: str) -> bool:
    try:
        Repository.open(storage, passphrase).list()
    except WrongPassphrase:
        return False
    return True


def keys_of(repository: Repository) -> tuple[KeyInfo, ...]:
    return repository.keys()


def key_objects(storage: Memory) -> dict[str, bytes]:
    return {key: data for key, data in storage.raw.items() if key.startswith("keys/")}


# -- what the calls do


def test_a_second_passphrase_opens_the_same_backups() -> None:
    storage, repository = made()
    manifest = back_up(repository, BytesReader(b"content" * 5000))
    before = dict(storage.raw)
    added = repository.add_key("new", "offsite", cost=CHEAP)
    assert before.items() <= storage.raw.items() and set(storage.raw) - set(before) == {f"keys/{added}"}
    for word in ("old", "new"):
        again = Repository.open(storage, word)
        assert content_of(again, again.manifest(manifest.backup).disks[0].image) == b"content" * 5000


def test_keys_are_listed_and_the_one_that_opened_is_marked() -> None:
    storage, repository = made()
    (first,) = repository.keys()
    assert first.opened and first.cost == CHEAP and not first.label and not first.fault and first.created
    added = repository.add_key("new", "offsite", cost=CHEAP)
    assert {info.id: (info.label, info.opened) for info in keys_of(repository)} == {
        first.id: ("", True),
        added: ("offsite", False),
    }
    assert {info.id: info.opened for info in keys_of(Repository.open(storage, "new"))} == {first.id: False, added: True}


def test_a_removed_key_opens_no_longer() -> None:
    storage, repository = made()
    added = repository.add_key("new", cost=CHEAP)
    repository.remove_key(added)
    assert opens(storage, "old") and not opens(storage, "new")


def test_the_old_passphrase_goes_when_it_is_changed() -> None:
    storage, repository = made()
    repository.add_key("other", "offsite", cost=CHEAP)
    other = Repository.open(storage, "other")
    changed = other.change_passphrase("new", cost=CHEAP)
    assert [opens(storage, word) for word in ("old", "other", "new")] == [True, False, True]
    assert [(info.id, info.label) for info in keys_of(other) if info.opened] == [(changed, "offsite")]
    again = other.change_passphrase("newer", cost=CHEAP)
    assert again != changed and not opens(storage, "new") and opens(storage, "newer")


def test_the_key_that_opened_and_the_last_one_are_not_removed() -> None:
    storage, repository = made()
    (first,) = repository.keys()
    before = dict(storage.raw)
    with pytest.raises(UsageError, match="your passphrase") as caught:
        repository.remove_key(first.id)
    assert "key change" in caught.value.cure
    with pytest.raises(NotFound, match="no key 'abc'"):
        repository.remove_key("abc")
    assert storage.raw == before


def test_a_key_is_the_last_one_when_all_others_are_damaged() -> None:
    storage, repository = made()
    (first,) = repository.keys()
    second = Repository.open(storage, "old")
    added = second.add_key("new", cost=CHEAP)
    storage.raw[f"keys/{first.id}"] = b"damaged"
    with pytest.raises(UsageError, match="last one"):
        second.remove_key(added)
    assert opens(storage, "new")


def test_damaged_keys_are_listed_and_may_be_removed() -> None:
    storage, repository = made()
    storage.raw["keys/0000000000000000"] = b"damaged"
    newer = json.loads(storage.raw[f"keys/{repository.keys()[1].id}"].split(b"\n")[0]) | {"version": 7}
    storage.raw["keys/1111111111111111"] = encode_text(newer)
    faults = {info.id: info.fault for info in keys_of(repository) if info.fault}
    assert "damaged" in faults["0000000000000000"] and "format 7" in faults["1111111111111111"]
    for key_id in faults:
        repository.remove_key(key_id)
    assert len(repository.keys()) == 1 and opens(storage, "old")


def test_a_passphrase_has_one_key_and_none_is_empty() -> None:
    storage, repository = made()
    before = dict(storage.raw)
    refusals: list[Callable[[], object]] = [
        lambda: repository.add_key("old", cost=CHEAP),
        lambda: repository.add_key("", cost=CHEAP),
        lambda: repository.add_key("new", "two\nlines", cost=CHEAP),
        lambda: repository.change_passphrase("old", cost=CHEAP),
        lambda: repository.change_passphrase("", cost=CHEAP),
    ]
    for refused in refusals:
        with pytest.raises(UsageError):
            refused()
    assert storage.raw == before


def test_a_repository_without_encryption_has_no_keys() -> None:
    repository = Repository.create(Memory(), chunks=SMALL)
    for refused in (
        repository.keys,
        lambda: repository.add_key("new"),
        lambda: repository.remove_key("0000000000000000"),
        lambda: repository.change_passphrase("new"),
    ):
        with pytest.raises(UsageError, match="not encrypted"):
            refused()


def test_new_keys_are_as_expensive_as_the_default_says() -> None:
    storage, repository = made()
    added = repository.add_key("new")
    key = decode_text(storage.raw[f"keys/{added}"], PassphraseKey, f"keys/{added}")
    assert (key.cost.memory_kib, key.cost.time_cost, key.cost.lanes) == (65536, 3, 4)


def test_nothing_shown_of_a_repository_holds_its_secret() -> None:
    storage, repository = made()
    root = repository._keyring._root  # type: ignore[union-attr]
    assert len(root) == 32
    shown = repr([repository, vars(repository), repository.keys(), repository.vault])
    assert root.hex() not in shown and repr(root)[2:-1] not in shown and "old" not in shown
    assert all(root not in data and root.hex().encode() not in data for data in storage.raw.values())
    assert root not in pickle.dumps(repository.keys())


# -- failures


def struck_at(number: int, when: str, error: BaseException) -> Callable[[int, str], None]:
    def strike(call: int, now: str) -> None:
        # The dead do not clean up.
        if (call, now) == (number, when) or (isinstance(error, Dead) and call > number):
            raise error

    return strike


def _tries(
    act: Callable[[Repository], object], when: str, error: Callable[[], BaseException]
) -> Iterator[tuple[Counting, bool]]:
    """The storage after each call of `act` to it failed in turn, and whether `act` went through."""
    for number in range(1, 100):
        storage = Counting()
        _, repository = made(storage)
        repository.add_key("other", cost=CHEAP)
        storage.calls = 0
        storage.strike = struck_at(number, when, error())
        try:
            act(repository)
            done = True
        except (Dead, VmsnapError):
            done = False
        calls, storage.strike = storage.calls, None
        yield storage, done
        if calls < number:
            assert done and number > 5
            return
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [Dead, lambda: StorageError("broken")], ids=["killed", "failed"])
def test_wherever_a_change_ends_a_passphrase_opens_and_doing_it_again_finishes_it(
    when: str, error: Callable[[], BaseException]
) -> None:
    for storage, done in _tries(lambda repository: repository.change_passphrase("new", cost=CHEAP), when, error):
        old, new = opens(storage, "old"), opens(storage, "new")
        assert old or new
        if done:
            assert new and not old
        assert opens(storage, "other")
        if old:
            Repository.open(storage, "old").change_passphrase("new", cost=CHEAP)
        assert opens(storage, "new") and not opens(storage, "old")
        assert len(key_objects(storage)) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_wherever_adding_fails_no_key_is_left_of_it(when: str) -> None:
    for storage, done in _tries(lambda r: r.add_key("new", cost=CHEAP), when, lambda: StorageError("broken")):
        assert opens(storage, "old") and opens(storage, "new") == done
        assert len(key_objects(storage)) == 2 + done


@pytest.mark.parametrize("when", ["before", "after"])
def test_wherever_removing_fails_the_others_open(when: str) -> None:
    def act(repository: Repository) -> None:
        (other,) = [info.id for info in keys_of(repository) if not info.opened]
        repository.remove_key(other)

    for storage, done in _tries(act, when, lambda: StorageError("broken")):
        assert opens(storage, "old")
        if done:
            assert not opens(storage, "other")


def test_a_new_key_that_is_not_stored_as_it_was_written_costs_the_old_one_nothing() -> None:
    class Bending(Memory):
        bend = False

        def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
            super().put(key, bytes(data)[:-9] + b"?" * 9 if self.bend else data, if_absent=if_absent)

    storage = Bending()
    _, repository = made(storage)
    storage.bend = True
    with pytest.raises(DamageFound):
        repository.change_passphrase("new", cost=CHEAP)
    assert opens(storage, "old") and len(key_objects(storage)) == 1


def test_storage_that_deletes_nothing_says_that_the_old_passphrase_still_opens() -> None:
    class AppendOnly(Memory):
        def delete(self, key: str) -> None:
            raise StorageError(f"{key} may not be deleted")

    storage = AppendOnly()
    _, repository = made(storage)
    with pytest.raises(StorageError, match="the old one still does"):
        repository.change_passphrase("new", cost=CHEAP)
    assert opens(storage, "old") and opens(storage, "new")


def test_two_who_remove_each_others_key_at_once_lock_nobody_out() -> None:
    storage = Counting()
    _, first = made(storage)
    first.add_key("new", cost=CHEAP)
    second = Repository.open(storage, "new")
    ids = {info.opened: info.id for info in keys_of(first)}
    done: list[str] = []

    def remove_in_between(call: int, when: str) -> None:
        # When the first has looked at all keys and is about to delete.
        if call == 4 and when == "before":
            storage.strike = None
            second.remove_key(ids[True])
            done.append("second")

    storage.calls, storage.strike = 0, remove_in_between
    with pytest.raises(Busy, match="put back"):
        first.remove_key(ids[False])
    assert done == ["second"] and opens(storage, "new")
