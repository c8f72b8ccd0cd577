"""Between vmsnap and a real S3 server things go wrong at chosen bytes: a backup completes and is whole, or fails
clearly; what is stored stays stored, nothing half-written is taken for whole, and the guest never notices.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proxy import Proxy, Trouble, http_answer
from tests.servers.s3 import Bucket, S3Server
from tests.world import MIB, World
from vmsnap.errors import StorageError, TransientStorageError, VmsnapError
from vmsnap.repository import Repository
from vmsnap.retrying import RetryingStorage, RetryPolicy
from vmsnap_storage_backends.s3 import S3Storage, upload

PATIENT = RetryPolicy(attempts=6, first_wait_seconds=0.02, longest_wait_seconds=0.2)
HASTY = RetryPolicy(attempts=2, first_wait_seconds=0.01, longest_wait_seconds=0.02)
SLOW_DOWN = http_answer(503, "Slow Down", "SlowDown")
INTERNAL = http_answer(500, "Internal Error", "InternalError")
PACK = b"/packs/"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(memory_bytes=MIB, disk_bytes=64 * MIB)
    # The guest writes a few blocks only: enough for a pack that goes up in parts.
    made.write_noise(7)
    yield made
    made.close()


class Far:
    """A repository on the server, with the proxy between."""

    def __init__(self, server: S3Server, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.bucket = server.new_bucket()
        self.repository(PATIENT, create=True)

    def repository(self, policy: RetryPolicy, *, create: bool = False, timeout_seconds: int = 20) -> Repository:
        """Open it, as a new process would."""
        options = {"endpoint": f"http://127.0.0.1:{self.proxy.port}", "timeout": str(timeout_seconds)}
        storage = RetryingStorage(S3Storage(f"s3://{self.bucket}/vmsnap", options), policy)
        return Repository.create(storage) if create else Repository.open(storage)

    def see_that_all_is_whole(self, backups: int) -> None:
        """Past the proxy: every object is what was written, and every backup reads."""
        repository = Repository.open(S3Storage(f"s3://{self.bucket}/vmsnap", {"endpoint": self.server.endpoint}))
        assert not repository.check(read_data=True).damaged
        assert len(repository.list()) == backups
        for manifest in repository.list():
            assert not repository.verify(manifest.backup).findings
        repository.storage.close()

    def packs(self) -> set[str]:
        """The packs that are there."""
        return set(Bucket(self.server, self.bucket, "vmsnap/packs/").keys())


@pytest.fixture
def far(swift_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    for name, value in swift_server.environment().items():
        monkeypatch.setenv(name, value)
    # The least that the protocol allows.
    monkeypatch.setattr(upload, "PARTS_ABOVE_BYTES", 6 * MIB)
    monkeypatch.setattr(upload, "PART_BYTES", 5 * MIB)
    with Proxy(("127.0.0.1", swift_server.port)) as proxy:
        yield Far(swift_server, proxy)


TROUBLES = {
    "cut before a request": Trouble("cut", 0, after=b"PUT "),
    "cut within a pack": Trouble("cut", 300_000, after=PACK, times=2),
    "cut of an answer": Trouble("cut", 60, "down", after=PACK),
    "answer lost whole": Trouble("cut", 0, "down", after=b"/manifests/"),
    "stall within a pack": Trouble("stall", 200_000, after=PACK),
    "stall of an answer": Trouble("stall", 0, "down", after=PACK),
    "slow": Trouble("slow", 100_000, after=PACK, bytes_per_second=2_000_000),
    "a bit of a pack": Trouble("corrupt", 250_000, after=PACK, times=2),
    "500 for a pack": Trouble("answer", 0, after=b"PUT ", answer=INTERNAL, times=2),
    "503 for packs": Trouble("answer", 5, after=PACK, answer=SLOW_DOWN, times=2),
    "503 for a manifest": Trouble("answer", 3, after=b"/manifests/", answer=SLOW_DOWN),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_backup_goes_through_what_passes(far: Far, world: World, name: str) -> None:
    repository = far.repository(PATIENT, timeout_seconds=1 if "stall" in name else 20)
    trouble = far.proxy.add(TROUBLES[name])
    with world.controller() as controller:
        controller.backup("vm001", repository)
    assert trouble.struck and not trouble.times
    world.see_that_all_is_well()
    repository.storage.close()
    far.see_that_all_is_whole(backups=1)


LASTING = {
    "cut": Trouble("cut", 100_000, after=PACK, times=10**6),
    "503": Trouble("answer", 0, after=PACK, answer=SLOW_DOWN, times=10**6),
    "stall": Trouble("stall", 100_000, after=PACK, times=10**6),
    "corrupt": Trouble("corrupt", 100_000, after=PACK, times=10**6),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_backup_that_cannot_go_through_fails_clearly(far: Far, world: World, name: str) -> None:
    repository = far.repository(HASTY, timeout_seconds=1 if name == "stall" else 20)
    far.proxy.add(LASTING[name])
    with world.controller() as controller, pytest.raises(StorageError) as caught:
        controller.backup("vm001", repository)
    assert "cannot store" in caught.value.message and "packs/" in caught.value.message
    assert any("it was tried 2 times" in note for note in caught.value.__notes__)
    world.see_that_all_is_well()
    far.proxy.clear()
    far.see_that_all_is_whole(backups=0)
    repository.storage.close()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_bit_anywhere_is_never_taken_for_right(far: Far, world: World, direction: str) -> None:
    for at in (40, 700, 2_000_000):
        repository = far.repository(HASTY)
        trouble = far.proxy.add(Trouble("corrupt", at, direction))  # type: ignore[arg-type]
        try:
            with world.controller() as controller:
                controller.backup("vm001", repository)
        except VmsnapError as e:
            assert "\n" not in e.message
        trouble.times = 0
        repository.storage.close()
    world.see_that_all_is_well()
    far.see_that_all_is_whole(backups=len(far.repository(PATIENT).list()))


def test_what_was_stored_before_it_broke_is_not_stored_again(far: Far, world: World) -> None:
    repository = far.repository(HASTY)
    # The packs and their list are there when the manifest cannot be stored.
    trouble = far.proxy.add(Trouble("answer", 0, after=b"/manifests/vm001", answer=SLOW_DOWN, times=10**6))
    with world.controller() as controller, pytest.raises(TransientStorageError, match="503"):
        controller.backup("vm001", repository)
    first = far.proxy.bytes_up
    assert first > 2 * MIB
    there = far.packs()
    assert there
    trouble.times = 0
    far.proxy.bytes_up = 0
    with world.controller() as controller:
        controller.backup("vm001", far.repository(PATIENT))
    # The guest has changed a little meanwhile.
    assert far.proxy.bytes_up < first / 2
    assert there <= far.packs()
    far.see_that_all_is_whole(backups=1)


def test_a_server_that_goes_away_and_comes_back(far: Far, world: World) -> None:
    policy = RetryPolicy(attempts=100, first_wait_seconds=0.02, longest_wait_seconds=0.1, patience_seconds=60)
    repository = far.repository(policy)
    trouble = far.proxy.add(Trouble("cut", 100_000, after=PACK, refuse_afterwards=5))
    with world.controller() as controller:
        controller.backup("vm001", repository)
    assert trouble.struck and not far.proxy.refusals
    world.see_that_all_is_well()
    far.see_that_all_is_whole(backups=1)
