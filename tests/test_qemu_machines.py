"""Whole machines of many kinds, booted on both QEMUs, backed up while they run and restored beside themselves: disks on
all controllers, media that were changed, devices that came and went, firmware with variables, a TPM, all kinds of RAM.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.guardians import remove_host
from tests.lab import LabMachine, available_qemus
from tests.lab import serial as console
from tests.lab.qemus import QemuBuild
from tests.lab.qmp import Oracle
from tests.left_out import some_of
from vmsnap.controller import Controller
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap.repository import Manifest, Repository

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(1500)]

MIB = 1 << 20
DISK_BYTES = 80 * MIB
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
BUILDS = [pytest.param(build, id=f"qemu-{build.version}") for build in available_qemus()]
DEADLINE_SECONDS = 400.0


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for UNIX sockets, on a disk."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    yield folder
    remove_host(folder)


@pytest.fixture(params=some_of(BUILDS, 2))
def build(request: pytest.FixtureRequest) -> QemuBuild:
    found: QemuBuild = request.param
    return found


@dataclass
class Host:
    """What a test does with a running machine."""

    place: Path
    controller: Controller
    repository: Repository

    def back_up(self, machine: LabMachine) -> Manifest:
        """Back the machine up, live; it must not have noticed."""
        self.controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        result = self.controller.backup("vm001", self.repository)
        assert result.warnings == ()
        machine.wait_for_check(machine.latest_check() + 1, DEADLINE_SECONDS)
        return self.repository.manifest(result.backup)

    @contextmanager
    def restored(self, manifest: Manifest, *, run: bool = True) -> Iterator[Restored]:
        """The machine restored beside itself, isolated and running."""
        restored = self.controller.restore(self.repository, manifest.backup, "vm002", run=run, isolated=True)
        driver = self.controller.drivers.hypervisor("qemu", "vm002", restored.options)
        monitor = Path(restored.options["qmp"])
        try:
            addresses = {disk.device: Path(disk.address) for disk in restored.disks}
            yield Restored(monitor, monitor.parent / "serial.log", addresses)
        finally:
            driver.destroy()
            driver.close()
            self.controller.remove_vm("vm002")
            shutil.rmtree(self.place / "state/vms/vm002", ignore_errors=True)


@dataclass
class Restored:
    """A machine that was brought back."""

    monitor: Path
    log: Path
    disks: dict[str, Path]

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, reached: Callable[[str], bool]) -> str:
        """What the guest has said once it has said something; it must not have faulted."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not reached(text := self.text()):
            assert console.faults(text) == []
            assert time.monotonic() < deadline, f"the restored guest did not get there: {text[-500:]}"
            time.sleep(0.05)
        assert console.faults(text) == []
        return text

    def wait_for_checks(self, number: int = 2) -> str:
        return self.wait(lambda text: len(console.checks(text)) >= number)

    @contextmanager
    def asked(self) -> Iterator[Callable[..., Any]]:
        oracle = Oracle(self.monitor)
        try:
            yield oracle.execute
        finally:
            oracle.close()


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    folders = HostFolders.find(place / "state")
    with Controller(folders) as controller:
        yield Host(place, controller, create_repository(str(place / "repository")))
    assert list(folders.memory_dir.rglob("*")) == []


@contextmanager
def running(machine: LabMachine) -> Iterator[LabMachine]:
    with machine:
        machine.wait_for_check(40, DEADLINE_SECONDS)
        yield machine


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """A block device of the host."""
    done = subprocess.run(["losetup", "--find", "--show", str(file)], check=True, capture_output=True, text=True)
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


def image_tool(build: QemuBuild, *arguments: object) -> None:
    argv = [str(build.img_binary), *map(str, arguments)]
    subprocess.run(argv, check=True, capture_output=True, env=build.start_environment())


def media(ask: Callable[..., Any]) -> dict[str, str]:
    """The image in each removable drive, empty where there is none."""
    return {
        entry["device"] or entry["qdev"]: entry.get("inserted", {}).get("image", {}).get("filename", "")
        for entry in ask("query-block")
        if entry["removable"]
    }


def test_a_machine_of_legacy_drives_chains_and_changed_media(build: QemuBuild, host: Host, place: Path) -> None:
    folder = place / "images"
    folder.mkdir()
    for name in ("first", "second", "floppy"):
        (folder / f"{name}.img").write_bytes(name.encode().ljust(1440 * 1024, b"."))
    (folder / "ide.raw").write_bytes(b"")
    (folder / "block.raw").write_bytes(b"")
    (folder / "bare.raw").write_bytes(b"")
    for name in ("ide.raw", "block.raw", "bare.raw"):
        with (folder / name).open("r+b") as file:
            file.truncate(DISK_BYTES)
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    build.create_image(base, "qcow2", DISK_BYTES)
    image_tool(build, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    image_tool(build, "snapshot", "-c", "inside", top)
    with loop_device(folder / "block.raw") as device, loop_device(folder / "bare.raw") as bare:
        (folder / "scsi.conf").write_text(
            f'[drive "block"]\n if = "none"\n file = "{device}"\n format = "raw"\n cache = "none"\n'
            '[device "scsi-disk"]\n driver = "scsi-hd"\n drive = "block"\n bus = "scsi0.0"\n'
        )
        # fmt: off
        arguments = [
            "-drive", f"if=virtio,file={top},format=qcow2",
            "-hda", str(folder / "ide.raw"), "-cdrom", str(folder / "first.img"), "-fda", str(folder / "floppy.img"),
            "-device", "virtio-scsi-pci,id=scsi0",
            "-readconfig", str(folder / "scsi.conf"), "-mem-prealloc",
            "-blockdev", f"driver=host_device,node-name=node,filename={bare},cache.direct=on,aio=native,discard=unmap",
            "-device", "scsi-hd,drive=node,id=bare",
        ]
        # fmt: on
        machine = LabMachine(
            place / "vm001", build, disks=(), settings={"controllers": 3}, extra_arguments=arguments, round_memory=True
        )
        with running(machine):
            ask = machine.oracle.execute
            cdrom = next(entry["qdev"] for entry in ask("query-block") if entry["device"] == "ide1-cd0")
            ask("blockdev-change-medium", id=cdrom, filename=str(folder / "second.img"), format="raw")
            ask("eject", device="floppy0", force=True)
            assert "READY disks=4" in machine.serial_text()

            manifest = host.back_up(machine)
            assert [disk.device for disk in manifest.disks] == ["virtio0", "ide0-hd0", "scsi-disk", "bare"]
            assert {disk.device: disk.address for disk in manifest.read_only_disks} == {
                "ide1-cd0": str(folder / "second.img"),
            }
            with host.restored(manifest) as restored:
                restored.wait_for_checks()
                with restored.asked() as ask:
                    assert media(ask) == {"ide1-cd0": str(folder / "second.img"), "floppy0": ""}
            assert machine.faults() == []


@contextmanager
def software_tpm(folder: Path) -> Iterator[None]:
    """A TPM 2.0, which QEMU finds on ``tpm.sock``."""
    state, socket = folder / "tpm", folder / "tpm.sock"
    state.mkdir()
    argv = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={socket}"]
    process = subprocess.Popen([*argv, "--terminate"], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not socket.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def measured(text: str) -> list[int]:
    """How often the guest has extended its PCR, line by line, each line checked against what the PCR must hold."""
    numbers = []
    for number, value in re.findall(r"^TPM (\d+) ([0-9A-Fa-f]{64})\s*$", text, re.MULTILINE):
        held = bytes(32)
        for _ in range(int(number)):
            held = hashlib.sha256(held + bytes(32)).digest()
        assert value.lower() == held.hex(), f"after {number} times"
        numbers.append(int(number))
    return numbers


@contextmanager
def huge_pages(number: int) -> Iterator[None]:
    """Reserve huge pages of 2 MiB, beside those that others have."""
    reserved = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = int(reserved.read_text())
    deadline = time.monotonic() + 60
    try:
        reserved.write_text(str(before + number))
        while int(reserved.read_text()) < before + number:
            assert time.monotonic() < deadline, "the host has no memory in one piece"
            Path("/proc/sys/vm/compact_memory").write_text("1")
            reserved.write_text(str(before + number))
        yield
    finally:
        reserved.write_text(str(before))


def wait_until_gone(ask: Callable[..., Any], device: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while any(entry["name"] == device for entry in ask("qom-list", path="/machine/peripheral")):
        assert time.monotonic() < deadline, f"the guest does not let {device} go"
        time.sleep(0.05)


def test_devices_come_and_go_with_a_tpm_on_every_kind_of_ram(build: QemuBuild, host: Host, place: Path) -> None:
    shared = Path("/dev/shm") / f"{place.name}.ram"
    # fmt: off
    arguments = [
        "-object", "memory-backend-memfd,id=memfd,size=128M",
        "-object", f"memory-backend-file,id=tmpfs,size=128M,mem-path={shared},share=on",
        "-object", "memory-backend-memfd,id=huge,size=128M,hugetlb=on,hugetlbsize=2M,prealloc=on",
        "-numa", "node,memdev=memfd", "-numa", "node,memdev=tmpfs", "-numa", "node,memdev=huge",
        "-device", "virtio-scsi-pci,id=scsi0",
        "-chardev", f"socket,id=tpm-socket,path={place}/tpm.sock", "-tpmdev", "emulator,id=tpm0,chardev=tpm-socket",
        "-device", "tpm-tis,tpmdev=tpm0",
    ]
    # fmt: on
    machine = LabMachine(
        place / "vm001",
        build,
        memory_mib=384,
        settings={"controllers": 2, "touch_mib": 100, "tpm": 1},
        extra_arguments=arguments,
        round_memory=True,
    )
    block, scsi = place / "block.raw", place / "scsi.qcow2"
    build.create_image(block, "raw", DISK_BYTES)
    build.create_image(scsi, "qcow2", DISK_BYTES)
    try:
        with huge_pages(64), software_tpm(place), running(machine):
            ask = machine.oracle.execute
            ask("netdev_add", type="user", id="net1", restrict=True)
            ask("device_add", driver="virtio-net-pci", id="nic1", netdev="net1", mac="52:54:00:00:00:77")
            ask("device_del", id="nic0")
            wait_until_gone(ask, "nic0")
            ask("netdev_del", id="net0")
            ask("blockdev-add", node_name="plugged-block", driver="file", filename=str(block))
            ask(
                "blockdev-add", node_name="plugged-scsi", driver="qcow2", file={"driver": "file", "filename": str(scsi)}
            )
            ask("device_add", driver="virtio-blk-pci", id="block", drive="plugged-block", serial="by, hand")
            ask("device_add", driver="scsi-hd", id="scsi", drive="plugged-scsi", bus="scsi0.0")
            deadline = time.monotonic() + DEADLINE_SECONDS
            while len(re.findall(r"^DISK (?:vdc|sda) at", machine.serial_text(), re.MULTILINE)) < 2:
                assert time.monotonic() < deadline, machine.serial_text()[-500:]
                time.sleep(0.05)
            machine.wait_for_check(machine.latest_check() + 1, DEADLINE_SECONDS)

            before = measured(machine.serial_text())[-1]
            manifest = host.back_up(machine)
            after = measured(machine.serial_text())[-1]
            assert [disk.device for disk in manifest.disks] == ["disk0", "disk1", "block", "scsi"]
            with host.restored(manifest) as restored:
                text = restored.wait(lambda text: len(console.checks(text)) >= 2 and len(measured(text)) >= 2)
                assert before <= measured(text)[0] <= after + 1, "the TPM goes on at the instant"
                with restored.asked() as ask:
                    names = {entry["name"] for entry in ask("qom-list", path="/machine/peripheral")}
                    assert names >= {"disk0", "disk1", "scsi0", "nic1", "block", "scsi"}
                    assert "nic0" not in names
                    for device, key in (("nic1", "mac"), ("block", "serial"), ("block", "addr"), ("scsi0", "addr")):
                        asked = {"path": f"/machine/peripheral/{device}", "property": key}
                        assert ask("qom-get", **asked) == machine.oracle.execute("qom-get", **asked)
            assert machine.faults() == []
    finally:
        shared.unlink(missing_ok=True)


def test_ram_in_files_of_huge_pages(build: QemuBuild, host: Host, place: Path) -> None:
    """``-mem-path``: QEMU makes the memory backend itself."""
    mounted = place / "huge"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "none", str(mounted)], check=True)
    try:
        machine = LabMachine(
            place / "vm001",
            build,
            memory_mib=256,
            round_memory=True,
            settings={"touch_mib": 60},
            extra_arguments=("-mem-path", str(mounted)),
        )
        with huge_pages(160), running(machine):
            manifest = host.back_up(machine)
            with host.restored(manifest) as restored:
                restored.wait_for_checks(2)
            assert machine.faults() == []
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_uefi_variables_are_of_the_instant(build: QemuBuild, host: Host, place: Path) -> None:
    variables = place / "variables.fd"
    shutil.copy(VARIABLES, variables)
    # fmt: off
    names, arguments = {
        "drive": (("pflash0", "pflash1"), [
            "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}",
            "-drive", f"if=pflash,unit=1,format=raw,file={variables}",
        ]),
        "blockdev": (("code", "variables"), [
            "-blockdev", f"driver=file,node-name=code,filename={FIRMWARE},read-only=on",
            "-blockdev", f"driver=file,node-name=variables,filename={variables}",
            "-machine", "pflash0=code,pflash1=variables",
        ]),
    }["drive" if build.version == "7.2" else "blockdev"]  # firmware boots for half a minute: one form each
    # fmt: on
    machine = LabMachine(place / "vm001", build, machine_type="q35", extra_arguments=arguments, round_memory=True)
    with running(machine):
        manifest = host.back_up(machine)
        assert {disk.device for disk in manifest.disks} == {"disk0", "disk1", names[1]}
        assert {disk.device: disk.address for disk in manifest.read_only_disks} == {names[0]: str(FIRMWARE)}
        with host.restored(manifest) as restored:
            restored.wait_for_checks(1)
            assert restored.disks[names[1]].read_bytes() == variables.read_bytes()
            assert variables.read_bytes() != VARIABLES.read_bytes(), "the firmware wrote to them"
            with restored.asked() as ask:
                ask("set-action", reboot="reset")
                ask("system_reset")
            restored.wait(lambda text: "READY disks=2" in text and bool(console.checks(text.split("READY")[1])))
        assert machine.faults() == []
