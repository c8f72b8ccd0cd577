"""What the tests of consistent backups and of failover share: a real guest that buffers, on a bridge, with ext4.

Its first disk has the ring of records, its second one an ext4 file system on which tests/lab/guest/programs
keeps a database; its NIC is on a bridge on which the test listens.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guardians import remove_host
from tests.lab import Disk, LabMachine, QemuBuild, ext4
from tests.lab import serial as console
from tests.lab.bridge import Bridge
from tests.lab.machine import PATIENCE_SECONDS
from tests.test_live_backup_qemu import processes_of
from vmsnap.controller import Controller, Drivers
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap.repository import Repository

MIB = 1 << 20
ENTRIES_AT_LEAST = 60
"""More than the database's cache holds, so that a part of the open transaction is in its file."""
_numbers = itertools.count(1)


def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


@dataclass
class Stage:
    place: Path
    bridge: Bridge
    machine: LabMachine
    controller: Controller
    repository: Repository

    def entries(self) -> int:
        """How many entries the guest's application said it has, in RAM and in its open transaction."""
        return max(console.application_counts(self.machine.serial_text()), default=0)

    def pid(self) -> int:
        """The process that the VM is now."""
        (found,) = [pid for pid in processes_of(self.place) if "qemu" in Path(f"/proc/{pid}/exe").resolve().name]
        return found

    def kill_vm(self) -> None:
        """Kill it, whoever started it, and wait until it is gone."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        if pid == self.machine.pid:
            self.machine.kill()
        until(lambda: pid not in processes_of(self.place), "it is gone")

    def stops(self) -> list[str]:
        """QEMU's own STOP and RESUME events so far."""
        return [event["event"] for event in self.machine.oracle.events() if event["event"] in ("STOP", "RESUME")]

    def disk(self, backup: str, device: str) -> Path:
        """A disk of a backup, as a raw image."""
        manifest = self.repository.manifest(backup)
        image = next(disk.image for disk in manifest.disks if disk.device == device)
        path = self.place / f"{backup}-{device}-{next(_numbers)}.raw"
        with self.repository.reader(image, device) as reader:
            reader.restore_to_file(path)
        return path

    def left(self) -> list[str]:
        """What there is of duplicates and snapshots: files in memory, clones, VMs, records. What is known of the disks'
        changes since a backup is meant to stay.
        """
        folders = self.controller.folders
        state = folders.state_dir
        places = (folders.memory_dir, state / "duplicates", state / "qemu" / "run", state / "qemu" / "captures")
        found = [path for place in (*places, state / "qcow2") for path in place.rglob("*")]
        kept = state / "qcow2" / "bitmaps"
        return sorted(str(path) for path in found if not path.is_dir() and kept not in path.parents)


@contextmanager
def staged(
    build: QemuBuild,
    luns: tuple[str, ...] = (),
    mechanism_options: Mapping[str, Mapping[str, str]] | None = None,
    account: tuple[str, Path] | None = None,
) -> Iterator[Stage]:
    """The guest, its application under way, registered as ``vm001``. Its disks are the `luns` where there are two: raw,
    256 and 64 MiB, the second of them with ext4 (`make_ext4`) already. The first disk has no node of its format.

    :param account: by which its QEMU reaches the LUNs: a user of CHAP, and the file of the secret
    """
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    with contextlib.ExitStack() as stack:
        stack.callback(remove_host, place)
        bridge = stack.enter_context(Bridge(next(_numbers)))
        machine = LabMachine(
            place / "vm001",
            build,
            disks=_disks(luns, account[0] if account else ""),
            extra_arguments=chap_arguments(account[1]) if account else (),
            network=bridge.network,
            settings={"ext4_disk": 2, "packets": 1},
        )
        machine.folder.mkdir()
        if not luns:
            made = place / "ext4.raw"
            ext4.make_ext4(made, 64 * MIB)
            convert = [str(build.img_binary), "convert", "-f", "raw", "-O", "qcow2", str(made)]
            subprocess.run([*convert, str(machine.disk_path(1))], check=True, capture_output=True)
        stack.enter_context(machine)
        stack.callback(end_all, place)
        folders = HostFolders.find(place / "state")
        drivers = Drivers(folders.context(), mechanism_options)
        controller = stack.enter_context(Controller(folders, drivers=drivers))
        controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        repository = create_repository(str(place / "repository"))
        stage = Stage(place, bridge, machine, controller, repository)
        until(lambda: stage.entries() >= ENTRIES_AT_LEAST, "the guest's application works", 150)
        machine.wait_for_check(1)
        yield stage


def chap_arguments(secret: Path) -> tuple[str, ...]:
    """What makes the secret of a disk's `account` known to its QEMU."""
    return "-object", f"secret,id=chap,file={secret}"


def _disks(luns: tuple[str, ...], user: str) -> tuple[Disk, ...]:
    if not luns:
        return Disk("raw", bare=True), Disk("qcow2", 64 * MIB)
    first, second = luns
    return Disk("raw", address=first, account=user, bare=True), Disk("raw", 64 * MIB, second, user)


def end_all(place: Path) -> None:
    """End what a test that failed has left running."""
    for pid in processes_of(place):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Ledger:
    """What the application's file system holds, to be read after a replay of its journal, if need be.

    `buffered` is what was flushed of the buffer (None: it was not), `open_journal` whether a transaction was under
    way; `entries`, `amount` (of the entries) and `total` are what the database says, in order.
    """

    buffered: int | None
    open_journal: bool
    integrity: str
    entries: int
    amount: int
    total: int


def read_ledger(image: Path) -> Ledger:
    """Read it, the database by SQLite itself, which rolls an open transaction back."""
    buffer = ext4.content_of(image, "buffer")
    buffered = None
    if buffer is not None:
        numbers = struct.unpack(f"<{len(buffer) // 8}Q", buffer)
        assert numbers == tuple(range(1, len(numbers) + 1))
        buffered = len(numbers)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ledger.db", "ledger.db-journal"):
            content = ext4.content_of(image, name)
            if content is not None:
                Path(folder, name).write_bytes(content)
        # A committed transaction's journal is deleted; one that is there has a head unless it was just begun.
        journal = Path(folder, "ledger.db-journal")
        open_journal = journal.exists() and journal.stat().st_size > 0
        with contextlib.closing(sqlite3.connect(Path(folder, "ledger.db"))) as database:
            (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
            entries, amount = database.execute("SELECT count(*), coalesce(sum(amount), 0) FROM entry").fetchone()
            (total,) = database.execute("SELECT amount FROM total").fetchone()
    return Ledger(buffered, open_journal, integrity, entries, amount, total)
