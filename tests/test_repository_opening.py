"""Opening a repository: what is none, who may, and what is refused."""

from __future__ import annotations

import json

import pytest
from blake3 import blake3

from tests.damage import make, only
from tests.test_repository_roundtrip import CHEAP, SMALL
from tests.test_storage_contract import Memory
from vmsnap.errors import (
    AlreadyExists,
    DamageFound,
    NotARepository,
    RepositoryError,
    UsageError,
    WrongPassphrase,
)
from vmsnap.repository import Repository
from vmsnap.repository.config import encode_text


@pytest.fixture(params=[None, "pass"], ids=["plain", "encrypted"])
def passphrase(request: pytest.FixtureRequest) -> str | None:
    return request.param  # type: ignore[no-any-return]


def test_places_that_are_no_repository() -> None:
    with pytest.raises(NotARepository):
        Repository.open(Memory())
    storage = Memory()
    storage.raw["Holiday.JPG"] = b"x"
    with pytest.raises(AlreadyExists, match="Holiday"):
        Repository.create(storage)
    assert storage.raw == {"Holiday.JPG": b"x"}


def test_a_repository_is_never_made_over_another(passphrase: str | None) -> None:
    storage, _, _, _ = make(passphrase)
    before = dict(storage.raw)
    for word in (None, "pass"):
        with pytest.raises(AlreadyExists, match="repository"):
            Repository.create(storage, word, key_cost=CHEAP)
    assert storage.raw == before


def test_passphrases() -> None:
    storage, repository, _, manifests = make("pass")
    asked: list[str] = []

    def ask() -> str:
        asked.append("asked")
        return "pass"

    assert [manifest.backup for manifest in Repository.open(storage, ask).list()] == [
        m.backup for m in repository.list()
    ]
    assert asked == ["asked"]
    for wrong in ("Pass", "", "pass "):
        with pytest.raises(WrongPassphrase):
            Repository.open(storage, wrong)
    with pytest.raises(WrongPassphrase):
        Repository.open(storage)
    assert Repository.create(Memory(), encryption="none").encryption == "none"
    assert Repository.create(Memory(), "x", encryption="none").encryption == "none"
    assert Repository.open(storage, "pass").encryption == "aes256-gcm"
    for bad in (
        {"encryption": "aes256-gcm"},
        {"passphrase": "x", "encryption": "rot13"},
        {"passphrase": "", "encryption": "aes256-gcm"},
    ):
        with pytest.raises(UsageError):
            Repository.create(Memory(), **bad)
    plain, asked[:] = Memory(), []
    Repository.create(plain)
    Repository.open(plain, ask)
    assert asked == []
    assert manifests


def test_no_secret_stands_in_the_objects_or_reprs() -> None:
    storage, repository, contents, _ = make("pass phrase words")
    everything = b"".join(storage.raw.values()) + repr([repository.config, repository.vault]).encode()
    assert b"pass phrase words" not in everything
    assert contents[1][-100:] not in everything
    assert b"vm1" not in b"".join(data for key, data in storage.raw.items())
    plain = Repository.create(Memory())
    assert str(plain.config.secret) not in repr(plain.config)


def test_an_encrypted_repository_cannot_be_turned_into_a_plain_one() -> None:
    storage, _, _, _ = make("pass")
    plain = Memory()
    Repository.create(plain, chunks=SMALL)
    storage.raw["config"] = plain.raw["config"]
    with pytest.raises(DamageFound, match="not encrypted"):
        Repository.open(storage, "pass")


def test_a_changed_config_opens_with_no_passphrase() -> None:
    storage, _, _, _ = make("pass")
    line = storage.raw["config"].split(b"\n")[0].replace(b'"fanout":4', b'"fanout":8')
    storage.raw["config"] = line + b"\n" + blake3(line).hexdigest().encode() + b"\n"
    with pytest.raises(WrongPassphrase):
        Repository.open(storage, "pass")


def test_lost_keys_are_damage() -> None:
    storage, _, _, _ = make("pass")
    del storage.raw[only(storage, "keys/")]
    with pytest.raises(DamageFound, match="keys"):
        Repository.open(storage, "pass")


@pytest.mark.parametrize("check_sum", [True, False])
def test_a_newer_repository_says_so(passphrase: str | None, check_sum: bool) -> None:
    storage, _, _, _ = make(passphrase)
    config = json.loads(storage.raw["config"].split(b"\n")[0]) | {"version": 7, "news": 1}
    storage.raw["config"] = encode_text(config) if check_sum else json.dumps(config).encode()
    with pytest.raises(RepositoryError, match="format 7") as caught:
        Repository.open(storage, passphrase)
    assert "install" in caught.value.cure


@pytest.mark.parametrize("change", [{"encryption": "rot13"}, {"chunker": "wavy"}])
def test_a_config_with_unknown_parts_says_so(change: dict[str, str]) -> None:
    storage, _, _, _ = make(None)
    config = json.loads(storage.raw["config"].split(b"\n")[0])
    storage.raw["config"] = encode_text(config | change)
    with pytest.raises(RepositoryError):
        Repository.open(storage)
    storage.raw["config"] = encode_text(config | {"something": "new"})
    assert len(Repository.open(storage).list()) == 2
