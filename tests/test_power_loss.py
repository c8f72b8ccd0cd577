"""The power goes at any moment: what was promised by then is there afterwards, and everything can be worked with.

Every change that real processes make to a state folder and a local repository is recorded, and the folder made as a
cut could have left it (`tests.storedfiles`). Guests do not outlive that; the simulated one goes on only because the
host did not really go down.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Counted
from tests.storedfiles.recording import Change, Disk, Kind, build_library, read_log, recorded_environment
from tests.storedfiles.workload import PROMISES
from tests.world import World, unguarded
from vmsnap.controller import Controller
from vmsnap.errors import VmsnapError, WrongPassphrase
from vmsnap.host import HostFolders
from vmsnap.repository import Repository
from vmsnap_storage_backends.local import LocalStorage

CUTS = int(os.environ.get("VMSNAP_POWER_CUTS", "60"))
SEED = int(os.environ.get("VMSNAP_POWER_SEED", "1"))


@dataclass
class Recorded:
    """One recording, and what was promised where in it."""

    folder: Path
    changes: list[Change]
    promises: list[tuple[int, list[str]]]

    def promised(self, what: str, after: int) -> list[str]:
        """The words behind `what` of the promises before a cut."""
        return [words[1] for number, words in self.promises if number < after and words[0] == what and len(words) > 1]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(scope="module")
def recorded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    place = tmp_path_factory.mktemp("power")
    folder, log = place / "recorded", place / "log"
    folder.mkdir()
    library = build_library(place)
    argv = [sys.executable, "-m", "tests.storedfiles.workload", str(folder), json.dumps({"socket": str(world.socket)})]
    environment = recorded_environment(library, folder, log) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(argv, check=True, env=environment)
    changes = read_log(log)
    made = next(change.inode for change in changes if change.kind is Kind.CREATE and change.path.endswith(PROMISES))
    promises = [
        (number, change.data.decode().split())
        for number, change in enumerate(changes)
        if change.kind is Kind.WRITE and change.inode == made
    ]
    return Recorded(folder, changes, promises)


def test_the_recording_is_what_happened(recorded: Recorded, tmp_path: Path) -> None:
    """Where everything that was recorded is kept, there is what is there."""

    class Everything(random.Random):
        def choice(self, _among: object) -> float:  # type: ignore[override]
            return 1.0

        def random(self) -> float:
            return 0.5

        def randrange(self, start: int, *_: object) -> int:  # type: ignore[override]
            return start - 1

    Disk(recorded.changes, recorded.folder).cut(len(recorded.changes), Everything(), tmp_path / "cut")
    for path in recorded.folder.rglob("*"):
        # What SQLite shares between processes is mapped, and made anew by the first one that comes.
        if path.is_file() and path.suffix != ".db-shm" and not path.name.endswith("-shm"):
            copy = tmp_path / "cut" / path.relative_to(recorded.folder)
            assert copy.read_bytes() == path.read_bytes(), path
    assert len(recorded.promises) == 9


def test_what_was_promised_is_there_after_a_cut_anywhere(
    recorded: Recorded, world: World, tmp_path: Path, counted: Counted
) -> None:
    chance = random.Random(SEED)
    ends = [number + 1 for number, change in enumerate(recorded.changes) if change.kind is Kind.SYNC_ENDS]
    kept = [number + 1 for number, _ in recorded.promises]
    cuts = sorted({*kept, *chance.sample(ends, min(len(ends), CUTS // 2))})
    cuts += [chance.randrange(len(recorded.changes)) for _ in range(max(0, CUTS - len(cuts)))]
    disk, backups = Disk(recorded.changes, recorded.folder), 0
    for after in cuts:
        place = tmp_path / f"cut{after}"
        seed = chance.randrange(1 << 32)
        disk.cut(after, random.Random(seed), place)
        try:
            backups += see_what_is_left(recorded, after, place, world)
        except (VmsnapError, AssertionError) as e:
            e.add_note(f"the cut was behind change {after} of {len(recorded.changes)}, chance {seed}")
            raise
        shutil.rmtree(place)
    counted(
        f"{len(cuts)} power cuts within {len(recorded.changes)} changes; {backups} backups were there, none lost",
        cases=len(cuts),
    )
    assert backups > len(cuts)


def see_what_is_left(recorded: Recorded, after: int, place: Path, world: World) -> int:
    """Open everything, see that what was promised is there, recover, and back up once more; returns how many backups
    there were."""
    passphrases = [*recorded.promised("passphrase", after)[-1:], *recorded.promised("changing", after)]
    if not passphrases:
        return 0
    storage = LocalStorage(str(place / "repository"))
    repository = opened(storage, passphrases)
    report = repository.check(read_data=True)
    assert not report.damaged, report.findings
    there = {manifest.backup for manifest in repository.list()}
    assert there >= set(recorded.promised("backup", after)) - set(recorded.promised("gone", after))
    for backup in there:
        assert not repository.verify(backup).findings
    folders = HostFolders.find(place / "state")
    try:
        with Controller(folders, start_guardian=unguarded) as controller:
            if any(words == ["vm"] for number, words in recorded.promises if number < after):
                assert "vm001" in [vm.vm for vm in controller.vms()]
                assert controller.recover().kept == ()
                assert controller.recover().removed == ()
                assert [vm.vm for vm in controller.vms()] == ["vm001"]
                made = controller.backup("vm001", repository).backup
                assert not repository.verify(made).findings
                repository.gc(dead_after_seconds=0)
                assert not repository.check(read_data=True).damaged
                world.see_that_all_is_well()
    finally:
        shutil.rmtree(folders.memory_dir, ignore_errors=True)
    return len(there)


def opened(storage: LocalStorage, passphrases: list[str]) -> Repository:
    """By the passphrase that was promised, or by one that was just being set."""
    for passphrase in passphrases[1:]:
        try:
            return Repository.open(storage, passphrase)
        except WrongPassphrase:
            continue
    return Repository.open(storage, passphrases[0])
