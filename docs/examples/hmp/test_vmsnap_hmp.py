"""The driver keeps the contract of its role: real QEMUs, with a guest of ours that counts (guest.c)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from vmsnap.errors import HypervisorError, PauseExceeded, StorageFull
from vmsnap.model import Disk, Duplicate
from vmsnap.roles import CaptureRequest, DriverContext, Hypervisor
from vmsnap.testing.crashes import HypervisorCrashes
from vmsnap.testing.faults import Effect
from vmsnap.testing.figures import HypervisorFigures
from vmsnap.testing.hypervisor import HypervisorContract
from vmsnap.testing.rigs import HypervisorRig, Packets, eventually
from vmsnap_hmp import HmpHypervisor
from vmsnap_hmp.commandline import CommandLine, joined, pairs

HERE = Path(__file__).parent
WORDS_AT = 0x200000
"""Where the guest's words lie in its RAM: magic, count, fault, deaf."""
MAGIC = 0x564D5348
RAM_BYTES = 16 << 20
DISK_BYTES = 64 << 10
GCC = ["gcc", "-m32", "-march=i686", "-mno-sse", "-ffreestanding", "-nostdlib", "-static", "-O1", "-Wall", "-Werror"]
GCC += ["-fno-pie", "-no-pie", "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"]
GCC += ["-Wl,--build-id=none"]


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's kernel."""
    kernel = tmp_path_factory.mktemp("guest") / "guest"
    argv = [*GCC, f"-Wl,-T,{HERE / 'guest.ld'}", "-o", str(kernel), str(HERE / "guest.c")]
    subprocess.run(argv, check=True)
    return kernel


def processes(folder: Path) -> dict[str, tuple[int, Path]]:
    """The QEMUs that work in a folder: by VM, the number of the process and the file of its RAM."""
    found = {}
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            argv = (proc / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "qemu-system" in argv[0] and any(str(folder) in word for word in argv) and "-name" in argv:
            ram = pairs(argv[argv.index("-object") + 1])["mem-path"]
            found[argv[argv.index("-name") + 1]] = (int(proc.name), Path(ram))
    return found


class Guests:
    """The VMs that all scenarios share; one that a scenario has ended or broken is started again."""

    def __init__(self, folder: Path, kernel: Path, images: Path | None = None) -> None:
        self.folder, self._kernel, self._images = folder, kernel, images or folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def ram(self, vm: str) -> Path:
        return self.folder / f"{vm}.ram"

    def monitor(self, vm: str) -> Path:
        return self.folder / f"{vm}.monitor"

    def image(self, vm: str, number: int) -> Path:
        return self._images / f"{vm}-{number}.img"

    def running(self, vm: str) -> None:
        """See to it that the VM executes, without a fault, and with the settings of a new one."""
        process = self._processes.get(vm)
        if process is None or process.poll() is not None or words_in(self.ram(vm))[2]:
            self.end(vm)
            self._start(vm)
        say(self.monitor(vm), "migrate_set_capability x-ignore-shared off")
        say(self.monitor(vm), "cont")
        before = words_in(self.ram(vm))[1]
        eventually(lambda: words_in(self.ram(vm))[1] > before, f"{vm} counts", 60)

    def _start(self, vm: str) -> None:
        self.ram(vm).unlink(missing_ok=True)
        drives = []
        for number in range(2):
            self.image(vm, number).write_bytes(bytes(DISK_BYTES))
            drives += ["-drive", f"id=disk{number},file={self.image(vm, number)},format=raw,if=ide"]
        ram = f"memory-backend-file,id=ram,mem-path={self.ram(vm)},size={RAM_BYTES},share=on"
        argv = ["qemu-system-x86_64", "-name", vm, "-nodefaults", "-display", "none", "-m", str(RAM_BYTES >> 20)]
        argv += ["-machine", "pc,memory-backend=ram", "-object", ram, *drives, "-kernel", str(self._kernel)]
        process = subprocess.Popen([*argv, "-monitor", f"unix:{self.monitor(vm)},server=on,wait=off"])
        self._processes[vm] = process

        def is_up() -> bool:
            assert process.poll() is None, f"{vm} did not start"
            return self.ram(vm).exists() and words_in(self.ram(vm))[0] == MAGIC

        eventually(is_up, f"{vm} is up", 60)

    def end(self, vm: str) -> None:
        """Kill the VM, and wait until it is gone."""
        process = self._processes.pop(vm, None)
        if process is not None:
            process.kill()
            process.wait(60)


def words_in(ram: Path) -> tuple[int, ...]:
    """The guest's words: magic, count, fault, deaf; nothing but zeros where the RAM is not there yet."""
    with ram.open("rb") as file:
        return struct.unpack("<4I", os.pread(file.fileno(), 16, WORDS_AT).ljust(16, b"\0"))


def say(monitor: Path, command: str) -> bytes:
    """Give QEMU a command, past the driver."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(monitor))  # without a time-out it waits for its turn
        connection.settimeout(60)
        connection.sendall(f"{command}\n".encode())
        heard = b""
        while heard.count(b"(qemu) ") < 2:
            more = connection.recv(65536)
            assert more, "the monitor was closed"
            heard += more
    return heard


@pytest.fixture(scope="module")
def guests(guest: Path) -> Iterator[Guests]:
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-hmp-", dir="/dev/shm"))
    made = Guests(folder, guest)
    yield made
    for vm in (HmpRig.vm, HmpRig.foreign_vm):
        made.end(vm)
    shutil.rmtree(folder)


class HmpRig(HypervisorRig):
    """Two QEMUs. The oracle reads the guests' RAM and images as files, and asks QEMU nothing but to go on."""

    vm, foreign_vm = "vm001", "vm900"
    watch_seconds = 0.15
    patience_seconds = 60.0
    life_seconds = 0.5
    examples = 8

    def __init__(self, guests: Guests) -> None:
        self.guests = guests
        self.root = Path(tempfile.mkdtemp(prefix="rig-", dir=guests.folder))
        self.scratch = self.root / "scratch"
        self.context = DriverContext(self.root / "state", self.root / "memory")
        for made in (self.scratch, self.context.state_dir, self.context.memory_dir):
            made.mkdir(mode=0o700)
        self.options = {"monitor": str(guests.monitor(self.vm))}
        for vm in (self.vm, self.foreign_vm):
            guests.running(vm)

    def driver(self, vm: str, options: Mapping[str, str] | None = None) -> Hypervisor:
        own = {"monitor": str(self.guests.monitor(vm))} if vm in (self.vm, self.foreign_vm) else {}
        return HmpHypervisor(vm, self.context, {"timeout": "30", **own, **(options or {})})

    def _ram(self, vm: str) -> Path:
        return processes(self.guests.folder)[vm][1]

    def progress(self, vm: str) -> int:
        return words_in(self._ram(vm))[1]

    def image_progress(self, duplicate: Duplicate) -> int | None:
        magic, count, fault, _ = words_in(duplicate.images[0].path)
        assert magic == MAGIC and not fault
        return count

    def verdict(self, vm: str) -> str:
        fault = words_in(self._ram(vm))[2]
        return f"disk {fault - 1} is of another instant" if fault else ""

    @staticmethod
    def _sector(image: str | Path) -> tuple[int, ...]:
        return struct.unpack("<3I", Path(image).read_bytes()[:12])

    def undrained(self, vm: str) -> str:
        count = self.progress(vm)
        for number in range(2):
            magic, kept, _ = self._sector(self.guests.image(vm, number))
            if magic != MAGIC or kept not in (count, count + 1):
                return f"disk {number} has {kept}, the guest wrote {count}"
        return ""

    def clean(self, disks: Sequence[Disk]) -> bool:
        sectors = [self._sector(disk.address) for disk in disks]
        return all(sector == sectors[0] and sector[2] == 1 for sector in sectors)

    def kill(self, vm: str) -> None:
        os.kill(processes(self.guests.folder)[vm][0], signal.SIGKILL)
        self.guests.end(vm)
        self.eventually(lambda: vm not in processes(self.guests.folder), f"{vm} is dead")

    def resume_past_driver(self, vm: str) -> None:
        say(self.guests.monitor(vm), "cont")

    def ignore_shutdown(self, vm: str) -> None:
        with self._ram(vm).open("r+b") as ram:
            os.pwrite(ram.fileno(), struct.pack("<I", 1), WORDS_AT + 12)

    def packets(self, vm: str) -> Packets | None:
        return None

    def traces(self) -> frozenset[str]:
        kept = (self.context.state_dir, self.context.memory_dir)
        found = {str(path) for folder in kept for path in folder.rglob("*") if path.name not in ("hmp", "run")}
        running = processes(self.guests.folder)
        found |= {f"process {vm}" for vm in running}
        if self.vm in running:
            settings = say(self.guests.monitor(self.vm), "info migrate_capabilities").decode().split("\r\n")
            found |= {line for line in settings if line.endswith(": on")}
        return frozenset(found)

    def end(self) -> None:
        """End what was loaded."""
        for vm, (pid, _) in processes(self.root).items():
            if vm not in (self.vm, self.foreign_vm) or self._ram(vm).is_relative_to(self.root):
                os.kill(pid, signal.SIGKILL)
                self.eventually(lambda vm=vm: vm not in processes(self.root), f"{vm} is dead")  # type: ignore[misc]
        shutil.rmtree(self.root)


@pytest.fixture
def rig(guests: Guests) -> Iterator[HmpRig]:
    rig = HmpRig(guests)
    yield rig
    rig.end()


class TestHmp(HypervisorContract):
    @pytest.fixture
    def rig(self, guests: Guests) -> Iterator[HmpRig]:
        rig = HmpRig(guests)
        yield rig
        rig.end()


class TestFigures(HypervisorFigures):
    rig = TestHmp.rig


class TestCrashes(HypervisorCrashes):
    effects = (Effect.KILL_AFTER,)
    rig = TestHmp.rig


def test_a_vm_that_was_resumed_and_paused_again_is_no_instant(rig: HmpRig) -> None:
    driver = rig.driver(rig.vm)
    request = CaptureRequest("bk", 30.0)
    driver.prepare(request, driver.plan_capture(request))
    driver.pause()
    for command in ("cont", "stop"):
        say(rig.guests.monitor(rig.vm), command)
    with pytest.raises(HypervisorError, match="executed while"):
        driver.duplicate()
    driver.abandon()
    driver.resume()


def test_a_qemu_that_hangs_is_given_up_and_runs_when_it_wakes(rig: HmpRig) -> None:
    driver = rig.driver(rig.vm, {"timeout": "0.2"})
    pid = processes(rig.guests.folder)[rig.vm][0]
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(PauseExceeded):
        driver.pause()
    with pytest.raises(HypervisorError):
        driver.state()
    assert time.monotonic() - begin < 30
    os.kill(pid, signal.SIGCONT)
    rig.driver(rig.vm).resume()
    before = rig.progress(rig.vm)
    rig.eventually(lambda: rig.progress(rig.vm) > before, "the guest counts on")


def test_no_room_is_found_before_anything_is_made(rig: HmpRig) -> None:
    poor = DriverContext(rig.context.state_dir, rig.context.memory_dir, memory_budget_bytes=1 << 20)
    with pytest.raises(StorageFull, match="memory budget"):
        HmpHypervisor(rig.vm, poor, rig.options).plan_capture(CaptureRequest("bk", 5.0))


@pytest.mark.parametrize(
    "words",
    [
        "-drive file=/a,format=raw",
        "-drive id=a,file=/a,format=qcow2",
        "-drive id=a,file=/a,format=raw,snapshot=on",
        "-nic user",
        "-object memory-backend-file,id=ram,mem-path=/r,size=1M",
        "-object memory-backend-ram,id=ram,size=1M",
    ],
)
def test_what_cannot_be_captured_truthfully_is_said(words: str) -> None:
    good = ["-machine", "pc,memory-backend=ram", "-object", "memory-backend-file,id=ram,mem-path=/r,size=1M,share=on"]
    assert not list(CommandLine.parse(good).refusals())
    assert list(CommandLine.parse([*good, *words.split()]).refusals())


def test_an_unknown_option_is_an_error_and_no_guess() -> None:
    with pytest.raises(HypervisorError, match="-device is not known"):
        CommandLine.parse(["-device", "vfio-pci,host=01:00.0"])


def test_commas_in_names_survive() -> None:
    assert pairs("file=/a,,b,format=raw") == {"file": "/a,b", "format": "raw"}
    assert pairs(joined({"file": "/a,b", "on": ""})) == {"file": "/a,b", "on": ""}
