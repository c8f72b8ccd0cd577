"""Between vmsnap and a real SFTP server something goes wrong at chosen bytes: what is done is whole in the end or
fails in one clear line, and nothing half-written is ever taken for whole.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.sshd import SshServer
from tests.proxy import Proxy, Trouble
from tests.test_repository_roundtrip import CHEAP, back_up, content_of
from tests.test_storage_contract import Memory
from vmsnap.errors import ObjectExists, StorageError, TransientStorageError
from vmsnap.repository import BytesReader, Repository
from vmsnap.repository.copying import copy_backups
from vmsnap.retrying import RetryingStorage, RetryPolicy
from vmsnap_storage_backends.sftp import SftpStorage

pytestmark = pytest.mark.sshd

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(6 * MIB)


class Far:
    """A server behind a proxy, and a place on it."""

    def __init__(self, server: SshServer, proxy: Proxy, folder: Path) -> None:
        self.proxy = proxy
        self.place = folder / "place"
        self.config = folder / "ssh_config"
        key = " ".join(server.host_key.with_suffix(".pub").read_text().split()[:2])
        (folder / "known").write_text(f"the-lab {key}\n")
        self.config.write_text(
            f"Host lab\n HostName 127.0.0.1\n Port {proxy.port}\n User root\n HostKeyAlias the-lab\n"
            f" IdentityFile {server.key}\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/known\n"
        )

    def bare(self, timeout: int = 20) -> SftpStorage:
        return SftpStorage(f"sftp://lab{self.place}", {"config": str(self.config), "timeout": str(timeout)})

    def storage(self, attempts: int = 12, timeout: int = 20) -> RetryingStorage:
        return RetryingStorage(self.bare(timeout), RetryPolicy(attempts, 0.02, 0.2))

    def unfinished(self) -> list[Path]:
        return list((self.place / ".unfinished").iterdir())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as started:
        yield started


@pytest.fixture
def far(server: SshServer, tmp_path: Path) -> Iterator[Far]:
    with Proxy(("127.0.0.1", server.port)) as proxy:
        yield Far(server, proxy, tmp_path)


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble("cut", 10),
        Trouble("cut", 2000),
        Trouble("cut", 2000, "down"),
        Trouble("cut", 100_000),
        Trouble("cut", 3 * MIB),
        Trouble("cut", 20_000, "down"),
        Trouble("cut", 500_000, times=5),
        Trouble("corrupt", 1500),
        Trouble("corrupt", 2 * MIB),
        Trouble("corrupt", 10_000, "down"),
        Trouble("corrupt", 4 * MIB, "down"),
        Trouble("slow", MIB, bytes_per_second=4 * MIB),
    ],
    ids=lambda trouble: f"{trouble.kind}-{trouble.direction}-{trouble.at_bytes}-{trouble.times}",
)
def test_a_backup_and_its_way_back_come_through(far: Far, trouble: Trouble) -> None:
    repository = Repository.create(far.storage(), "x", key_cost=CHEAP)
    trouble.rearm()
    far.proxy.add(trouble)
    manifest = back_up(repository, BytesReader(CONTENT))
    assert content_of(repository, manifest.disks[0].image) == CONTENT
    assert not repository.check(read_data=True).findings
    assert trouble.struck
    far.proxy.clear()
    assert repository.sessions() == []
    repository.storage.put("sessions/x", b"")  # the next put clears up
    repository.storage.delete("sessions/x")
    assert far.unfinished() == []
    repository.storage.close()


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("at_bytes", [1000, MIB])
def test_a_server_that_falls_silent_is_given_up_and_asked_again(far: Far, direction: str, at_bytes: int) -> None:
    far.bare().create()
    trouble = far.proxy.add(Trouble("stall", at_bytes, direction))  # type: ignore[arg-type]
    storage = far.storage(timeout=1)
    storage.put("packs/x", CONTENT)
    assert storage.get("packs/x") == CONTENT
    assert trouble.struck == 1
    storage.close()


def test_a_silent_server_is_one_clear_line_without_retries(far: Far) -> None:
    far.bare().create()
    storage = far.bare(timeout=1)
    far.proxy.add(Trouble("stall", MIB))
    with pytest.raises(TransientStorageError) as caught:
        storage.put("packs/x", CONTENT)
    assert "cannot write packs/x" in str(caught.value) and "\n" not in str(caught.value)
    storage.close()
    patient = far.bare()
    assert list(patient.list()) == []
    patient.close()


def test_who_gives_up_need_not_wait_for_a_silent_server(far: Far) -> None:
    from concurrent.futures import ThreadPoolExecutor

    far.bare().create()
    storage = far.bare(timeout=3600)
    trouble = far.proxy.add(Trouble("stall", MIB))
    with ThreadPoolExecutor(1) as threads:
        putting = threads.submit(storage.put, "packs/x", CONTENT)
        while not trouble.struck:
            assert not putting.done()
        while not putting.done():
            storage.hurry()
        with pytest.raises(TransientStorageError):
            putting.result()
    storage.put("packs/x", CONTENT)
    assert storage.get("packs/x") == CONTENT
    storage.close()


@pytest.mark.parametrize("at_bytes", [400, 700, 1000, 1300, 1700, 2200])
def test_a_conditional_put_whose_answer_was_lost_is_a_success(far: Far, at_bytes: int) -> None:
    """Cut at many places of the conversation, among them between the link and its answer."""
    storage = far.storage()
    storage.create()
    storage.put("config", b"x", if_absent=True)
    for number in range(4):
        far.proxy.add(Trouble("cut", at_bytes + 60 * number, "down"))
        storage.put(f"keys/{number}", b"mine", if_absent=True)
        assert storage.get(f"keys/{number}") == b"mine"
        far.proxy.clear()
    with pytest.raises(ObjectExists):
        storage.put("keys/0", b"another", if_absent=True)
    storage.close()


def test_a_server_that_goes_away_fails_the_backup_and_harms_none(far: Far) -> None:
    repository = Repository.create(far.storage(attempts=2), "x", key_cost=CHEAP)
    first = back_up(repository, BytesReader(CONTENT))
    away = far.proxy.add(Trouble("cut", 2 * MIB, times=100))
    far.proxy.bytes_up = 0
    with pytest.raises(StorageError) as caught:
        back_up(repository, BytesReader(os.urandom(8 * MIB)))
    assert away.struck and "\n" not in str(caught.value)
    far.proxy.clear()
    assert [each.backup for each in repository.list()] == [first.backup]
    assert not repository.check(read_data=True).damaged
    assert content_of(repository, first.disks[0].image) == CONTENT
    second = back_up(repository, BytesReader(CONTENT[: 5 * MIB] + bytes(MIB)))
    assert second.stats.stored_bytes < MIB
    repository.storage.close()


def test_a_copy_that_broke_off_uploads_only_what_is_missing(far: Far, tmp_path: Path) -> None:
    source = Repository.create(Memory(), "one", key_cost=CHEAP)
    content = random.Random(2).randbytes(90 * MIB)  # three packs, of which two are on their way at a time
    backup = back_up(source, BytesReader(content)).backup
    Repository.create(far.storage(), "other", key_cost=CHEAP)
    target = Repository.open(far.storage(attempts=1), "other", cache_dir=tmp_path / "cache")
    far.proxy.add(Trouble("cut", 75 * MIB))
    with pytest.raises(StorageError):
        copy_backups(source, target, checkpoint_bytes=MIB)
    assert target.list() == []
    far.proxy.clear()
    far.proxy.bytes_up = 0
    copy_backups(source, target)
    assert far.proxy.bytes_up < 62 * MIB
    copy = target.manifest(backup)
    assert content_of(target, copy.disks[0].image) == content
    assert not target.check(read_data=True).damaged
    target.storage.close()
