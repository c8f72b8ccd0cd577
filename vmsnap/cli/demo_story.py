"""The story of ``vmsnap demo``: what is done, what is told of it, and how it is seen to be true.

What is claimed of a backup is read from the backup itself, what is claimed of a guest is asked of the guest.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.demo_watch import Watch
from vmsnap.controller import Controller
from vmsnap.errors import UnknownVm, VmsnapError
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap_drivers.hypervisors.simulated import lifecycle
from vmsnap_drivers.hypervisors.simulated.control import ask
from vmsnap_drivers.hypervisors.simulated.layout import read_disk, read_ram

if TYPE_CHECKING:
    from vmsnap.controller import BackupResult
    from vmsnap.repository import Repository

VM = "web1"
COPY = "web1-copy"
MEMORY_BYTES = 64 << 20
DISK_BYTES = 256 << 20
FILES_BYTES = 8 << 20
# As long as a pause may last where nothing else is said. A busy machine lets a program wait for a second, too.
_LONGEST_STALL_SECONDS = 5.0


class Story:
    """Tells the story, and keeps what it claims and whether it was seen."""

    def __init__(self, folder: Path, passphrase: str, *, silent: bool) -> None:
        self.claims: dict[str, bool] = {}
        self._folder = folder
        self._passphrase = passphrase
        self._silent = silent
        self._facts: dict[str, Any] = {}
        self._folders = HostFolders.find(folder / "state")
        self._controller = Controller(self._folders)
        self._sockets: dict[str, Path] = {}
        self._watch: Watch | None = None

    def tell(self) -> dict[str, Any]:
        """Do it all; returns the facts. Blocks for some ten seconds.

        :raises VmsnapError: something failed outright
        """
        self._start()
        repository = self._make_repository()
        first = self._back_up(repository)
        captured = self._look_into(repository, first)
        self._restore(repository, first, captured)
        self._back_up_again(repository, first)
        self._check(repository)
        self._look_back()
        return self._facts

    def close(self) -> None:
        """Stop the VMs, whatever their state; idempotent."""
        if self._watch is not None:
            self._watch.stop()
        for name in (VM, COPY):
            with suppress(UnknownVm):
                lifecycle.stop(lifecycle.socket_of(self._folders.state_dir, name), force=True)
        self._controller.close()

    # -- telling

    def _heading(self, text: str) -> None:
        if not self._silent:
            click.echo(f"\n{click.style(text, bold=True)}")

    def _say(self, text: str) -> None:
        if not self._silent:
            click.echo(f"  {text}")

    def _claim(self, text: str, seen: bool) -> None:
        self.claims[text] = seen

    # -- the chapters

    def _start(self) -> None:
        self._heading("A VM works")
        disk = self._folder / "web1.img"
        _fill(disk)
        started = lifecycle.start(VM, MEMORY_BYTES, [disk], self._folder, state_dir=self._folders.state_dir)
        self._sockets[VM] = Path(started.options["socket"])
        row = self._controller.add_vm(VM, "simulated", started.options)
        self._watch = Watch(self._sockets[VM])
        self._say(f"{VM} is a process of its own: {output.size(MEMORY_BYTES)} of RAM, a disk of")
        self._say(
            f"{output.size(DISK_BYTES)} with {output.size(FILES_BYTES)} of files. Its guest counts, in RAM and on"
        )
        self._say("the disk at once, and checks all the time that they agree.")
        before = self._counter(VM)
        time.sleep(0.5)
        after = self._counter(VM)
        self._say(f"Its counter: {before}, half a second later {after}.")
        self._claim("the VM works: its counter goes up", row.state == "executing" and after > before)

    def _make_repository(self) -> Repository:
        self._heading("A repository is made")
        repository = create_repository(str(self._folder / "repository"), self._passphrase)
        self._say(f"Encrypted with {repository.encryption}, in {self._folder / 'repository'}.")
        self._claim("the repository is encrypted", repository.encryption == "aes256-gcm")
        return repository

    def _back_up(self, repository: Repository) -> BackupResult:
        self._heading("The VM is backed up while it works")
        before = self._counter(VM)
        result = self._controller.backup(VM, repository)
        after = self._counter(VM)
        self._say(f"{result.backup}")
        self._say(
            f"RAM, vCPU and disk of one instant. The guest stood still for {output.milliseconds(result.pause_seconds)};"
        )
        self._say(f"{output.size(result.read_bytes)} were read, {output.size(result.stored_bytes)} stored.")
        self._say(f"Its counter went on from {before} to {after} meanwhile.")
        self._claim("the VM works on after the backup", self._state(VM) == "executing" and after > before)
        self._facts |= {"pause_seconds": result.pause_seconds, "first": _numbers(result)}
        return result

    def _look_into(self, repository: Repository, result: BackupResult) -> int:
        """The captured count, read from the backup itself, where no VM has a say."""
        manifest = repository.manifest(result.backup)
        ram_file, disk_file = self._folders.memory_dir / "demo-ram", self._folder / "demo-disk.raw"
        repository.reader(manifest.memory[0].image).restore_to_file(ram_file)
        repository.reader(manifest.disks[0].image).restore_to_file(disk_file)
        try:
            ram, disk = read_ram(ram_file), read_disk(disk_file)
        finally:
            ram_file.unlink()
            disk_file.unlink()
        if ram is None or disk is None:
            raise VmsnapError(f"backup {result.backup} does not hold the guest's RAM and disk")
        self._say(f"In the backup, RAM has counted to {ram.counter}, and the disk's last record is {disk.latest}.")
        agree = not ram.wrong_pages and ram.completed == (disk.latest,) and ram.counter - disk.latest in (0, 1)
        self._claim("in the backup RAM and disk are of one instant", agree)
        self._facts["captured_count"] = ram.counter
        return ram.counter

    def _restore(self, repository: Repository, result: BackupResult, captured: int) -> None:
        self._heading("A second VM is brought up from the backup, beside the first")
        restored = self._controller.restore(repository, result.backup, COPY, run=True, isolated=True)
        self._sockets[COPY] = Path(restored.options["socket"])
        copy, original = self._counter(COPY), self._counter(VM)
        self._say(f"{COPY} executes on a disk of its own, its network cut, after {restored.seconds:.1f} s.")
        self._say(f"It went on from {captured} and is at {copy} now, while {VM} is at {original}.")
        continued = restored.state == "executing" and captured <= copy < original
        self._claim("the restored VM goes on from the captured count", continued)
        fault = ask(self._sockets[COPY], "check")["fault"]
        time.sleep(0.3)
        later = self._counter(COPY)
        works = not fault and self._state(COPY) == "executing" and later > copy
        self._say(f"Its guest has compared all of its RAM and its disk: {fault or 'they agree'}.")
        self._claim("the restored VM finds RAM and disk in agreement, and works", works)
        self._facts |= {"restored_count": copy, "original_count": original}

    def _back_up_again(self, repository: Repository, first: BackupResult) -> None:
        self._heading("The first VM is backed up again")
        second = self._controller.backup(VM, repository)
        self._say(f"It stood still for {output.milliseconds(second.pause_seconds)}. Only what is new was stored:")
        self._say(f"{output.size(second.stored_bytes)}, after {output.size(first.stored_bytes)} the first time.")
        self._claim("a second backup stores little", second.stored_bytes * 4 < first.stored_bytes)
        self._facts["second"] = _numbers(second)

    def _check(self, repository: Repository) -> None:
        self._heading("Everything is read back and authenticated")
        backups = [manifest.backup for manifest in repository.list()]
        reports = [repository.verify(backup) for backup in backups] + [repository.check(read_data=True)]
        whole = len(backups) == 2 and not any(report.damaged for report in reports)
        verified = sum(report.read_bytes for report in reports[:-1])
        self._say(f"{len(backups)} backups, {output.size(verified)}: {'no damage' if whole else 'DAMAGE'}.")
        self._claim("both backups are whole", whole)

    def _look_back(self) -> None:
        watch, left = self._watch, self._controller.journal.unfinished()
        stall = watch.stop() if watch is not None else float("inf")
        self._heading("All that time")
        self._say(f"{VM} was watched from outside: its counter never stood still for longer than")
        self._say(f"{output.milliseconds(stall)}. It is at {self._counter(VM)} now.")
        fault = ask(self._sockets[VM], "check")["fault"]
        never_stopped = stall < _LONGEST_STALL_SECONDS and not fault and self._state(VM) == "executing"
        self._claim("the first VM never stopped, and its RAM and disk agree", never_stopped)
        images = [path for path in self._folders.memory_dir.rglob("*") if path.is_file()]
        self._claim("nothing is left of the backups on this host", not left and not images)
        self._facts["longest_stall_seconds"] = stall

    # -- asking the guests

    def _counter(self, vm: str) -> int:
        return int(ask(self._sockets[vm], "status")["counter"])

    def _state(self, vm: str) -> str:
        return str(ask(self._sockets[vm], "status")["state"])


def _numbers(result: BackupResult) -> dict[str, Any]:
    return {
        "backup": result.backup,
        "pause_seconds": result.pause_seconds,
        "read_bytes": result.read_bytes,
        "stored_bytes": result.stored_bytes,
        "seconds": result.seconds,
    }


def _fill(disk: Path) -> None:
    """A disk with files that cannot be compressed, behind its first half; the guest writes records over the rest."""
    with disk.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(DISK_BYTES)
        file.seek(DISK_BYTES // 2)
        for _ in range(FILES_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())  # or the first pause would have to
