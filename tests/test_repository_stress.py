"""Writers that back up and forget, a garbage collection and a restorer, all at once, killed now and then: whatever
they do to each other, every backup that is there is whole, and at the end nothing is left that none needs.

`VMSNAP_STRESS_SECONDS` says for how long, `VMSNAP_STRESS_SEED` which of the runs.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.test_repository_roundtrip import CHEAP, SMALL, content_of
from vmsnap.errors import RepositoryError, UnknownBackup
from vmsnap.repository import BackupFields, BaseImage, BytesReader, DiskImage, ImageKind, ImageRecord, Repository
from vmsnap.repository.format import BlobKind
from vmsnap.repository.reading import reading
from vmsnap.testing.rigs import same
from vmsnap_storage_backends.local import LocalStorage

SECONDS = float(os.environ.get("VMSNAP_STRESS_SECONDS", "20"))
SEED = int(os.environ.get("VMSNAP_STRESS_SEED", "1"))
PACK_BYTES = 128 << 10
BACKUPS_KEPT = 5
WANTED = {"stored", "forgotten", "collected", "packs_deleted", "packs_repacked", "packs_waiting", "restored"}
"""What must have happened for it to be a stress at all."""
PATIENCE_SECONDS = 300
"""How long to wait for that after the time, where the machine is busy with other things."""


def small_packs() -> None:
    """Many packs and index objects from little data; in worker processes, and in the test by monkeypatch."""
    import vmsnap.repository.chunkstore
    import vmsnap.repository.upload

    vmsnap.repository.upload.PACK_BYTES_OF = dict.fromkeys(BlobKind, PACK_BYTES)
    vmsnap.repository.chunkstore._INDEX_AT_CHUNKS = 40


def content_for(seed: int) -> bytes:
    """What the backup with the tag `seed` holds: pieces that many backups have, and some that none has."""
    chance = random.Random(seed)
    shared = [random.Random(chance.randrange(30)).randbytes(16 * 4096) for _ in range(chance.randrange(1, 12))]
    return b"".join(shared) + chance.randbytes(chance.randrange(1, 30 * 4096))


def open_it(folder: str) -> Repository:
    return Repository.open(LocalStorage(folder), "x")


def work(role: Callable[[str, str, random.Random], None], folder: str, name: str, seed: str) -> None:
    """Be one of the processes."""
    small_packs()
    role(folder, name, random.Random(seed))


def say(line: str) -> None:
    """Tell the test what was done."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write(folder: str, name: str, chance: random.Random) -> None:
    """Back up, forget, and so on."""
    repository = open_it(folder)
    last: ImageRecord | None = None
    while True:
        seed = chance.randrange(1 << 40)
        content = content_for(seed)
        if chance.random() < 0.2:
            repository = open_it(folder)
        with repository.writer(purpose=f"backup by {name}") as writer:
            base = BaseImage(last) if last and chance.random() < 0.5 else None
            image = writer.add_image("disk", BytesReader(content), ImageKind.DISK, base=base)
            if chance.random() < 0.1:
                say("given up")
                continue
            disk = DiskImage("disk0", len(content), "raw", "", "", image)
            tags = (str(seed),)
            try:
                writer.commit(BackupFields(vm=name, hypervisor="x", mode="live", disks=(disk,), tags=tags))
            except RepositoryError as e:
                assert "for dead" in str(e)
                say("taken for dead")
                continue
        last = image
        say("stored")
        mine = [manifest.backup for manifest in repository.list() if manifest.vm == name]
        while len(mine) > BACKUPS_KEPT:
            repository.forget(mine.pop(chance.randrange(len(mine))))
            say("forgotten")


def collect(folder: str, name: str, chance: random.Random) -> None:
    """Collect garbage, time and again."""
    while True:
        # Sometimes all others are taken for dead: they then may fail, and must do no harm.
        report = open_it(folder).gc(dead_after_seconds=-1 if chance.random() < 0.1 else 86400)
        say("collected")
        for what in ("packs_deleted", "packs_repacked", "packs_waiting"):
            say(f"{what} {getattr(report, what)}")


def restore(folder: str, name: str, chance: random.Random) -> None:
    """Restore any backup, slowly, although it may be forgotten meanwhile."""
    repository = open_it(folder)
    while True:
        manifests = repository.list()
        if not manifests:
            continue
        backup = chance.choice(manifests).backup
        try:
            with reading(repository, backup, "restore"):
                manifest = repository.manifest(backup)
                found = read_slowly(repository, manifest.disks[0].image, chance)
        except UnknownBackup:
            say("forgotten before")
            continue
        except RepositoryError:
            # Only where its reader was taken for dead and it was forgotten, or its writer was, and took it back.
            assert backup not in {manifest.backup for manifest in repository.list()}
            say("removed meanwhile")
            continue
        assert same(found, content_for(int(manifest.tags[0]))), manifest.backup
        say("restored")


def read_slowly(repository: Repository, image: ImageRecord, chance: random.Random) -> bytearray:
    """All of an image, with pauses: a slow storage, not waiting for anything."""
    found = bytearray(image.size_bytes)
    with repository.reader(image) as reader:
        for at in range(0, len(found), 50_000):
            reader.read_into(at, memoryview(found)[at : at + 50_000])
            if chance.random() < 0.05:
                time.sleep(0.1)
    return found


class Worker:
    """A process that does one of these until it is killed, and again then."""

    def __init__(self, folder: Path, what: str, name: str) -> None:
        self._folder, self._what, self._name = folder, what, name
        self._path = folder.parent / f"{name}.log"
        self._log = self._path.open("a")
        self._begin(0)

    def _begin(self, turn: int) -> None:
        arguments = (str(self._folder), self._name, f"{SEED} {self._name} {turn}")
        code = f"from tests.test_repository_stress import work, {self._what}; work({self._what}, *{arguments!r})"
        self._turn = turn
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def check(self) -> None:
        assert self._process.poll() is None, (self._name, self.log()[-3000:])

    def kill(self) -> None:
        self.check()
        self._process.kill()
        self._process.wait()

    def again(self) -> None:
        self._begin(self._turn + 1)

    def log(self) -> str:
        return self._path.read_text()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def done_by(workers: Iterable[Worker]) -> Counter[str]:
    """How often each thing was done, or of how many packs."""
    done: Counter[str] = Counter()
    for worker in workers:
        for line in worker.log().splitlines():
            what, _, count = line.partition(" ")
            done[line if not count.isdigit() else what] += int(count) if count.isdigit() else 1
    return done


def test_everybody_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.repository.upload.PACK_BYTES_OF", dict.fromkeys(BlobKind, PACK_BYTES))
    folder = tmp_path / "r"
    Repository.create(LocalStorage(str(folder)), "x", chunks=SMALL, key_cost=CHEAP)
    chance = random.Random(SEED)
    roles = [("write", "vm001"), ("write", "vm002"), ("collect", "gc"), ("restore", "restorer")]
    workers = [Worker(folder, what, name) for what, name in roles]
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            time.sleep(chance.uniform(0.2, 2.5))
            for worker in workers:
                worker.check()
            victim = chance.choice(workers)
            victim.kill()
            victim.again()
        deadline += PATIENCE_SECONDS
        while not (done := done_by(workers)) >= Counter(WANTED) and time.monotonic() < deadline:
            time.sleep(0.2)
            for worker in workers:
                worker.check()
        for worker in workers:
            worker.kill()
    finally:
        for worker in workers:
            worker.end()
    say(f"{dict(done)}")

    repository = open_it(str(folder))
    findings = repository.check(read_data=True).findings
    assert not [finding for finding in findings if finding.touches]
    manifests = repository.list()
    for manifest in manifests:
        assert same(content_of(repository, manifest.disks[0].image), content_for(int(manifest.tags[0])))
    assert repository.gc().packs_waiting == 0
    last = repository.gc()
    assert (last.packs_deleted, last.packs_repacked, last.packs_waiting, last.dead_sessions) == (0, 0, 0, ())
    assert not repository.check(read_data=True).findings
    left = {info.key.split("/")[0] for info in repository.storage.list()}
    assert left <= {"config", "keys", "manifests", "packs", "index"}
    packs = list(repository.storage.list("packs/"))
    assert sum(info.size_bytes for info in packs) < last.live_bytes / 0.8 + 3000 * len(packs)
    for manifest in manifests:
        assert same(content_of(repository, manifest.disks[0].image), content_for(int(manifest.tags[0])))
    assert done >= Counter(WANTED)
