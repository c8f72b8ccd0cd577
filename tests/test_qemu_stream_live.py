"""Real QEMUs: what the reader takes out of their streams loads again, streamed or mapped, and the RAM agrees."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.initramfs import guest_image
from tests.lab.qemus import QemuBuild, available_qemus
from vmsnap_drivers.qemu.ram_image import image_path
from vmsnap_drivers.qemu.stream import MigrationStreamReader
from vmsnap_drivers.qemu.stream_format import CapturedMemory, StreamError
from vmsnap_drivers.qemu.synthesis import write_stream

pytestmark = pytest.mark.qemu

MIB = 1 << 20
# Not a multiple of 256 KiB: a pre-copy of QEMU 7.2 under emulation loses pages of such RAM.
RAM_BYTES = 256 * MIB + 8192
FILLED_AT = 96 * MIB
PATIENCE_SECONDS = 60
# Guest-physical ranges that are plain RAM on the pc machine: between them lie video memory and firmware.
RAM_RANGES = ((0, 0xA0000), (MIB, RAM_BYTES - MIB))
FIRMWARE_RANGE = (0xC0000, 0x40000)


def await_true(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


@dataclass
class Vm:
    """A QEMU process and its monitor."""

    process: subprocess.Popen[bytes]
    monitor: socket.socket
    folder: Path
    answers: Any = field(init=False)

    def __post_init__(self) -> None:
        self.answers = self.monitor.makefile("rb")
        assert b"QMP" in self.answers.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, *, fd: int | None = None, **arguments: object) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self.monitor, [request], [] if fd is None else [fd])
        while answer := json.loads(self.answers.readline()):
            if "event" not in answer:
                break
        assert "return" in answer, f"{command}: {answer}"
        return answer["return"]

    def set_capabilities(self, *names: str) -> None:
        self.call("migrate-set-capabilities", capabilities=[{"capability": n, "state": True} for n in names])

    def await_migration(self) -> None:
        def ended() -> bool:
            status = self.call("query-migrate")
            assert status.get("status") not in ("failed", "cancelled"), status
            return bool(status.get("status") == "completed")

        await_true("the migration", ended)

    def read_memory(self, address: int, length: int) -> bytes:
        dump = self.folder / "dump"
        self.call("pmemsave", val=address, size=length, filename=str(dump))
        content = dump.read_bytes()
        dump.unlink()
        return content


def filling() -> bytes:
    """RAM content with pages and zero pages in runs of 1 to 40, 64 MiB."""
    rng = np.random.default_rng(7)
    page_count = 64 * MIB // 4096
    has_data = np.repeat(np.arange(page_count) % 2 == 0, rng.integers(1, 41, page_count))[:page_count]
    pages = rng.integers(0, 256, (page_count, 4096), np.uint8)
    pages[~has_data] = 0
    return pages.tobytes()


class Lab:
    """Starts VMs of one build in one folder on a tmpfs, and ends them."""

    def __init__(self, build: QemuBuild, folder: Path, kernel: Path) -> None:
        self.build = build
        self.folder = folder
        self.kernel = kernel
        self.vms: list[Vm] = []
        (folder / "filling").write_bytes(filling())

    def start(self, name: str, *more: str) -> Vm:
        ours, theirs = socket.socketpair()
        arguments = [
            *("-display", "none", "-nodefaults", "-net", "none", "-accel", "tcg", "-m", f"{RAM_BYTES // 1024}K"),
            *("-vga", "std", "-serial", f"file:{self.folder / name}.serial"),
            *("-kernel", str(self.kernel), "-append", "console=ttyS0 mem=96M panic=0"),
            *("-device", f"loader,file={self.folder / 'filling'},addr={FILLED_AT:#x},force-raw=on"),
            *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"),
            *more,
        ]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.build.command(*arguments),
                env=self.build.start_environment(),
                pass_fds=[theirs.fileno()],
                stderr=log,
            )
        theirs.close()
        ours.settimeout(PATIENCE_SECONDS)
        vm = Vm(process, ours, self.folder)
        self.vms.append(vm)
        return vm

    def start_source(self) -> Vm:
        vm = self.start("source", "-machine", "pc")
        serial = self.folder / "source.serial"
        await_true("the guest's kernel", lambda: b"Linux version" in serial.read_bytes())
        return vm

    def load(self, name: str, captured: CapturedMemory, mapped: bool) -> Vm:
        """A second VM, stopped, that loaded the captured one: streamed over a socket or with its RAM mapped."""
        machine = ["-machine", "pc"]
        if mapped:
            index = [block.name for block in captured.blocks].index("pc.ram")
            image = image_path(captured.folder, index, "pc.ram")
            machine = [
                *("-machine", "pc,memory-backend=pc.ram"),
                *("-object", f"memory-backend-file,id=pc.ram,mem-path={image},share=off,size={RAM_BYTES}"),
            ]
        vm = self.start(name, *machine, "-incoming", "defer", "-S")
        reading, writing = os.pipe() if mapped else (end.detach() for end in socket.socketpair())
        vm.call("getfd", fd=reading, fdname="stream")
        os.close(reading)
        vm.call("migrate-incoming", uri="fd:stream")
        try:
            write_stream(writing, captured, captured.folder, frozenset({"pc.ram"} if mapped else ()))
        finally:
            os.close(writing)
        vm.await_migration()
        return vm

    def stop(self, vm: Vm) -> None:
        self.vms.remove(vm)
        vm.process.send_signal(signal.SIGKILL)
        vm.process.wait()
        vm.answers.close()
        vm.monitor.close()


@pytest.fixture(params=available_qemus(), ids=lambda build: f"qemu-{build.version}")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        lab = Lab(request.param, Path(folder), guest_image().kernel)
        yield lab
        for vm in list(lab.vms):
            lab.stop(vm)


def capture(vm: Vm, into: Path, by_pipe: bool) -> CapturedMemory:
    """Migrate a VM into a reader of ours."""
    into.mkdir(mode=0o700)
    reading, writing = os.pipe() if by_pipe else (end.detach() for end in socket.socketpair())
    outcome: list[CapturedMemory | BaseException] = []

    def read() -> None:
        try:
            reader = MigrationStreamReader(reading, into, stall_timeout_seconds=PATIENCE_SECONDS)
            outcome.append(reader.run())
            assert reader.absent_pages == 0
        except (StreamError, AssertionError) as error:
            outcome.append(error)
        finally:
            # QEMU's migration fails when its reader is gone, and the test with it, instead of waiting.
            os.close(reading)

    vm.call("getfd", fd=writing, fdname="stream")
    os.close(writing)
    thread = threading.Thread(target=read)
    thread.start()
    vm.call("migrate-set-parameters", **{"max-bandwidth": 10**10})
    vm.call("migrate", uri="fd:stream")
    thread.join(PATIENCE_SECONDS)
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    vm.await_migration()
    return result


def ram_image(captured: CapturedMemory) -> bytes:
    index = [block.name for block in captured.blocks].index("pc.ram")
    return image_path(captured.folder, index, "pc.ram").read_bytes()


def assert_same_ram(vm: Vm, image: bytes) -> None:
    for begin, length in RAM_RANGES:
        assert vm.read_memory(begin, length) == image[begin : begin + length]


def assert_runs(vm: Vm) -> None:
    vm.call("cont")
    before = vm.call("query-status")
    assert before["status"] == "running"


def assert_loads_again(lab: Lab, captured: CapturedMemory) -> None:
    """Streamed and mapped, the second VM has the captured RAM and firmware, and runs; the image stays as it was."""
    image = ram_image(captured)
    firmware = []
    for mapped in (False, True):
        vm = lab.load("mapped" if mapped else "streamed", captured, mapped)
        assert vm.call("query-status")["running"] is False
        assert_same_ram(vm, image)
        firmware.append(vm.read_memory(*FIRMWARE_RANGE))
        assert_runs(vm)
        lab.stop(vm)
    assert firmware[0] == firmware[1]
    assert any(firmware[0])
    assert ram_image(captured) == image


@pytest.mark.parametrize("by_pipe", [False, True], ids=["socket", "pipe"])
def test_a_pre_copy_stream_holds_the_ram_at_its_end_and_loads_again(lab: Lab, by_pipe: bool) -> None:
    vm = lab.start_source()
    captured = capture(vm, lab.folder / "captured", by_pipe)
    assert vm.call("query-status")["status"] == "postmigrate"
    assert filling() in ram_image(captured)
    assert_same_ram(vm, ram_image(captured))
    lab.stop(vm)
    assert_loads_again(lab, captured)


def test_a_background_snapshot_of_a_running_guest_loads_again(lab: Lab) -> None:
    vm = lab.start_source()
    vm.set_capabilities("background-snapshot")
    captured = capture(vm, lab.folder / "captured", by_pipe=True)
    assert vm.call("query-status")["status"] == "running"
    assert filling() in ram_image(captured)
    lab.stop(vm)
    assert_loads_again(lab, captured)
