"""What cannot be captured truthfully is refused with one line each, before anything is done: told by the options."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab import QemuBuild, available_qemus
from tests.lab.qmp import Oracle
from vmsnap.testing.rigs import eventually
from vmsnap_drivers.qemu.commandline import parse
from vmsnap_drivers.qemu.refusals import of_argument, of_nodes

BUILDS = [pytest.param(build, id=f"qemu-{build.version}") for build in available_qemus()]


def refused(text: str, cwd: str = "/") -> list[str]:
    return [line for argument in parse(shlex.split(f"qemu {text}")) for line in of_argument(argument, cwd)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("-device vfio-pci,host=01:00.0,id=card", "vfio-pci 'card' writes to memory and disks behind"),
        ("""-device '{"driver":"vfio-pci","host":"01:00.0","id":"card"}'""", "vfio-pci 'card' writes"),
        ("-device vhost-user-blk-pci,chardev=c,id=disk", "vhost-user-blk-pci 'disk' writes"),
        ("-netdev vhost-user,id=net,chardev=c", "vhost-user 'net' writes"),
        ("-netdev vhost-vdpa,id=net,vhostdev=/dev/vhost-vdpa-0", "vhost-vdpa 'net' writes"),
        ("-device vhost-scsi-pci,id=scsi,wwpn=naa.1", "vhost-scsi-pci 'scsi' writes"),
        ("-device ivshmem-plain,memdev=m,id=shared", "ivshmem-plain 'shared' writes"),
        ("-device scsi-block,drive=d,id=tape", "scsi-block 'tape' passes the guest's commands through"),
        ("-device scsi-generic,drive=d,id=tape", "scsi-generic 'tape' passes"),
        ("-add-fd fd=3,set=2", "open files with -add-fd"),
        ("-object memory-backend-file,id=ram,size=1G,mem-path=/dev/shm/ram,pmem=on", "'ram' is persistent memory"),
    ],
)
def test_each_kind_has_its_line(text: str, told: str) -> None:
    (line,) = refused(text)
    assert told in line
    assert "\n" not in line


def test_ram_in_an_ordinary_file_is_told_from_ram_in_memory(tmp_path: Path) -> None:
    backend = "-object memory-backend-file,id=ram,size=1G,mem-path="
    (line,) = refused(f"{backend}ram.img", str(tmp_path))
    assert line.endswith(f"({tmp_path}/ram.img), not in memory")
    assert refused(f"{backend}/dev/shm/ram.img") == []
    assert (
        refused("-object memory-backend-memfd,id=ram,size=1G,hugetlb=on -object memory-backend-ram,id=r,size=1G") == []
    )


@pytest.mark.parametrize(
    "text",
    [
        "-device virtio-blk-pci,drive=d -device scsi-hd,drive=e -device virtio-scsi-pci -device nvme,drive=f,serial=1",
        "-netdev user,id=n -netdev tap,id=t,vhost=on -device virtio-net-pci,netdev=n",
        "-chardev socket,id=c,path=/s -tpmdev emulator,id=tpm0,chardev=c -device tpm-crb,tpmdev=tpm0",
    ],
)
def test_what_can_be_captured_is_not_refused(text: str) -> None:
    assert refused(text) == []


def node(name: str, driver: str, file: str = "/srv/disk", *, read_only: bool = False, encrypted: bool = False) -> Any:
    """As QEMU 7.2 and 10.0 tell of one."""
    return {"node-name": name, "drv": driver, "file": file, "ro": read_only, "encrypted": encrypted}


@pytest.mark.parametrize("driver", ["nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user"])
def test_a_disk_whose_data_come_into_memory_past_qemu_is_told_by_its_node(driver: str) -> None:
    """It opens such a one only where there is the device."""
    (line,) = of_nodes([node("disk0", "raw"), node("disk0-storage", driver)])
    assert line == f"the block node 'disk0-storage' ({driver}) has data moved into the guest's memory past QEMU"


def test_disks_in_files_and_behind_networks_are_not() -> None:
    assert of_nodes([node(name, name) for name in ("file", "host_device", "iscsi", "nbd", "raw", "qcow2")]) == []


def asked(tmp_path: Path, build: QemuBuild, *options: str) -> list[dict[str, Any]]:
    """What a QEMU that does not run says of its nodes."""
    socket = tmp_path / "qmp"
    words = ["-S", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-qmp", f"unix:{socket},server=on"]
    with subprocess.Popen(build.command(*words, *options)) as process:
        try:
            eventually(socket.exists, "its monitor is there")
            oracle = Oracle(socket)
            found: list[dict[str, Any]] = oracle.execute("query-named-block-nodes", flat=True)
            oracle.close()
            return found
        finally:
            process.kill()


@pytest.mark.qemu
@pytest.mark.parametrize("build", BUILDS)
def test_a_part_of_a_device_and_an_encrypted_image_are_told_by_a_real_qemu(tmp_path: Path, build: QemuBuild) -> None:
    raw, image, secret = tmp_path / "raw", tmp_path / "qcow2", "secret,id=word,data=word"
    raw.write_bytes(bytes(4 << 20))
    luks = ["-o", "encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=10", str(image), "4M"]
    subprocess.run([build.img_binary, "create", "-q", "-f", "qcow2", "--object", secret, *luks], check=True)
    part = {"driver": "raw", "node-name": "part", "file": "raw", "offset": 1 << 20, "size": 2 << 20}
    whole = {"driver": "raw", "node-name": "whole", "file": "raw", "read-only": True}
    locked = {"driver": "qcow2", "node-name": "locked", "encrypt": {"format": "luks", "key-secret": "word"}}
    found = asked(
        tmp_path, build,
        "-object", secret,
        "-blockdev", json.dumps({"driver": "file", "node-name": "raw", "filename": str(raw)}),
        "-blockdev", json.dumps(part), "-blockdev", json.dumps(whole),
        "-blockdev", json.dumps({**locked, "file": {"driver": "file", "filename": str(image)}}),
    )  # fmt: skip
    told = sorted(of_nodes(found))
    assert [line.partition("'")[2].partition("'")[0] for line in told] == ["locked", "part"]
    assert "is an encrypted image" in told[0] and "is a part of what it lies on" in told[1]


def test_a_disk_that_others_write_to_is_refused() -> None:
    (line,) = refused("-device virtio-blk-pci,drive=d,id=shared,share-rw=on")
    assert "'shared' shares its disk (share-rw)" in line
    assert refused("""-device '{"driver":"virtio-blk-pci","drive":"d","id":"own","share-rw":false}'""") == []
    (line,) = refused("""-device '{"driver":"virtio-blk-pci","drive":"d","id":"shared","share-rw":true}'""")
    assert "(share-rw) with others" in line
