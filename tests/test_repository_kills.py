"""A process that repairs, prunes, or changes the passphrase, and is killed (SIGKILL) at any change of the storage.

That each single change may be the last one is shown in one process (test_repository_repair.py, test_retention.py,
test_repository_keys.py); here real processes die, whose sessions and temporary files are left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.damage import lost
from tests.test_repository_repair import damaged_in_every_way
from tests.test_repository_roundtrip import CHEAP, SMALL, back_up, content_of
from vmsnap.errors import WrongPassphrase
from vmsnap.repository import BytesReader, Repository
from vmsnap_storage_backends.local import LocalStorage

_DO = """
import itertools, os, signal, sys
from vmsnap.repository import Repository
from vmsnap.repository.keys import KeyCost
from vmsnap.repository.retention import RetentionPolicy
from vmsnap_storage_backends.local import LocalStorage
class Dies(LocalStorage):
    numbers = itertools.count()
    def _count(self):
        if next(self.numbers) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    def put(self, key, data, *, if_absent=False):
        super().put(key, data, if_absent=if_absent)
        self._count()
    def delete(self, key):
        super().delete(key)
        self._count()
repository = Repository.open(Dies(sys.argv[1]), sys.argv[3] or None)
"""


def killed_at_every_change(storage: LocalStorage, passphrase: str, work: str, look: Callable[[], None]) -> int:
    """Run `work` in processes that die at their first change, at their second, and so on, each on what the one before
    has left, until one ends by itself; `look` after each. Returns how many were killed.
    """
    for number in range(100):
        if not is_killed(storage, passphrase, work, number):
            return number
        look()
    raise AssertionError("it never came to its end")


def is_killed(storage: LocalStorage, passphrase: str, work: str, number: int) -> bool:
    """Run `work` in a process that dies at the change of that number; False where it ended before that."""
    command = [sys.executable, "-c", _DO + work, str(storage.folder), str(number), passphrase]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def test_a_repair(tmp_path: Path) -> None:
    memory, _, contents, manifests = damaged_in_every_way()
    storage = LocalStorage(str(tmp_path / "r"))
    storage.create()
    for key, data in memory.raw.items():
        storage.put(key, data)

    def look() -> None:
        survivor = Repository.open(storage)
        for content, manifest in list(zip(contents, manifests, strict=True))[1:3]:
            assert content_of(survivor, manifest.disks[0].image) == content

    # What each one has done stays done, so the next one has less to do.
    assert killed_at_every_change(storage, "", "repository.repair()", look) >= 3
    last = Repository.open(storage)
    for content, manifest in list(zip(contents, manifests, strict=True))[1:]:
        assert content_of(last, manifest.disks[0].image) == content
    report = last.repair()
    assert lost(report) == [(manifests[0].backup, "disk disk0", ((0, 4096),))]
    assert not report.changed
    last.gc()
    assert [finding.severity for finding in last.check(read_data=True).findings] == ["lost"]
    assert not [info.key for info in storage.list() if info.key.startswith(("garbage/", "sessions/"))]


def test_a_prune(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "r"))
    repository = Repository.create(storage, chunks=SMALL)
    contents = {}
    for number in range(4):
        content = os.urandom(9000) + bytes([number])
        contents[back_up(repository, BytesReader(content)).backup] = content

    def look() -> None:
        survivor = Repository.open(storage)
        assert not survivor.check(read_data=True).damaged
        for manifest in survivor.list():
            assert content_of(survivor, manifest.disks[0].image) == contents[manifest.backup]

    killed = killed_at_every_change(storage, "", "repository.prune(RetentionPolicy(last=1))", look)
    assert killed >= 1
    last = Repository.open(storage)
    (kept,) = last.list()
    assert kept.backup == max(contents)
    last.gc()
    look()


def test_a_change_of_the_passphrase(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "r"))
    content = os.urandom(9000)
    image = (
        back_up(Repository.create(storage, "old", chunks=SMALL, key_cost=CHEAP), BytesReader(content)).disks[0].image
    )

    def opened() -> dict[str, Repository]:
        found = {}
        for passphrase in ("old", "new"):
            with suppress(WrongPassphrase):
                found[passphrase] = Repository.open(storage, passphrase)
        return found

    work = f"repository.change_passphrase('new', cost=KeyCost(*{(CHEAP.time_cost, CHEAP.memory_kib, CHEAP.lanes)}))"
    killed = 0
    # Each dies at its first change, which stays done; once the old key is gone nothing is left to be done.
    while "old" in (found := opened()) and is_killed(storage, "old", work, 0):
        killed += 1
        assert [content_of(repository, image) for repository in found.values()] == [content] * len(found)
    assert killed >= 2
    ((passphrase, repository),) = opened().items()
    assert passphrase == "new"
    assert content_of(repository, image) == content
