"""The power goes while a real guest in QEMU is backed up live: its host's state folder, repository and disks, with the
overlays and snapshots that QEMU writes beside them, are as a cut at any moment could have left them. What was promised
is there, what the guest was promised by its disks is on them, they are sound, and it can be started and backed up.

Every change that QEMU, vmsnap and qemu-img make is recorded (`tests.storedfiles`); QEMU is killed, as the cut would end
it. A sector (512 bytes) is written whole or not at all, as disks do it and QEMU relies on it.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import Counted
from tests.lab import Disk, LabMachine, disk_records, find_qemu
from tests.lab import serial as console
from tests.lab.disk_records import DEFAULT_SLOTS, RECORD_BYTES
from tests.storedfiles.recording import (
    Change,
    Kind,
    build_library,
    look_at,
    read_log,
    recorded_environment,
)
from tests.storedfiles.recording import Disk as RecordedFiles
from tests.storedfiles.workload import PROMISES
from vmsnap.controller import Controller
from vmsnap.host import HostFolders
from vmsnap.repository import Repository
from vmsnap_storage_backends.local import LocalStorage

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

CUTS = int(os.environ.get("VMSNAP_QEMU_POWER_CUTS", "8"))
STARTS_EACH = 4
"""On every so many of the cuts' disks the guest is started."""
SEED = int(os.environ.get("VMSNAP_POWER_SEED", "1"))
MIB = 1 << 20
DISKS = (Disk("qcow2", 66 * MIB), Disk("raw", 66 * MIB))
SECTOR_BYTES = 512
LEAKS_ALONE = 3
"""``qemu-img check``: clusters that nobody uses, no harm done."""


@dataclass
class Host:
    """What was recorded, and where it is put again."""

    folder: Path
    files: RecordedFiles
    changes: list[Change]
    promises: list[tuple[int, list[str]]]
    counts: list[tuple[int, int]]
    """What the guest said it had counted to, with all records up to it on its disks."""
    chosen: int = 0
    """How often a person had to choose between a disk and its overlay."""

    def machine(self) -> LabMachine:
        """The guest on what is there."""
        return LabMachine(self.folder / "vm001", find_qemu("7.2"), memory_mib=160, disks=DISKS)

    def promised(self, what: str, after: int) -> list[str]:
        """The second words of the promises before a cut."""
        return [words[1] for number, words in self.promises if number < after and words[0] == what]

    def counted_to(self, after: int) -> int:
        """What the guest had said by then."""
        return max((count for number, count in self.counts if number < after), default=0)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    folder, log = place / "host", place / "log"
    folder.mkdir()
    environment = recorded_environment(build_library(place), folder, log)
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    build = find_qemu("7.2")
    machine = LabMachine(folder / "vm001", replace(build, environment=environment), memory_mib=160, disks=DISKS)
    machine.folder.mkdir()
    for index, disk in enumerate(DISKS):
        build.create_image(machine.disk_path(index), disk.format, disk.size_bytes)
    before = look_at(folder)
    try:
        with machine:
            machine.wait_for_check(1)
            argv = [sys.executable, "-m", "tests.storedfiles.qemu_workload", str(folder), str(machine.qmp_socket)]
            subprocess.run(argv, check=True, env=environment)
            machine.wait_for_count(machine.latest_count() + 20)
        changes = read_log(log)
        log.unlink()
        shutil.rmtree(HostFolders.find(folder / "state").memory_dir, ignore_errors=True)
        shutil.rmtree(folder)
        files = RecordedFiles(changes, folder, before, sector_bytes=SECTOR_BYTES)
        yield Host(folder, files, changes, _lines(changes, PROMISES), _counts(changes))
    finally:
        shutil.rmtree(place)


def _written(changes: list[Change], name: str) -> Iterator[tuple[int, str]]:
    made = next(change.inode for change in changes if change.kind is Kind.CREATE and change.path.endswith(f"/{name}"))
    for number, change in enumerate(changes):
        if change.kind is Kind.WRITE and change.inode == made:
            yield number, change.data.decode(errors="replace")


def _lines(changes: list[Change], name: str) -> list[tuple[int, list[str]]]:
    return [(number, text.split()) for number, text in _written(changes, name)]


def _counts(changes: list[Change]) -> list[tuple[int, int]]:
    found, text = [], ""
    for number, piece in _written(changes, "serial.log"):
        text = text[-100:] + piece
        if said := console.counts(text[: text.rfind("\n") + 1]):
            found.append((number, said[-1]))
    return found


def where_to_cut(host: Host, chance: random.Random) -> list[int]:
    """Half of them around changes of the names of overlays, plans and the like, which come while a backup is made."""
    begun = next(number for number, words in host.promises if words[0] == "begins")
    names = [number for number, change in enumerate(host.changes) if change.kind in (Kind.RENAME, Kind.UNLINK)]
    names = [number for number in names if number > begun and "/vm001/" in host.changes[number].path]
    assert any(".committing" in host.changes[number].path for number in names), "an overlay was put back"
    near = [chance.choice(names) + chance.randrange(3) for _ in range(CUTS // 2)]
    return [*near, *(chance.randrange(begun, len(host.changes)) for _ in range(CUTS - len(near)))]


def test_after_a_cut_anywhere_nothing_that_was_promised_is_lost(host: Host, counted: Counted) -> None:
    chance = random.Random(SEED)
    backups = starts = 0
    for index, after in enumerate(sorted(where_to_cut(host, chance))):
        seed = chance.randrange(1 << 32)
        host.files.cut(after, random.Random(seed), host.folder)
        try:
            backups += see_what_is_left(host, after)
            if index % STARTS_EACH == 0:
                see_that_it_starts(host)
                starts += 1
        except BaseException as e:
            e.add_note(f"the cut was behind change {after} of {len(host.changes)}, chance {seed}")
            raise
        finally:
            shutil.rmtree(HostFolders.find(host.folder / "state").memory_dir, ignore_errors=True)
            shutil.rmtree(host.folder)
    counted(
        f"{CUTS} power cuts within {len(host.changes)} changes of QEMU's and vmsnap's; {backups} backups were there,"
        f" none lost, all disks were sound ({host.chosen} to be chosen from two), the guest was started on those of"
        f" {starts}",
        cases=CUTS,
    )
    assert backups > CUTS // 2


def see_what_is_left(host: Host, after: int) -> int:
    """See that what was promised is there, and recover; returns how many backups there were."""
    repository = Repository.open(LocalStorage(str(host.folder / "repository")), "first")
    assert not repository.check(read_data=True).damaged
    there = {manifest.backup for manifest in repository.list()}
    assert there >= set(host.promised("backup", after))
    for backup in there:
        assert not repository.verify(backup).findings
    with Controller(HostFolders.find(host.folder / "state")) as controller:
        for _ in DISKS:
            # One disk is named at a time.
            for overlay in set(re.findall(r"/\S+\.pivoting", " ".join(controller.recover().kept))):
                choose(host, after, Path(overlay))
        assert controller.recover().kept == ()
        again = controller.recover()
        assert (again.resumed, again.removed, again.kept) == ((), (), ())
    machine = host.machine()
    disks = {machine.disk_path(0), machine.disk_path(1)}
    beside = {path for path in machine.folder.iterdir() if "vmsnap" in path.name}
    assert beside == set(), "no overlay and no snapshot is left"
    for index, path in enumerate(sorted(disks)):
        see_what_the_guest_was_promised(path, DISKS[index].format, index, host.counted_to(after))
    return len(there)


def choose(host: Host, after: int, overlay: Path) -> None:
    """The one thing that a person is left to do: the cut came in the moment in which the guest went back from its
    overlay to its disk, and one of the two holds all that the guest was promised. The message says what to do.
    """
    (index,) = (number for number in range(len(DISKS)) if f".{number}.overlay." in overlay.name)
    path, kind = host.machine().disk_path(index), DISKS[index].format
    host.chosen += 1
    try:
        see_what_the_guest_was_promised(path, kind, index, host.counted_to(after))
    except AssertionError:
        subprocess.run(["qemu-img", "commit", "-q", str(overlay)], check=True)
        see_what_the_guest_was_promised(path, kind, index, host.counted_to(after))
    overlay.unlink()


def see_what_the_guest_was_promised(path: Path, kind: str, disk: int, count: int) -> None:
    """Its disk is sound, and holds every record up to the one that it knew to be there."""
    raw = path
    if kind == "qcow2":
        checked = subprocess.run(["qemu-img", "check", "-q", "-f", kind, str(path)], capture_output=True, text=True)
        assert checked.returncode in (0, LEAKS_ALONE), checked.stdout + checked.stderr
        raw = path.with_suffix(".checked")
        subprocess.run(["qemu-img", "convert", "-f", kind, "-O", "raw", str(path), str(raw)], check=True)
    ring = disk_records.read_ring(raw)
    if raw is not path:
        raw.unlink()
    for number in range(max(1, count - DEFAULT_SLOTS + 1), count + 1):
        at = number % DEFAULT_SLOTS * RECORD_BYTES
        found = ring[at : at + RECORD_BYTES]
        seed, there = struct.unpack("<2Q", found[8:24])
        # It counts on before it says so, and a later record takes the place of an old one.
        if there != number + DEFAULT_SLOTS:
            assert found == disk_records.record(seed, number, disk), f"record {number} of {count} on disk {disk}"


def see_that_it_starts(host: Host) -> None:
    """The guest boots from what is there, works with its disks, and is backed up."""
    (host.folder / "vm001" / "serial.log").unlink(missing_ok=True)
    with host.machine() as machine, Controller(HostFolders.find(host.folder / "state")) as controller:
        machine.wait_for_check(1, timeout_seconds=120)
        if "vm001" not in [vm.vm for vm in controller.vms()]:
            controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        repository = Repository.open(LocalStorage(str(host.folder / "repository")), "first")
        made = controller.backup("vm001", repository, max_pause_seconds=20).backup
        assert not repository.verify(made).findings
        machine.wait_for_check(machine.latest_check() + 1)
        assert machine.faults() == []
