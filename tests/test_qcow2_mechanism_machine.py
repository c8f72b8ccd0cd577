"""A real QEMU for the tests of the mechanism qcow2; this file has no tests of its own.

No guest runs in it (its firmware halts at once): what "the guest" writes goes through its device's block backend by a
second monitor, which also is the oracle.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.qemus import QemuBuild, available_qemus
from tests.lab.qmp import Oracle
from vmsnap.model import Disk, DiskSnapshot, SnapshotPlan, Window
from vmsnap.roles import DriverContext
from vmsnap_drivers.snapshots.qcow2 import Qcow2Mechanism

KIB, MIB = 1 << 10, 1 << 20
SIZE_BYTES = 8 * MIB
PATIENCE_SECONDS = 30
TAGS = (f"vmsnap-test-{number}" for number in itertools.count(1))
WINDOWS = (Window.FREE, Window.NO_BLOCK_JOBS)


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in time"
        time.sleep(0.005)


class Machine:
    """A QEMU with four disks: raw by -blockdev without a node of the format, with an I/O thread, qcow2 with a backing
    file and an internal snapshot by -drive without names, raw on IDE, and a read-only one.
    """

    def __init__(self, build: QemuBuild, folder: Path) -> None:
        self.build = build
        self.folder = folder / "disks"
        self.folder.mkdir(parents=True)
        self.random = random.Random(build.version)
        self._firmware = folder / "halt.bin"
        # cli; hlt; jmp -3 at the reset vector
        self._firmware.write_bytes(bytes(65536 - 16) + b"\xfa\xf4\xeb\xfd" + bytes(12))
        self.monitor_path = folder / "driver.qmp"
        self._oracle_path = folder / "oracle.qmp"
        self._chunk = folder / "chunk"
        self._make_images()
        self.start()

    def _make_images(self) -> None:
        def image(*arguments: str | Path) -> None:
            subprocess.run([str(self.build.img_binary), *map(str, arguments)], check=True, capture_output=True)

        base = self.folder / "base.raw"
        base.write_bytes(self.random.randbytes(3 * MIB) + bytes(SIZE_BYTES - 3 * MIB))
        image("create", "-f", "qcow2", "-b", base, "-F", "raw", self.folder / "b.qcow2")
        image("snapshot", "-c", "before", self.folder / "b.qcow2")
        for name in ("a.raw", "c.raw", "r.raw"):
            image("create", "-f", "raw", self.folder / name, str(SIZE_BYTES))
        (self.folder / "r.raw").write_bytes(self.random.randbytes(SIZE_BYTES))

    def start(self) -> None:
        """Start QEMU, and connect the oracle."""
        folder = self.folder
        arguments = ["-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
        arguments += ["-bios", str(self._firmware)]
        for path in (self.monitor_path, self._oracle_path):
            path.unlink(missing_ok=True)
            arguments += ["-qmp", f"unix:{path},server=on,wait=off"]
        arguments += ["-object", "iothread,id=thread0", "-object", "throttle-group,id=group0"]
        arguments += ["-blockdev", f"driver=file,node-name=disk-a,filename={folder}/a.raw"]
        arguments += ["-device", "virtio-blk-pci,id=a,drive=disk-a,iothread=thread0"]
        arguments += ["-drive", f"file={folder}/b.qcow2,format=qcow2,if=virtio"]
        arguments += ["-drive", f"file={folder}/c.raw,format=raw,if=ide,id=c"]
        arguments += ["-drive", f"file={folder}/r.raw,format=raw,if=none,id=r,readonly=on"]
        arguments += ["-device", "virtio-blk-pci,drive=r"]
        # qemu-io inside QEMU prints to standard output, at once only where that is a terminal.
        self._printed, terminal = os.openpty()
        self.process = subprocess.Popen(
            self.build.command(*arguments), env=self.build.start_environment(), stdout=terminal
        )
        os.close(terminal)
        try:
            await_true(self._connect, "QEMU's monitor")
        except BaseException:
            self.kill()
            raise

    def _connect(self) -> bool:
        assert self.process.poll() is None, "QEMU did not start"
        try:
            self.oracle = Oracle(self._oracle_path)
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """End QEMU."""
        self.oracle.close()
        self.kill()

    def kill(self) -> None:
        """Kill QEMU, as a crash would."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
            os.close(self._printed)

    def disks(self) -> tuple[Disk, ...]:
        """The disks as the hypervisor's driver describes them."""
        found = {}
        for backend in self.oracle.execute("query-block"):
            inserted = backend["inserted"]
            path = inserted["file"]
            handle = {
                "qmp": str(self.monitor_path),
                "node": inserted["node-name"],
                "qdev": backend["qdev"],
                "file": path,
            }
            name, image_format = Path(path).name.split(".")
            found[name] = Disk(name, path, SIZE_BYTES, image_format, inserted["ro"], handle)
        return tuple(found[name] for name in "abcr")

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        """Write as the guest would, its device's error handling included."""
        self._chunk.write_bytes(data)
        command = f"write -s {self._chunk} {offset} {len(data)}" if any(data) else f"write -z {offset} {len(data)}"
        answer = self.qemu_io(disk, command)
        assert f"wrote {len(data)}/{len(data)} bytes" in answer, answer

    def qemu_io(self, disk: Disk, command: str) -> str:
        """Do something as the guest's device would; returns what it prints."""
        answer = self.oracle.hmp(f'qemu-io -d {disk.handle["qdev"]} "{command}"')
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(self._printed, False)
            while True:
                answer += os.read(self._printed, 65536).decode()
        assert "failed" not in answer, answer
        return answer

    def flush(self) -> None:
        """Flush as the guest would."""
        for backend in self.oracle.execute("query-block"):
            if not backend["inserted"]["ro"]:
                self.qemu_io(Disk("", "", SIZE_BYTES, handle={"qdev": backend["qdev"]}), "flush")

    def scribble(self, disks: Sequence[Disk], writes: int = 6) -> None:
        """Write random data, and zeros, at random places."""
        for disk in disks:
            if disk.read_only:
                continue
            for number in range(writes):
                length = self.random.choice((512, 4096, 70 * KIB, 512 * KIB))
                offset = self.random.randrange(0, SIZE_BYTES - length, 512)
                self.write(disk, offset, bytes(length) if number == 0 else self.random.randbytes(length))

    def content(self, disk: Disk) -> bytes:
        """What the guest would read from the whole disk, found past the mechanism."""
        if not disk.read_only:
            self.qemu_io(disk, "flush")
        overlays = sorted(self.folder.glob(f"*.{'abcr'.index(disk.device)}.overlay.qcow2*"))
        path, image_format = (overlays[0], "qcow2") if overlays else (Path(disk.address), disk.format)
        return self.convert(path, image_format)

    def convert(self, path: Path, image_format: str) -> bytes:
        """The content of an image file."""
        if image_format == "raw":
            return path.read_bytes()
        copy = self.folder.parent / "copy.raw"
        argv = [str(self.build.img_binary), "convert", "-U", "-f", image_format, "-O", "raw", str(path), str(copy)]
        subprocess.run(argv, check=True, capture_output=True)
        return copy.read_bytes()

    def pause(self, window: Window) -> None:
        """Stop the guest, as the capture of that window does: at once, or at the end of a pre-copy."""
        if window is Window.FREE:
            self.oracle.execute("stop")
            return
        capabilities = [{"capability": name, "state": True} for name in ("pause-before-switchover", "events")]
        self.oracle.execute("migrate-set-capabilities", capabilities=capabilities)
        self.oracle.execute("migrate", uri="exec:cat > /dev/null")
        await_true(lambda: self.migration() == "pre-switchover", "pre-switchover")

    def resume(self, window: Window) -> None:
        """Let the guest run again."""
        if window is Window.FREE:
            self.oracle.execute("cont")
            return
        self.oracle.execute("migrate-continue", state="pre-switchover")
        await_true(lambda: self.migration() in ("completed", "failed"), "the end of the migration")
        assert self.migration() == "completed"
        await_true(self._continue, "the guest to run again")

    def _continue(self) -> bool:
        self.oracle.hmp("cont")
        return self.oracle.status() == "running"

    def migration(self) -> str:
        """The status of the migration."""
        return str(self.oracle.execute("query-migrate").get("status"))

    def traces(self) -> str:
        """The block graph, exports, jobs, and the names beside the disks."""
        nodes = self.oracle.execute("query-named-block-nodes", flat=True)
        found = {
            "nodes": sorted(nodes, key=lambda node: str(node["node-name"])),
            "backends": self.oracle.execute("query-block"),
            "exports": self.oracle.execute("query-block-exports"),
            "jobs": self.oracle.execute("query-jobs"),
            "files": sorted(path.name for path in self.folder.iterdir()),
        }
        return json.dumps(_without_sizes(found), indent=1, sort_keys=True)


def _without_sizes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sizes(item) for key, item in value.items() if key not in ("actual-size", "virtual-size")}
    return [_without_sizes(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(params=available_qemus(), ids=lambda build: f"qemu{build.version}")
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A running machine, some of its disks written."""
    made = Machine(request.param, tmp_path)
    try:
        made.scribble(made.disks())
        yield made
    finally:
        made.stop()


@pytest.fixture
def context(tmp_path: Path) -> DriverContext:
    """A host with a state folder whose path is too long for a socket's address."""
    folder = tmp_path / ("a-long-name" * 9)
    folder.mkdir(mode=0o700)
    return DriverContext(state_dir=folder, memory_dir=tmp_path)


def mechanism(context: DriverContext, **options: str) -> Qcow2Mechanism:
    return Qcow2Mechanism(context, {"copy_seconds": "10", "qemu_img": "qemu-img"} | options)


def run_until(
    step: str, driver: Qcow2Mechanism, machine: Machine, window: Window
) -> tuple[SnapshotPlan, tuple[DiskSnapshot, ...]]:
    """Take a snapshot up to and with that step, the guest writing wherever it runs."""
    disks = machine.disks()
    plan = driver.plan("vm001", disks, next(TAGS), window)
    snapshots: tuple[DiskSnapshot, ...] = ()
    if step != "plan":
        driver.prepare(plan)
    machine.scribble(disks, 2)
    if step in ("snapshot", "settle", "read"):
        machine.pause(window)
        snapshots = driver.snapshot(plan)
        machine.resume(window)
        machine.scribble(disks)
    if step in ("settle", "read"):
        driver.settle(snapshots)
        machine.scribble(disks)
    return plan, snapshots
