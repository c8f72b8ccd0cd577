"""Twenty backups in a row of a QEMU whose disks change between and during them, each compared bit by bit with a copy of
the same instant, and none reads more than what changed.

No guest runs in it (its firmware halts at once), so that the copies are exact: what "the guest" writes, zeroes and
discards goes through its devices' backends by a second monitor.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine, available_qemus
from tests.lab.machine import Disk
from tests.lab.qemus import QemuBuild
from tests.left_out import some_of
from tests.workers import worker_that_waits_at
from tests.world import FaultyDrivers, unguarded
from vmsnap.controller import BackupResult, Controller, Drivers, Progress
from vmsnap.errors import VmsnapError
from vmsnap.export import export_disks
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap.repository import ChunkSizes, Repository
from vmsnap.testing.faults import Effect, Fault, FaultPlan

pytestmark = pytest.mark.qemu

KIB, MIB = 1 << 10, 1 << 20
CHUNK = ChunkSizes().disk
ROUNDS = 20
SLACK_BYTES = 2 * MIB
"""Samples of what is unchanged, and a few pages of RAM."""


class QuietMachine(LabMachine):
    """A QEMU without a guest, a qcow2 and a raw disk, both taking discards; the raw one has no node of its format."""

    def __init__(self, folder: Path, build: QemuBuild) -> None:
        super().__init__(folder, build, disks=(Disk("qcow2", 24 * MIB), Disk("raw", 16 * MIB)))
        self.sizes = [disk.size_bytes for disk in self.disks]
        self.written: list[set[int]] = [set(), set()]
        """For each disk the chunks that were touched since they were forgotten last."""
        self.random = random.Random(build.version)
        self._firmware = folder / "halt.bin"

    def command(self) -> list[str]:
        # cli; hlt; jmp -3 at the reset vector
        self._firmware.write_bytes(bytes(65536 - 16) + b"\xfa\xf4\xeb\xfd" + bytes(12))
        arguments = ["-name", self.name, "-uuid", self.uuid, "-nodefaults", "-no-user-config", "-display", "none"]
        arguments += ["-machine", "pc,accel=tcg", "-m", "32", "-bios", str(self._firmware)]
        for path in (self.qmp_socket, self.oracle_socket):
            arguments += ["-qmp", f"unix:{path},server=on,wait=off"]
        for index, disk in enumerate(self.disks):
            node = f"node-name=disk{index},discard=unmap"
            if disk.format == "raw":
                node += f",driver=file,filename={self.disk_path(index)}"
            else:
                node += f",driver={disk.format},file.driver=file,file.discard=unmap"
                node += f",file.filename={self.disk_path(index)}"
            arguments += ["-blockdev", node]
            arguments += ["-device", f"virtio-blk-pci,drive=disk{index},id=disk{index}"]
        return self.qemu.command(*arguments)

    def change(self, index: int, kind: str, offset: int, length: int) -> None:
        """Write random data, write zeros, or discard, as the guest would."""
        flags = {"data": f"-P {self.random.randrange(1, 256)} ", "zeros": "-z -u ", "discard": ""}[kind]
        verb = "discard" if kind == "discard" else "write"
        path = f"/machine/peripheral/disk{index}/virtio-backend"
        answer = self.oracle.hmp(f'qemu-io -d {path} "{verb} {flags}{offset} {length}"')
        assert "rror" not in answer and "failed" not in answer, answer
        self.written[index] |= set(range(offset // CHUNK, -(-(offset + length) // CHUNK)))

    def scribble(self, changes: int = 4) -> None:
        """Change each disk here and there."""
        for index, size_bytes in enumerate(self.sizes):
            for _ in range(changes):
                length = self.random.choice((512, 4 * KIB, 64 * KIB, 200 * KIB))
                offset = self.random.randrange(0, size_bytes - length, 512)
                self.change(index, self.random.choice(("data", "data", "zeros", "discard")), offset, length)

    def copy_disks(self, folder: Path) -> dict[str, Path]:
        """What the guest would read now."""
        copies = {}
        for index, disk in enumerate(self.disks):
            self.oracle.hmp(f'qemu-io -d /machine/peripheral/disk{index}/virtio-backend "flush"')
            copy = copies[f"disk{index}"] = folder / f"reference{index}.raw"
            argv = ["qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", str(self.disk_path(index)), str(copy)]
            subprocess.run(argv, check=True)
        return copies

    def resize(self) -> None:
        """Grow both disks."""
        for index in range(len(self.sizes)):
            self.sizes[index] += 8 * MIB
            self.oracle.execute("block_resize", node_name=f"disk{index}", size=self.sizes[index])

    def restart(self, *, orderly: bool) -> None:
        """End QEMU, or kill it, and start another."""
        if orderly:
            self.oracle.hmp("quit")
            self._wait("the end of QEMU", self.ended, 30)
        self.kill()
        self.start()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=some_of(available_qemus(), 2), ids=lambda build: f"qemu{build.version}")
def machine(request: pytest.FixtureRequest, place: Path) -> Iterator[QuietMachine]:
    (place / "vm").mkdir()
    with QuietMachine(place / "vm", request.param) as started:
        for index, size_bytes in enumerate(started.sizes):
            started.change(index, "data", 0, size_bytes)
        yield started


class Series:
    """Backups of one machine into one repository, each compared."""

    def __init__(self, place: Path, machine: QuietMachine) -> None:
        self.place, self.machine = place, machine
        self.folders = HostFolders.find(place / "state")
        self.url = str(place / "repository")
        self.repository = create_repository(self.url)
        self.results: list[BackupResult] = []
        self.ram_bytes = 0
        with self.controller() as controller:
            controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})

    def controller(self, faults: FaultPlan | None = None) -> Controller:
        context = self.folders.context()
        drivers = Drivers(context) if faults is None else FaultyDrivers(context, faults)
        return Controller(self.folders, drivers=drivers, start_guardian=unguarded)

    def back_up(self, whole: str = "") -> None:
        """Take a backup, the guest writing while it is stored, and compare it. The disks whose numbers stand in
        `whole` must be read whole and said to be; of the others what changed since the last one.
        """
        machine = self.machine
        references = machine.copy_disks(self.place)
        before, machine.written = machine.written, [set(), set()]

        def write_meanwhile(progress: Progress) -> None:
            if progress.phase == "storing" and not any(machine.written):
                machine.scribble(1)

        with self.controller() as controller:
            result = controller.backup("vm001", self.repository, progress=write_meanwhile)
        assert any(machine.written), "nothing was written while it was stored"
        self.compare(self.repository, result, references)
        told = [warning for warning in result.warnings if "was read whole" in warning]
        assert [f"disk disk{index}" for index in whole] == [warning.split(" was")[0] for warning in told], told
        if self.results:
            self.see_what_was_read(result, before, whole)
        else:
            self.ram_bytes = result.read_bytes - sum(machine.sizes)
            assert 0 < self.ram_bytes < 8 * MIB
        self.results.append(result)

    def see_what_was_read(self, result: BackupResult, before: list[set[int]], whole: str) -> None:
        """What was written while it was stored may be read too: the record is asked after the instant."""
        least = most = 0
        for index, size_bytes in enumerate(self.machine.sizes):
            everything = set(range(size_bytes // CHUNK))
            most += len(everything if str(index) in whole else before[index] | self.machine.written[index])
            least += len(everything) // 3 if str(index) in whole else 0
        assert least * CHUNK < result.read_bytes <= self.ram_bytes + most * CHUNK + SLACK_BYTES

    def compare(self, repository: Repository, result: BackupResult, references: dict[str, Path]) -> None:
        """Bit by bit."""
        folder = self.place / "exported"
        folder.mkdir()
        for device, exported in export_disks(repository, result.backup, folder).items():
            argv = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(exported), str(references[device])]
            done = subprocess.run(argv, check=False, capture_output=True, text=True)
            assert done.returncode == 0, f"{result.backup}, {device}: {done.stdout}{done.stderr}"
        shutil.rmtree(folder)

    # -- what comes between two backups

    def one_that_fails(self) -> None:
        faults = FaultPlan(Fault("reader", 2, Effect.BEFORE))
        with self.controller(faults) as controller, pytest.raises(VmsnapError):
            controller.backup("vm001", self.repository)
        self.machine.scribble()

    def one_elsewhere(self) -> None:
        references = self.machine.copy_disks(self.place)
        other = create_repository(str(self.place / "other"))
        with self.controller() as controller:
            self.compare(other, controller.backup("vm001", other), references)
        self.machine.scribble()

    def killed_at(self, call: str) -> None:
        worker = worker_that_waits_at(self.folders.state_dir, self.url, call)
        worker.kill()
        worker.wait()
        with self.controller() as controller:
            assert controller.recover().kept == ()
        self.machine.scribble()


@pytest.mark.timeout(400)
def test_twenty_backups_in_a_row_are_right_and_read_what_changed(place: Path, machine: QuietMachine) -> None:
    series = Series(place, machine)
    between: dict[int, tuple[Callable[[], None], str]] = {
        3: (series.one_that_fails, ""),
        5: (machine.resize, "01"),
        7: (series.one_elsewhere, ""),
        9: (lambda: machine.restart(orderly=True), "1"),
        11: (lambda: series.killed_at("settle"), ""),
        13: (lambda: series.killed_at("changed_extents"), ""),
        15: (lambda: series.killed_at("keep_mark"), "01"),
        17: (lambda: machine.restart(orderly=False), "01"),
    }
    for number in range(ROUNDS):
        what, whole = between.get(number, (lambda: None, ""))
        if number:
            machine.scribble()
        what()
        series.back_up(whole)
    assert len(series.results) == ROUNDS
    with series.controller() as controller:
        controller.remove_vm("vm001")
    nodes = machine.oracle.execute("query-named-block-nodes")
    assert not [node for node in nodes if node.get("dirty-bitmaps")]
    machine.restart(orderly=True)
    nodes = machine.oracle.execute("query-named-block-nodes")
    assert not [node for node in nodes if node.get("dirty-bitmaps")]
    assert all(not report.findings for report in [series.repository.check(read_data=True)])
